"""Tiny checkpoints, and ways to damage them."""

import copy
import json

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from fairy2i import PackedLinear, PhaseScheme, QATLinear, convert_to_inference_mode, replace_modules_for_qat

V2 = "complex_phase_v2"
LEARNED = PhaseScheme(granularity="row", scales="learned")
MIXED = {"*.layers.0.*": "complex_phase_v4", "down_proj": None, "*_proj": LEARNED, "lm_head": "bitnet"}


def schemes(model):
    return {name: module.scheme for name, module in model.named_modules() if isinstance(module, QATLinear)}


def saved_qat(path, method=V2, tied=False, dtype=torch.float32, **kwargs):
    """Save a tiny QAT model and return it."""
    model = tiny_model("llama", tied, dtype=dtype)
    replace_modules_for_qat(model, method, **kwargs)
    model.save_pretrained(path)
    return model


def read_config(path):
    return json.loads((path / "config.json").read_text())


def edit_config(path, **fields):
    config = read_config(path)
    config["quantization_config"].update(fields)
    (path / "config.json").write_text(json.dumps(config))


def packed_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def saved_packed(path, family="llama", method=V2, tied=False, dtype=torch.float32, skip=None, **kwargs):
    """Save a tiny packed model; return the QAT model that it came from."""
    model = tiny_model(family, tied, dtype=dtype)
    replace_modules_for_qat(model, method, skip_lm_head=skip)
    convert_to_inference_mode(copy.deepcopy(model)).save_pretrained(path, **kwargs)
    return model


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
