"""The Python file beside the weights: loading where fairy2i was never imported, and not being in the way elsewhere."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import logits, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fairy2i
from fairy2i import PackedLinear, QATLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.integrations.remote_code import AUTO_MAP, SHIM_FILE, write_shim

V2 = "complex_phase_v2"
TESTS = str(Path(__file__).resolve().parents[1])
ROOT = str(Path(fairy2i.__file__).resolve().parents[1])
BLOCK = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fairy2i":
            raise ModuleNotFoundError("No module named 'fairy2i'", name="fairy2i")
sys.meta_path.insert(0, Blocked())
"""


def converted(packed, **kwargs):
    model = tiny_model("llama", **kwargs)
    replace_modules_for_qat(model, V2)
    return convert_to_inference_mode(model) if packed else model


def in_a_fresh_process(code, *arguments, modules, block=False):
    """Run code that has not imported fairy2i; nobody answers a prompt."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "PYTHONPATH": os.pathsep.join((ROOT, TESTS))}
    code = f"import sys\n{BLOCK if block else ''}{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def has_shim(folder):
    return (folder / SHIM_FILE).is_file(), "auto_map" in json.loads((folder / "config.json").read_text())


# In a program that never imported fairy2i


def test_trust_remote_code_alone_loads_the_real_model_with_every_auto_class(tmp_path):
    for name, packed in (("packed", True), ("qat", False)):
        model = converted(packed)
        model.save_pretrained(tmp_path / name)
        torch.save(logits(model), tmp_path / f"{name}.pt")
    code = """
import torch
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM
assert "fairy2i" not in sys.modules
from tiny_models import logits, token_batch
folder = Path(sys.argv[1])
for name, layer in (("packed", "PackedLinear"), ("qat", "QATLinear")):
    model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama", type(model)
    assert type(model.lm_head).__name__ == layer, model.lm_head
    assert torch.equal(logits(model), torch.load(folder / f"{name}.pt")), name
    backbone = AutoModel.from_pretrained(folder / name, trust_remote_code=True)
    assert type(backbone.layers[0].mlp.up_proj).__name__ == layer, backbone
    model.save_pretrained(folder / f"{name}-again")
"""
    done = in_a_fresh_process(code, tmp_path, modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    for name in ("packed", "qat"):
        files = [
            {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
            for folder in (name, f"{name}-again")
        ]
        assert files[0] == files[1]


def test_without_fairy2i_the_error_says_what_to_install(tmp_path):
    converted(packed=True).save_pretrained(tmp_path / "packed")
    code = """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    done = in_a_fresh_process(code, tmp_path / "packed", modules=tmp_path / "modules", block=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert "pip install fairy2i" in done.stderr.splitlines()[-1]


# In a program that did


@pytest.mark.parametrize("trust", [None, False, True], ids=["unsaid", "distrust", "trust"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "qat"])
def test_with_fairy2i_imported_nobody_is_asked_about_remote_code(packed, trust, tmp_path, monkeypatch):
    model = converted(packed)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    said = {} if trust is None else {"trust_remote_code": trust}
    if not trust:
        (tmp_path / SHIM_FILE).write_text("raise RuntimeError('this must not run')")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **said)
    assert type(loaded) is type(model)
    assert type(loaded.lm_head) is (PackedLinear if packed else QATLinear)
    assert torch.equal(logits(loaded), logits(model))
    assert type(AutoConfig.from_pretrained(tmp_path, **said)) is type(model.config)
    assert AutoModelForCausalLM.from_config(loaded.config, **said)


def test_the_config_names_the_model_as_transformers_does_and_the_shim_beside_it(tmp_path):
    model = converted(packed=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["auto_map"] == {"AutoConfig": "modeling_fairy2i.CheckpointConfig"}
    assert (tmp_path / "modeling_fairy2i.py").is_file()


# When it is written


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "qat"])
def test_it_is_written_again_by_whatever_was_loaded_copied_or_pickled(packed, tmp_path):
    model = converted(packed)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    copied = copy.deepcopy(loaded)
    with torch.no_grad():
        loaded.model.norm.weight.fill_(7.0)
    for name, other in (("loaded", loaded), ("copied", copied)):
        other.save_pretrained(tmp_path / name)
        assert has_shim(tmp_path / name) == (True, True)
        saved = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(saved["model.norm.weight"], other.model.norm.weight)
    pickle.loads(pickle.dumps(copied)).save_pretrained(tmp_path / "pickled")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pickled")), logits(model))


def test_a_dequantized_model_is_plain_and_writes_none(tmp_path):
    model = tiny_model("llama")
    replace_modules_for_qat(model, V2)
    convert_to_inference_mode(model, packed=False).save_pretrained(tmp_path)
    assert has_shim(tmp_path) == (False, False)


def test_only_the_main_process_writes_it(tmp_path):
    converted(packed=True).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / SHIM_FILE).exists()


@pytest.mark.parametrize("keyword", [True, False], ids=["by keyword", "by position"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "qat"])
def test_a_state_dict_that_is_handed_over_is_what_is_saved(packed, keyword, tmp_path):
    model = converted(packed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"].fill_(0.5)
    if keyword:
        model.save_pretrained(tmp_path, state_dict=dict(state))
    else:
        model.save_pretrained(tmp_path, True, dict(state))
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted(saved) == sorted(state)
    assert all(torch.equal(saved[name], state[name]) for name in state)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight[0] == 0.5
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_an_auto_map_of_other_remote_code_is_left_as_it_is(tmp_path):
    model = tiny_model("llama")
    theirs = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    model.config.auto_map = dict(theirs)
    replace_modules_for_qat(model, V2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == theirs
    assert not (tmp_path / SHIM_FILE).exists()
    convert_to_inference_mode(model, packed=False)
    assert model.config.auto_map == theirs


def test_an_auto_map_that_came_from_the_hub_is_made_local_again(tmp_path):
    model = tiny_model("llama")
    model.config.auto_map = {key: f"user/name--{value}" for key, value in AUTO_MAP.items()}
    replace_modules_for_qat(model, V2)
    assert model.config.auto_map == AUTO_MAP


def test_a_module_that_is_no_transformers_model_gets_nothing():
    module = nn.Sequential(nn.Linear(4, 4))
    replace_modules_for_qat(module, V2)
    assert not hasattr(module, "save_pretrained")


def test_write_shim_writes_what_a_saved_model_has(tmp_path):
    converted(packed=True).save_pretrained(tmp_path / "saved")
    (tmp_path / "by hand").mkdir()
    write_shim(tmp_path / "by hand")
    assert (tmp_path / "by hand" / SHIM_FILE).read_bytes() == (tmp_path / "saved" / SHIM_FILE).read_bytes()
