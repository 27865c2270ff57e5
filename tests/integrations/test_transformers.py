"""transformers: what config.json says, what from_pretrained reads back, and training around it."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from checkpoints import LEARNED, MIXED, V2, edit_config, packed_names, read_config, saved_packed, saved_qat, schemes
from safetensors.torch import load_file
from tiny_models import logits, tiny_model, token_batch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fairy2i.integrations.transformers as integration
from fairy2i import (
    METHODS,
    Fairy2iConfig,
    PackedLinear,
    PhaseScheme,
    QATLinear,
    convert_to_inference_mode,
    replace_modules_for_qat,
)

# What is written


def test_config_json_carries_the_documented_fields(tmp_path):
    saved_qat(tmp_path, skip_modules=["lm_head"])
    assert read_config(tmp_path)["quantization_config"] == {
        "quant_method": "fairy2i",
        "format_version": 1,
        "mode": "qat",
        "method": [{"scheme": METHODS[V2].to_dict(), "modules": ["*"]}],
        "skip_lm_head": False,
        "skip_modules": ["lm_head"],
    }


def test_the_weights_beside_it_are_the_master_weights_under_their_plain_names(tmp_path):
    plain = tiny_model("llama").state_dict()
    saved_qat(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sorted(tensors) == sorted(plain)
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)


def test_the_checkpoint_without_its_quantization_config_is_the_plain_model(tmp_path):
    saved_qat(tmp_path)
    config = read_config(tmp_path)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(tiny_model("llama")))


def test_a_replaced_model_says_so_until_it_is_converted(tmp_path):
    model = tiny_model("llama")
    replace_modules_for_qat(model, V2)
    assert model.is_quantized
    assert model.quantization_method == "fairy2i"
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()
    convert_to_inference_mode(model, packed=False)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in read_config(tmp_path)
    assert read_config(tmp_path)["fairy2i_dequantized"] == V2


# What is read back


@pytest.mark.parametrize("method", [*METHODS, LEARNED], ids=str)
def test_every_method_reloads_as_it_was_saved(method, tmp_path):
    model = saved_qat(tmp_path, method)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert schemes(loaded) == schemes(model)
    assert torch.equal(logits(loaded), logits(model))
    assert all(p.requires_grad for p in loaded.parameters())


def test_mixed_precision_reloads_with_the_scheme_of_each_layer(tmp_path):
    model = saved_qat(tmp_path, MIXED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(set(schemes(model).values())) == 3
    assert schemes(loaded) == schemes(model)
    assert "model.layers.1.mlp.down_proj" not in schemes(loaded)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("skip", [None, True, False])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_reloads_as_it_was_saved(tied, skip, tmp_path):
    model = saved_qat(tmp_path, tied=tied, skip_lm_head=skip)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, QATLinear) is isinstance(model.lm_head, QATLinear)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(logits(loaded), logits(model))


def test_a_reloaded_checkpoint_saves_the_same_checkpoint(tmp_path):
    saved_qat(tmp_path / "one", MIXED)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert read_config(tmp_path / "two") == read_config(tmp_path / "one")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert sorted(one) == sorted(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True], ids=["saved narrow", "loaded narrow"])
def test_learned_scales_stay_float32_and_exact_in_narrow_checkpoints(cast, dtype, tmp_path):
    model = saved_qat(tmp_path, LEARNED, dtype=torch.float32 if cast else dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert cast or torch.equal(logits(loaded), logits(model))
    model.to(dtype)
    for name in schemes(model):
        layer, expected = loaded.get_submodule(name), model.get_submodule(name)
        assert layer.weight.dtype == dtype
        assert layer.scales.dtype == torch.float32
        assert torch.equal(layer.scales, expected.scales)
        assert torch.equal(layer.quantized_weight(), expected.quantized_weight())


def test_a_sharded_checkpoint_reloads(tmp_path):
    model = tiny_model("llama")
    replace_modules_for_qat(model, LEARNED)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# Fairy2iConfig


@pytest.mark.parametrize("method", [V2, LEARNED, MIXED], ids=["name", "scheme", "mapping"])
def test_the_config_survives_json(method):
    config = Fairy2iConfig(method, skip_lm_head=True, skip_modules=["a", "b*"])
    back = Fairy2iConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back.to_dict() == config.to_dict()
    assert list(back.method.items()) == list(config.method.items())  # the order decides


def test_the_order_of_a_mapping_survives_even_where_schemes_alternate():
    method = {"a": V2, "b": "bitnet", "c": V2, "*": None}
    entries = Fairy2iConfig(method).to_dict()["method"]
    assert [entry["modules"] for entry in entries] == [["a"], ["b"], ["c"], ["*"]]
    assert list(Fairy2iConfig(entries).method) == list(method)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"format_version": 2},
            r"format version 2, this version reads 1; upgrade with: pip install -U fairy2i",
        ),
        ({"mode": "paked"}, r"unknown mode 'paked'.*Known modes: qat"),
        ({"group_size": 128}, r"no field group_size"),
        ({"method": "complex_phase_v22"}, r"unknown method 'complex_phase_v22'. Did you mean"),
        ({"method": [{"scheme": {"kind": "vector"}, "modules": ["*"]}]}, r"unknown scheme kind 'vector'"),
        ({"method": [{"scheme": {"kind": "phase", "bits": 2}, "modules": ["*"]}]}, r"no field bits"),
    ],
)
def test_an_unknown_version_mode_field_or_scheme_is_an_error(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Fairy2iConfig(**fields)
    saved_qat(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_reads_the_config_as_ours(tmp_path):
    saved_qat(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["quant_method"] == "fairy2i"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["fairy2i"] is Fairy2iConfig


# Packed checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("method", [V2, "bitnet", "bitnet_1_58", LEARNED], ids=str)
def test_a_packed_model_reloads_bit_for_bit(method, family, dtype, tmp_path):
    model = saved_packed(tmp_path, family, method, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed_names(loaded) == list(schemes(model))
    assert torch.equal(logits(loaded), logits(model))


def test_mixed_precision_packs_with_the_scheme_of_each_layer(tmp_path):
    model = saved_packed(tmp_path, method=MIXED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: loaded.get_submodule(name).scheme for name in packed_names(loaded)} == schemes(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("skip", [None, True, False])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_packed_head_is_never_tied_and_any_other_stays_as_it_was(tied, skip, tmp_path):
    model = saved_packed(tmp_path, tied=tied, skip=skip)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    packed = isinstance(model.lm_head, QATLinear)
    assert isinstance(loaded.lm_head, PackedLinear) is packed
    assert read_config(tmp_path)["tie_word_embeddings"] is (tied and not packed)
    if not packed:
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_a_sharded_packed_checkpoint_reloads(tmp_path):
    model = saved_packed(tmp_path, method=LEARNED, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_config_of_a_packed_checkpoint_differs_from_that_of_its_qat_checkpoint_in_the_mode_alone(tmp_path):
    model = saved_packed(tmp_path / "packed", method=MIXED)
    model.save_pretrained(tmp_path / "qat")
    packed, qat = (read_config(tmp_path / name)["quantization_config"] for name in ("packed", "qat"))
    assert packed == {**qat, "mode": "packed"}
    assert qat["mode"] == "qat"


@pytest.mark.parametrize("method", [*METHODS, LEARNED, PhaseScheme(granularity="tile", tile=5)], ids=str)
def test_the_file_holds_the_promised_bits_and_no_weight_of_a_packed_layer(method, tmp_path):
    model = tiny_model("qwen2")
    report = replace_modules_for_qat(model, method)
    convert_to_inference_mode(model).save_pretrained(tmp_path)
    with (tmp_path / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    size = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    names = [layer.name for layer in report.replaced]
    assert not any(f"{name}.weight" in size for name in names)
    held = sum(size[f"{name}.codes"] + size[f"{name}.scales"] for name in names)
    assert 8 * held / report.quantized_weights == pytest.approx(report.bits_per_weight, rel=1e-12)
    assert {header[f"{name}.codes"]["dtype"] for name in names} == {"U8"}
    assert {header[f"{name}.scales"]["dtype"] for name in names} == {"F32"}


def test_a_reloaded_packed_checkpoint_saves_the_same_checkpoint(tmp_path):
    saved_packed(tmp_path / "one", "qwen2", MIXED)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert read_config(tmp_path / "two") == read_config(tmp_path / "one")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_of_a_packed_checkpoint_stay_float32_when_it_is_loaded_narrow(dtype, tmp_path):
    model = saved_packed(tmp_path, "qwen2", LEARNED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name in packed_names(loaded):
        layer = loaded.get_submodule(name)
        assert layer.scales.dtype == torch.float32
        assert torch.equal(layer.dense_weight(), model.get_submodule(name).quantized_weight())
        assert layer.bias is None or layer.bias.dtype == dtype
    assert logits(loaded).dtype == dtype


def test_biases_of_packed_layers_are_frozen_after_loading_as_before_saving(tmp_path):
    saved_packed(tmp_path, "qwen2")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = [loaded.get_submodule(name) for name in packed_names(loaded)]
    assert sum(layer.bias is not None for layer in layers) == 6
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    assert loaded.model.embed_tokens.weight.requires_grad


def test_a_packed_model_is_known_as_such_and_refuses_qat(tmp_path):
    saved_packed(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.is_quantized
    assert loaded.config.quantization_config.mode == "packed"
    assert loaded.hf_quantizer.is_trainable
    assert not loaded.hf_quantizer.is_qat_trainable
    assert loaded.hf_quantizer.is_serializable()
    before = [id(module) for module in loaded.modules()]
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is packed already; train from the QAT"):
        replace_modules_for_qat(loaded, V2)
    assert [id(module) for module in loaded.modules()] == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_model_generates_the_tokens_of_its_qat_model(family, tmp_path):
    model = saved_packed(tmp_path, family)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = token_batch(rows=2, length=4)
    out = loaded.generate(prompt, **options)
    assert out.shape == (2, 12)
    assert torch.equal(out, model.generate(prompt, **options))


def test_a_model_that_was_converted_inside_a_larger_module_saves_what_it_is(tmp_path):
    whole = nn.Module()
    whole.inner = tiny_model("llama")
    replace_modules_for_qat(whole, {"lm_head": None, "*.layers.0.*": "bitnet", "*": V2})
    expected, before = schemes(whole.inner), logits(whole.inner)
    convert_to_inference_mode(whole.inner).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: loaded.get_submodule(name).scheme for name in packed_names(loaded)} == expected
    assert torch.equal(logits(loaded), before)


# Registration


def test_importing_again_is_harmless():
    try:
        importlib.reload(integration)
        assert AUTO_QUANTIZER_MAPPING["fairy2i"].__name__ == "Fairy2iQuantizer"
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["fairy2i"].__name__ == "Fairy2iConfig"
    finally:  # the registered classes are those of the first import: put them back beside the functions that use them
        integration.Fairy2iConfig = AUTO_QUANTIZATION_CONFIG_MAPPING["fairy2i"]
        integration.Fairy2iQuantizer = AUTO_QUANTIZER_MAPPING["fairy2i"]


# Training around it


def test_gradient_checkpointing_of_a_model_changes_no_bit():
    results = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        replace_modules_for_qat(model, LEARNED)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(token_batch(), labels=token_batch()).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_trains_a_model_with_float32_master_weights():
    model = tiny_model("llama").train()
    replace_modules_for_qat(model, LEARNED)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(token_batch(), labels=token_batch())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_saving_in_fewer_parts_leaves_no_parts_of_before(tmp_path):
    model = tiny_model("llama")
    replace_modules_for_qat(model, "complex_phase_v2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


KILLED_WHILE_SAVING = """
import sys, time
import safetensors.torch, transformers.modeling_utils
from fairy2i import convert_to_inference_mode, replace_modules_for_qat
from transformers import AutoModelForCausalLM

def half(tensors, filename, metadata=None):
    whole = safetensors.torch.save(tensors, metadata)
    with open(filename, "wb") as file:
        file.write(whole[: len(whole) // 2])
    print("half", flush=True)
    time.sleep(60)

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
replace_modules_for_qat(model, "complex_phase_v2")
transformers.modeling_utils.safe_save_file = half
convert_to_inference_mode(model).save_pretrained(sys.argv[2])
"""


def test_kill_9_while_save_pretrained_writes_leaves_what_was_there(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=Fairy2iConfig("complex_phase_v1", mode="packed")
    )
    packed.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "plain"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "half\n"
        run.kill()
    visible = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert visible == before
    packed.save_pretrained(tmp_path / "out")  # cleans up what the killed run left
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
