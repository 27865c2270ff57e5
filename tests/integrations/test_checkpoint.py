"""What a checkpoint holds against what the model expects: damage is an error that names it, other tasks load."""

import json
import re

import pytest
import torch
from checkpoints import LEARNED, MIXED, V2, edit_config, edit_tensors, read_config, saved_packed, saved_qat
from safetensors.torch import load_file
from tiny_models import logits, token_batch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fairy2i import METHODS, PackedLinear, QATLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.inspection import quantized_layers

BROKEN = "model.layers.1.self_attn.q_proj"

# Damaged QAT checkpoints


def test_missing_learned_scales_are_an_error_that_names_the_tensor_and_its_shape(tmp_path):
    saved_qat(tmp_path, LEARNED)
    name = "model.layers.1.mlp.up_proj.scales"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=re.escape(f"has no {name}, expected torch.float32 (2, 2, 2, 24)")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("ignore", [False, True], ids=["strict", "mismatches ignored"])
def test_learned_scales_of_a_wrong_shape_are_an_error_that_names_file_tensor_and_what_was_expected(ignore, tmp_path):
    saved_qat(tmp_path, LEARNED)
    name = "model.layers.1.mlp.up_proj.scales"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    message = f"model.safetensors: {name} is F32 (1, 2, 2, 24), expected F32 (2, 2, 2, 24)"
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


def test_a_layer_of_the_config_that_the_model_lacks_is_an_error(tmp_path):
    saved_qat(tmp_path)
    entries = [
        {"scheme": METHODS["bitnet"].to_dict(), "modules": ["model.layers.7.mlp.up_proj"]},
        {"scheme": METHODS[V2].to_dict(), "modules": ["*"]},
    ]
    edit_config(tmp_path, method=entries)
    with pytest.raises(ValueError, match=r"no linear layer matches 'model.layers.7.mlp.up_proj'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_learned_scales_that_are_not_finite_are_an_error_that_names_file_and_tensor(value, tmp_path):
    saved_qat(tmp_path, LEARNED)
    edit_tensors(tmp_path, lambda tensors: tensors[f"{BROKEN}.scales"][1, 0, 1].fill_(value))
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors: {BROKEN}.scales has NaN or infinite entries")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_master_weight_is_an_error_that_names_it(tmp_path):
    saved_qat(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{BROKEN}.weight"))
    with pytest.raises(ValueError, match=re.escape(f"has no {BROKEN}.weight, expected torch.float32 (32, 32)")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("skip", [None, False])
def test_a_tied_head_is_not_missing(skip, tmp_path):
    model = saved_qat(tmp_path, tied=True, skip_lm_head=skip)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# Tensors without a place


def test_codes_of_a_layer_that_the_model_lacks_are_an_error_that_names_file_and_tensor(tmp_path):
    saved_packed(tmp_path)
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    message = (
        "model.safetensors: model.layers.1.mlp.down_proj.codes has no place, the model has no packed layer model.l"
    )
    for model_class in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=re.escape(message)):
            model_class.from_pretrained(tmp_path)


def test_learned_scales_of_a_layer_that_the_model_lacks_are_an_error_that_names_file_and_tensor(tmp_path):
    saved_qat(tmp_path, LEARNED)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.2.x.scales": torch.ones(2)}))
    message = "model.layers.2.x.scales has no place, the model has no layer with learned scales model.layers.2.x"
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_codes_of_a_layer_that_the_config_skips_are_an_error(tmp_path):
    saved_packed(tmp_path)
    edit_config(tmp_path, skip_modules=[BROKEN])
    with pytest.raises(
        ValueError, match=re.escape(f"{BROKEN}.codes has no place, the model has no packed layer {BROKEN}")
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_codes_in_a_checkpoint_that_calls_itself_qat_are_an_error(tmp_path):
    saved_packed(tmp_path)
    edit_config(tmp_path, mode="qat")
    with pytest.raises(ValueError, match=r"lm_head.scales has no place, the model has no layer with learned scales"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_file_that_is_named_is_the_shard_that_has_the_tensor(tmp_path):
    saved_packed(tmp_path, max_shard_size="8KB")
    edit_config(tmp_path, skip_modules=[BROKEN])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    with pytest.raises(ValueError, match=re.escape(f"{index[f'{BROKEN}.codes']}: {BROKEN}.codes has no place")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
def test_any_other_tensor_without_a_place_stays_the_business_of_transformers(save, tmp_path):
    model = save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.9.extra.weight": torch.ones(2)}))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.9.extra.weight"}
    assert torch.equal(logits(loaded), logits(model))


# Other tasks


@pytest.mark.parametrize("method", [V2, LEARNED, MIXED], ids=["v2", "learned", "mixed"])
@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
def test_the_backbone_loads_from_the_checkpoint_of_a_causal_model_and_back(save, method, tmp_path):
    model = save(tmp_path / "causal", method=method)
    backbone = AutoModel.from_pretrained(tmp_path / "causal")
    with torch.no_grad():
        expected = model.model(token_batch()).last_hidden_state
        assert torch.equal(backbone(token_batch()).last_hidden_state, expected)
        backbone.save_pretrained(tmp_path / "backbone")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
        assert torch.equal(again.model(token_batch()).last_hidden_state, expected)
    assert type(again.lm_head) is nn.Linear  # new: the checkpoint has none


@pytest.mark.parametrize("method", [V2, LEARNED, MIXED], ids=["v2", "learned", "mixed"])
@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
def test_the_new_head_of_another_task_is_plain_and_the_rest_is_what_it_was(save, method, tmp_path):
    model = save(tmp_path / "causal", method=method)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=4)
    assert type(classifier.score) is nn.Linear
    assert classifier.score.weight.requires_grad
    assert classifier.score.weight.std() > 0
    layers = quantized_layers(model)
    assert {name for name in quantized_layers(classifier)} == layers.keys() - {"lm_head"}
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(again.score) is nn.Linear
    with torch.no_grad():
        ids = token_batch()
        hidden = model.model(ids).last_hidden_state
        assert torch.equal(classifier.model(ids).last_hidden_state, hidden)
        assert torch.equal(again(ids).logits, classifier(ids).logits)


def test_a_head_that_the_checkpoint_quantizes_is_quantized_in_its_own_class(tmp_path):
    saved_qat(tmp_path / "causal")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=4)
    assert type(plain.score) is nn.Linear
    replace_modules_for_qat(plain, "bitnet")
    assert isinstance(plain.score, QATLinear)
    convert_to_inference_mode(plain).save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert isinstance(again.score, PackedLinear)
    with torch.no_grad():
        assert torch.equal(again(token_batch()).logits, plain(token_batch()).logits)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "qat"])
def test_a_model_whose_tensors_have_other_names_in_its_files_loads_with_head_and_without(packed, tmp_path):
    torch.manual_seed(1)
    text = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **vision)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=1, image_seq_length=4)
    model = LlavaForConditionalGeneration(config).eval()
    replace_modules_for_qat(model, {"lm_head": "bitnet", "*": LEARNED})
    if packed:
        convert_to_inference_mode(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.scales" in stored
    assert "model.language_model.layers.0.mlp.up_proj.scales" in model.state_dict()
    with torch.no_grad():
        assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(tmp_path)), logits(model))
        hidden = AutoModel.from_pretrained(tmp_path)(token_batch()).last_hidden_state
        assert torch.equal(hidden, model.model(token_batch()).last_hidden_state)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("language_model.model.layers.0.mlp.up_proj.scales"))
    with pytest.raises(ValueError, match=r"has no model.language_model.layers.0.mlp.up_proj.scales"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


# Damaged packed checkpoints


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("codes", "torch.uint8 (2, 2, 16, 4)"),
        ("scales", "torch.float32 (2, 2, 2)"),
        ("bias", "torch.float32 (32,)"),
    ],
)
def test_a_missing_tensor_is_an_error_that_names_it_and_what_was_expected(key, expected, tmp_path):
    saved_packed(tmp_path, "qwen2")
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{BROKEN}.{key}"))
    with pytest.raises(ValueError, match=re.escape(f"the checkpoint has no {BROKEN}.{key}, expected {expected}")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("codes", lambda t: t[:1].clone(), "is U8 (1, 2, 16, 4), expected U8 (2, 2, 16, 4)"),
        ("codes", lambda t: t[..., :3].clone(), "is U8 (2, 2, 16, 3), expected U8 (2, 2, 16, 4)"),
        ("codes", lambda t: t.int(), "is I32 (2, 2, 16, 4), expected U8 (2, 2, 16, 4)"),
        ("codes", lambda t: t.float(), "is F32 (2, 2, 16, 4), expected U8 (2, 2, 16, 4)"),
        ("scales", lambda t: t[:1].clone(), "is F32 (1, 2, 2), expected F32 (2, 2, 2)"),
        ("scales", lambda t: t.half(), "is F16 (2, 2, 2), expected F32 (2, 2, 2)"),
        ("bias", lambda t: t[:4].clone(), "is F32 (4,), expected F32 (32,)"),
    ],
)
@pytest.mark.parametrize("ignore", [False, True], ids=["strict", "mismatches ignored"])
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, AutoModel], ids=["causal", "backbone"])
def test_a_wrong_shape_or_dtype_is_an_error_that_names_file_tensor_and_what_was_expected(
    model_class, ignore, key, change, message, tmp_path
):
    saved_packed(tmp_path, "qwen2")
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"{BROKEN}.{key}": change(tensors[f"{BROKEN}.{key}"])}))
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors: {BROKEN}.{key} {message}")):
        model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_an_error_that_names_the_tensor(value, tmp_path):
    saved_packed(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[f"{BROKEN}.scales"][1, 0, 1].fill_(value))
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors: {BROKEN}.scales has NaN or infinite entries")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("kept", [0.9, 0.02], ids=["data", "header"])
@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
def test_a_truncated_file_is_an_error_that_names_it(save, kept, sharded, tmp_path):
    if sharded:
        save(tmp_path).save_pretrained(tmp_path, max_shard_size="8KB")
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
    else:
        save(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"{file.name} is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
