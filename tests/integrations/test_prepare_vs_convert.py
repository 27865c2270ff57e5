"""Prepare equals convert equals packed: one model, three forms, the same logits bit for bit, whatever the method.

Not only in float32: in bfloat16 and float16 too, because all three multiply by the same rounded dense weight.
"""

import copy
import dataclasses

import pytest
import torch
from tiny_models import logits, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from fairy2i import METHODS, PackedLinear, QATLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.schemes import PhaseScheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row", "tile"])


def scheme_of(method, granularity, **fields):
    return dataclasses.replace(METHODS[method], granularity=granularity, tile=5, **fields)


def layer_types(model):
    return {type(module) for module in model.modules() if isinstance(module, nn.Linear | PackedLinear)}


def check_three_forms(model, folder):
    """Check the three forms of a QAT model against each other, and that packing again gives the same bytes."""
    prepared = logits(model)
    converted = convert_to_inference_mode(copy.deepcopy(model), packed=False)
    packed = convert_to_inference_mode(copy.deepcopy(model))
    packed.save_pretrained(folder / "packed")
    model.save_pretrained(folder / "qat")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "packed")
    forms = {"converted": converted, "packed": packed, "reloaded": reloaded}
    types = [layer_types(form) for form in (model, *forms.values())]
    assert types == [{QATLinear}, {nn.Linear}, {PackedLinear}, {PackedLinear}]
    assert prepared.isfinite().all()
    for name, form in forms.items():
        assert torch.equal(logits(form), prepared), name

    again = convert_to_inference_mode(AutoModelForCausalLM.from_pretrained(folder / "qat"))
    for name, form in (("reloaded", reloaded), ("packed again", again)):
        form.save_pretrained(folder / name)
        files = [(folder / which / "model.safetensors").read_bytes() for which in ("packed", name)]
        assert files[0] == files[1], name
    return prepared


@EACH_DTYPE
@EACH_GRANULARITY
@pytest.mark.parametrize("method", METHODS)
def test_prepare_vs_convert_vs_packed(method, granularity, dtype, tmp_path):
    plain = tiny_model("llama", dtype=dtype)
    expected = logits(plain)
    replace_modules_for_qat(plain, scheme_of(method, granularity))
    assert not torch.equal(check_three_forms(plain, tmp_path), expected)


@EACH_DTYPE
@EACH_GRANULARITY
@pytest.mark.parametrize("method", ["bitnet", "bitnet_1_58", "complex_phase_v2"])
def test_prepare_vs_convert_vs_packed_with_trained_scales(method, granularity, dtype, tmp_path):
    model = tiny_model("qwen2", dtype=dtype)
    replace_modules_for_qat(model, scheme_of(method, granularity, scales="learned"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QATLinear):
                module.scales.mul_(1 + 0.3 * torch.rand_like(module.scales))
    check_three_forms(model, tmp_path)


@EACH_DTYPE
@EACH_GRANULARITY
def test_prepare_vs_convert_vs_packed_with_jointly_fitted_scales(granularity, dtype, tmp_path):
    model = tiny_model("llama", dtype=dtype)
    replace_modules_for_qat(model, scheme_of("complex_phase_v3", granularity, scales="joint"))
    check_three_forms(model, tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3"])
def test_prepare_vs_convert_vs_packed_in_other_families(family, tmp_path):
    model = tiny_model(family)
    replace_modules_for_qat(model, PhaseScheme(stages=3, granularity="tile", tile=7, scales="learned"))
    prepared = logits(model)
    for packed in (False, True):
        form = convert_to_inference_mode(copy.deepcopy(model), packed=packed)
        form.save_pretrained(tmp_path / str(packed))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / str(packed))), prepared)
