"""A plain checkpoint that becomes a QAT or a packed model while it loads, and training from there."""

import copy

import pytest
import torch
from checkpoints import LEARNED, MIXED, V2, packed_names, read_config, saved_packed, saved_qat, schemes
from safetensors.torch import load_file
from tiny_models import logits, tiny_model, train
from transformers import AutoModelForCausalLM

from fairy2i import Fairy2iConfig, PackedLinear, QATLinear, convert_to_inference_mode, replace_modules_for_qat

LR = 2e-3
EACH_METHOD = pytest.mark.parametrize(
    "method", [V2, "bitnet", LEARNED, MIXED], ids=["v2", "bitnet", "learned", "mixed"]
)


def offloading(part):
    """Return a device map that has one part of the model on disk and the others in memory."""
    parts = [*(f"model.{name}" for name in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")), "lm_head"]
    return {name: "disk" if name == f"model.{part}" else "cpu" for name in parts}


# QAT


@EACH_METHOD
def test_a_plain_checkpoint_becomes_qat_while_it_loads(method, tmp_path):
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Fairy2iConfig(method))
    replace_modules_for_qat(plain, method)
    assert schemes(loaded) == schemes(plain)
    assert torch.equal(logits(loaded), logits(plain))


def test_what_was_loaded_on_the_fly_saves_and_reloads(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    config = Fairy2iConfig(LEARNED, skip_lm_head=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "qat")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "qat")
    assert schemes(loaded) == schemes(model)
    assert "lm_head" not in schemes(loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_a_tied_head_is_left_alone_on_the_fly(tmp_path):
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Fairy2iConfig(V2))
    assert "lm_head" not in schemes(loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("mode", ["qat", "packed"])
def test_weights_that_are_not_finite_are_an_error_that_names_the_module(mode, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight of model.layers.1.mlp.up_proj has NaN or infinite"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Fairy2iConfig(V2, mode=mode))


# Packed


@EACH_METHOD
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_checkpoint_is_packed_while_it_loads(family, method, tmp_path):
    plain = tiny_model(family)
    plain.save_pretrained(tmp_path / "plain")
    method = V2 if family == "gpt2" and method is MIXED else method
    asked = Fairy2iConfig(method, mode="packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=asked)
    replace_modules_for_qat(plain, method)
    expected, wanted = logits(plain), list(schemes(plain))
    assert not any(isinstance(module, QATLinear) for module in loaded.modules())
    assert sorted(packed_names(loaded)) == sorted(wanted)
    assert loaded.config.quantization_config.mode == "packed"
    assert not loaded.hf_quantizer.is_qat_trainable
    assert not any(p.requires_grad for m in loaded.modules() if isinstance(m, PackedLinear) for p in m.parameters())
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "packed")
    convert_to_inference_mode(plain).save_pretrained(tmp_path / "by hand")
    assert read_config(tmp_path / "packed") == read_config(tmp_path / "by hand")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("packed", "by hand")]
    assert files[0] == files[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), expected)


@pytest.mark.parametrize("skip", [None, True, False])
def test_a_tied_head_is_packed_only_if_asked_for_and_is_then_untied(skip, tmp_path):
    plain = tiny_model("llama", tied=True)
    plain.save_pretrained(tmp_path / "plain")
    asked = Fairy2iConfig(V2, skip_lm_head=skip, mode="packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=asked)
    assert isinstance(loaded.lm_head, PackedLinear) is (skip is False)
    assert loaded.config.tie_word_embeddings is (skip is not False)
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_packed_in_the_dtype_that_is_asked_for(dtype, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    asked = Fairy2iConfig(V2, mode="packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    replace_modules_for_qat(plain, V2)
    assert loaded.lm_head.scales.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(plain))


# Offloaded and dispatched models


@pytest.mark.parametrize(
    "config",
    [Fairy2iConfig(V2, mode="packed"), Fairy2iConfig(LEARNED), Fairy2iConfig(LEARNED, mode="packed")],
    ids=["packed", "learned", "both"],
)
def test_what_needs_a_weight_that_is_offloaded_is_an_error_that_names_it(config, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight of model.layers.1.self_attn.q_proj is offloaded and cannot be quant"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=offloading("layers.1"))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dequantized"])
def test_converting_an_offloaded_model_by_hand_is_the_same_error_and_changes_nothing(packed, tmp_path):
    model = saved_qat(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=offloading("layers.1"))
    with pytest.raises(ValueError, match=r"weight of model.layers.1.self_attn.q_proj is offloaded and cannot be quant"):
        convert_to_inference_mode(loaded, packed=packed)
    assert torch.equal(logits(loaded), logits(model))


def test_an_offloaded_plain_model_becomes_qat_by_hand_unless_scales_are_learned(tmp_path):
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=offloading("layers.1"))
    with pytest.raises(ValueError, match=r"weight of model.layers.1.self_attn.q_proj is offloaded and cannot be quant"):
        replace_modules_for_qat(loaded, LEARNED)
    for model in (plain, loaded):
        replace_modules_for_qat(model, V2)
    assert isinstance(loaded.model.layers[1].mlp.up_proj, QATLinear)
    assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize("by_hand", [False, True], ids=["on the fly", "by hand"])
def test_layers_that_are_packed_keep_the_hooks_that_dispatch_them(by_hand, tmp_path):
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    asked = Fairy2iConfig(V2, mode="qat" if by_hand else "packed")
    places = offloading("norm")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked, device_map=places)
    if by_hand:
        convert_to_inference_mode(loaded)
    packed = packed_names(loaded)
    assert len(packed) == 15
    assert all(loaded.get_submodule(name)._hf_hook.execution_device == "cpu" for name in packed)
    replace_modules_for_qat(plain, V2)
    assert torch.equal(logits(loaded), logits(plain))


# The config that is handed over


def test_the_config_that_was_handed_over_is_not_changed(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = Fairy2iConfig(V2, mode="packed")
    before = copy.deepcopy(config.to_dict())
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert config.to_dict() == before


@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
def test_the_config_of_a_quantized_checkpoint_wins_over_one_that_is_handed_over(save, tmp_path):
    model = save(tmp_path)
    other = Fairy2iConfig("bitnet", mode="packed")
    with pytest.warns(UserWarning, match="from the model will be used"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=other)
    assert loaded.config.quantization_config.mode == read_config(tmp_path)["quantization_config"]["mode"]
    assert torch.equal(logits(loaded), logits(model))


# Training from there


@EACH_METHOD
def test_training_goes_on_from_a_qat_checkpoint_as_if_it_had_not_stopped(method, tmp_path):
    model = tiny_model("llama")
    replace_modules_for_qat(model, method)
    first = train(model, 8, LR)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    losses, expected = train(loaded, 8, LR), train(model, 8, LR)
    assert losses == expected
    assert min(losses) < min(first)
    state, wanted = loaded.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_released_checkpoint_of_bfloat16_master_weights_trains_and_is_packed(dtype, tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "released")
    assert "quantization_config" not in read_config(tmp_path / "released")
    assert {t.dtype for t in load_file(tmp_path / "released" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "released", quantization_config=Fairy2iConfig(V2), dtype=dtype
    )
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "released", dtype=dtype)
    replace_modules_for_qat(plain, V2)
    assert torch.equal(logits(loaded), logits(plain))
    losses = train(loaded, 30, LR)
    assert losses[-1] < 0.9 * losses[0]
    expected = logits(loaded)
    convert_to_inference_mode(loaded).save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), expected)
