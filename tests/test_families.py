"""Every supported family: replaced, trained for a step, saved, loaded again, and converted, tied and untied."""

import math

import pytest
import torch
from tiny_models import FAMILIES, logits, tiny_model, token_batch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fairy2i import PackedLinear, PhaseScheme, QATLinear, convert_to_inference_mode, replace_modules_for_qat

METHODS = {"v2": "complex_phase_v2", "learned": PhaseScheme(stages=2, granularity="row", scales="learned")}
TIES = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EACH_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def quantized_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, QATLinear)]


def train_one_step(model):
    torch.manual_seed(3)  # OPT and GPT-2 have dropout
    model.train()
    loss = model(token_batch(), labels=token_batch()).loss
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    model.zero_grad()
    model.eval()
    return loss.item()


@TIES
@EACH_FAMILY
def test_all_linear_layers_but_a_tied_head_are_replaced_under_unchanged_state_dict_keys(family, tied):
    model = tiny_model(family, tied)
    keys, linear = list(model.state_dict()), linear_names(model)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    report = replace_modules_for_qat(model, "complex_phase_v2")
    assert quantized_names(model) == [name for name in linear if not (tied and name == head)]
    assert len(linear) >= 9
    assert report.unreachable == []
    assert list(model.state_dict()) == keys


@EACH_METHOD
@TIES
@EACH_FAMILY
def test_one_training_step_changes_every_quantized_weight(family, tied, method):
    model = tiny_model(family, tied)
    replace_modules_for_qat(model, method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert math.isfinite(train_one_step(model))
    for name in quantized_names(model):
        assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"]), name
        if method is METHODS["learned"]:
            assert not torch.equal(model.get_submodule(name).scales, before[f"{name}.scales"]), name


@EACH_METHOD
@TIES
@EACH_FAMILY
def test_a_trained_model_is_saved_and_loaded_bit_for_bit_as_a_model_that_trains_on(family, tied, method, tmp_path):
    model = tiny_model(family, tied)
    replace_modules_for_qat(model, method)
    train_one_step(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert quantized_names(loaded) == quantized_names(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(logits(loaded), logits(model))
    train_one_step(model)
    train_one_step(loaded)
    assert torch.equal(logits(loaded), logits(model))


@TIES
@EACH_FAMILY
def test_a_dequantized_model_is_saved_and_loaded_bit_for_bit_as_a_plain_model(family, tied, tmp_path):
    model = tiny_model(family, tied)
    kinds = {name: type(module) for name, module in model.named_modules()}
    replace_modules_for_qat(model, METHODS["learned"])
    keys = [key for key in model.state_dict() if not key.endswith(".scales")]
    before = logits(model)
    convert_to_inference_mode(model, packed=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: type(module) for name, module in loaded.named_modules()} == kinds
    assert list(loaded.state_dict()) == keys
    assert torch.equal(logits(loaded), before)
    with pytest.raises(ValueError, match="already quantized values"):
        replace_modules_for_qat(loaded, "complex_phase_v2")


@EACH_METHOD
@TIES
@EACH_FAMILY
def test_a_packed_model_is_saved_and_loaded_bit_for_bit(family, tied, method, tmp_path):
    model = tiny_model(family, tied)
    replace_modules_for_qat(model, method)
    quantized, before = quantized_names(model), logits(model)
    convert_to_inference_mode(model)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [name for name, module in loaded.named_modules() if isinstance(module, PackedLinear)] == quantized
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@EACH_FAMILY
def test_a_quantized_tied_head_is_saved_and_loaded_bit_for_bit(family, packed, tmp_path):
    model = tiny_model(family, tied=True)
    replace_modules_for_qat(model, "complex_phase_v2", skip_lm_head=False)
    model.save_pretrained(tmp_path / "qat")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "qat")
    assert isinstance(loaded.get_output_embeddings(), QATLinear)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))
    convert_to_inference_mode(loaded, packed)
    loaded.save_pretrained(tmp_path / "inference")
    inference = AutoModelForCausalLM.from_pretrained(tmp_path / "inference")
    assert isinstance(inference.get_output_embeddings(), PackedLinear) is packed
    assert not inference.config.tie_word_embeddings
    assert torch.equal(logits(inference), logits(model))


@EACH_METHOD
@EACH_FAMILY
def test_generation_with_a_cache_works(family, method):
    model = tiny_model(family)
    replace_modules_for_qat(model, method)
    prompt = token_batch(rows=1, length=4)
    out = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    # greedy: each new token is the most likely one after all before it, computed without the cache
    expected = prompt
    for _ in range(4):
        with torch.no_grad():
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, expected)


def test_fused_experts_that_a_linear_swap_cannot_reach_are_named_in_a_warning():
    model = tiny_model("mixtral")
    with pytest.warns(UserWarning, match=r"fused expert weights.*model.layers.0.mlp.experts.gate_up_proj 2x96x32"):
        report = replace_modules_for_qat(model, "complex_phase_v2")
    fused = [name for name, p in model.named_parameters() if p.dim() == 3]
    assert len(fused) == 4
    assert [name for name, _ in report.unreachable] == fused
    assert "not reached" in str(report)
    assert all(fused_name.endswith(("gate_up_proj", "down_proj")) for fused_name in fused)


def test_a_mixture_of_experts_still_trains_and_reloads(tmp_path):
    model = tiny_model("mixtral")
    with pytest.warns(UserWarning, match="fused expert weights"):
        replace_modules_for_qat(model, "complex_phase_v2")
    assert math.isfinite(train_one_step(model))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fused expert weights"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert quantized_names(loaded) == quantized_names(model)
    assert torch.equal(logits(loaded), logits(model))


def test_a_real_trained_model_keeps_its_weights_and_reloads(shared_data, tmp_path):
    path = shared_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(path)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    replace_modules_for_qat(model, METHODS["learned"])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
