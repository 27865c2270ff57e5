"""Replacing linear layers and taking them out again: what changes, what is shared, and which errors change nothing."""

import logging
import re

import pytest
import torch
from tiny_models import logits, tiny_model
from torch import nn

from fairy2i import METHODS, PackedLinear, PhaseScheme, QATLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.convert import DEQUANTIZED_KEY
from fairy2i.schemes import resolve_method

V2 = "complex_phase_v2"
LEARNED = PhaseScheme(granularity="row", scales="learned")
EACH_FORM = pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])


class Block(nn.Module):
    """Plain PyTorch, no transformers: an embedding, two even layers, one odd layer, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 12)
        self.odd = nn.Linear(12, 5)
        self.last = nn.Linear(5 + 1, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10, bias=False)

    def forward(self, ids):
        x = self.odd(self.first(self.embed(ids)))
        return self.lm_head(self.norm(self.last(nn.functional.pad(x, (0, 1)))))


IDS = torch.arange(10).reshape(2, 5)


def quantized_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, QATLinear)]


def assert_error_changes_nothing(model, message, method=V2, **kwargs):
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        replace_modules_for_qat(model, method, **kwargs)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert getattr(getattr(model, "config", None), "quantization_config", None) is None


# What is replaced


def test_even_linear_layers_are_replaced_and_odd_ones_reported_with_the_reason():
    model = Block()
    report = replace_modules_for_qat(model, V2)
    assert quantized_names(model) == ["first", "last", "lm_head"]
    assert [(layer.name, layer.shape, layer.scheme) for layer in report.replaced] == [
        ("first", (12, 8), METHODS[V2]),
        ("last", (8, 6), METHODS[V2]),
        ("lm_head", (10, 8), METHODS[V2]),
    ]
    assert report.skipped == [
        ("odd", (5, 12), "odd size 5x12: features cannot be paired into complex numbers"),
    ]
    assert type(model.embed) is nn.Embedding
    assert type(model.norm) is nn.LayerNorm


@pytest.mark.parametrize("method", ["bitnet", "bitnet_1_58"])
def test_baselines_replace_odd_sizes_too(method):
    model = Block()
    report = replace_modules_for_qat(model, method)
    assert quantized_names(model) == ["first", "odd", "last", "lm_head"]
    assert report.skipped == []
    model(IDS).sum().backward()
    assert model.odd.weight.grad is not None


@pytest.mark.parametrize("method", [*METHODS, LEARNED], ids=str)
def test_parameters_are_shared_and_state_dict_keys_kept(method):
    model = Block()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    replace_modules_for_qat(model, method)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    extra = [name for name in model.state_dict() if name not in keys]
    assert extra == ([f"{name}.scales" for name in quantized_names(model)] if resolve_method(method).learned else [])


def test_the_forward_uses_the_quantized_weight():
    model = Block()
    with torch.no_grad():
        before = model(IDS)
        replace_modules_for_qat(model, V2)
        assert not torch.equal(model(IDS), before)
        for name in quantized_names(model):
            layer = model.get_submodule(name)
            layer.weight.copy_(layer.quantized_weight())
            setattr(model, name, nn.Linear(layer.in_features, layer.out_features, layer.bias is not None))
            model.get_submodule(name).load_state_dict(layer.state_dict())
        plain = model(IDS)
    torch.manual_seed(0)
    again = Block()
    replace_modules_for_qat(again, V2)
    assert torch.equal(again(IDS), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", [V2, LEARNED], ids=str)
def test_the_dtype_of_the_model_is_kept_and_scales_are_float32(method, dtype):
    model = Block().to(dtype)
    replace_modules_for_qat(model, method)
    assert {p.dtype for name, p in model.named_parameters() if not name.endswith("scales")} == {dtype}
    assert model(IDS).dtype == dtype
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if name.endswith("scales"))


@pytest.mark.parametrize("method", [V2, LEARNED], ids=str)
def test_a_model_on_meta_is_replaced_and_filled_later(method):
    with torch.device("meta"):
        model = Block()
    replace_modules_for_qat(model, method)
    assert all(p.is_meta for p in model.parameters())
    torch.manual_seed(0)
    source = Block()
    replace_modules_for_qat(source, method)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(IDS), source(IDS))


@EACH_FORM
def test_a_module_that_is_used_twice_is_replaced_under_both_names(packed):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.append(model[0])
    report = replace_modules_for_qat(model, V2)
    assert isinstance(model[0], QATLinear)
    assert model[2] is model[0]
    assert [layer.name for layer in report.replaced] == ["0", "1"]
    convert_to_inference_mode(model, packed)
    assert type(model[0]) is (PackedLinear if packed else nn.Linear)
    assert model[2] is model[0]


def test_a_subclass_of_linear_is_left_alone_with_the_reason():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4))
    report = replace_modules_for_qat(model, V2)
    assert type(model[1]) is Special
    assert report.skipped == [("1", (4, 4), "Special is its own kind of linear layer")]


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile"])
def test_learned_scales_are_not_taken_for_expert_weights(granularity):
    model = Block()
    replace_modules_for_qat(model, PhaseScheme(granularity=granularity, tile=2, scales="learned"))
    report = replace_modules_for_qat(model, V2)
    assert report.unreachable == []


# Choosing by name


@pytest.mark.parametrize("skip", [["first"], ("f*t",), "first"])
def test_skip_modules_takes_names_and_patterns(skip):
    model = Block()
    report = replace_modules_for_qat(model, V2, skip_modules=skip)
    assert quantized_names(model) == ["last", "lm_head"]
    assert ("first", (12, 8)) in [(name, shape) for name, shape, _ in report.skipped]


def test_a_pattern_matches_the_last_part_of_a_name_or_the_whole():
    model = tiny_model("llama")
    replace_modules_for_qat(model, {"q_proj": V2, "*.layers.1.mlp.*": V2})
    expected = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
    ]
    assert quantized_names(model) == expected


def test_in_a_mapping_the_first_match_counts_and_none_leaves_a_layer():
    model = Block()
    report = replace_modules_for_qat(model, {"last": None, "lm_*": "bitnet", "*": LEARNED})
    assert [(layer.name, layer.scheme) for layer in report.replaced] == [
        ("first", LEARNED),
        ("lm_head", METHODS["bitnet"]),
    ]
    assert ("last", (8, 6), "no pattern of the method asks for it") in report.skipped


def test_a_skip_pattern_that_matches_nothing_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        replace_modules_for_qat(Block(), V2, skip_modules=["lmhead"])
    assert "no linear layer matches 'lmhead'" in caplog.text


# The output head


@pytest.mark.parametrize(
    ("tied", "skip", "quantized"),
    [
        (False, None, True),
        (False, True, False),
        (False, False, True),
        (True, None, False),
        (True, True, False),
        (True, False, True),
    ],
)
def test_skip_lm_head_decides_about_the_head(tied, skip, quantized):
    model = tiny_model("llama", tied)
    report = replace_modules_for_qat(model, V2, skip_lm_head=skip)
    assert isinstance(model.lm_head, QATLinear) is quantized
    assert ("lm_head" in [name for name, _, _ in report.skipped]) is not quantized
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_quantized_tied_head_trains_the_weight_of_the_embedding():
    model = tiny_model("llama", tied=True)
    replace_modules_for_qat(model, V2, skip_lm_head=False)
    embedding = model.model.embed_tokens.weight
    rows = IDS.unique()
    model(IDS, labels=IDS).loss.backward()
    unseen = [row for row in range(len(embedding)) if row not in rows]
    assert embedding.grad[unseen].abs().max() > 0  # only the head reaches tokens that were not in the input


def test_the_head_of_a_plain_module_is_found_by_its_name():
    model = Block()
    replace_modules_for_qat(model, V2, skip_lm_head=True)
    assert quantized_names(model) == ["first", "last"]


def test_the_head_of_a_plain_module_that_shares_the_embedding_is_left_alone():
    model = Block()
    model.lm_head.weight = model.embed.weight
    report = replace_modules_for_qat(model, V2)
    assert type(model.lm_head) is nn.Linear
    assert ("lm_head", (10, 8), "tied to the embedding (skip_lm_head=False quantizes it)") in report.skipped


# Calling again


@pytest.mark.parametrize("method", [V2, LEARNED], ids=str)
def test_a_second_call_changes_nothing(method):
    model = tiny_model("llama")
    first = replace_modules_for_qat(model, method)
    modules, out = [id(module) for module in model.modules()], logits(model)
    second = replace_modules_for_qat(model, method)
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), out)
    assert str(second) == str(first)


def test_a_second_call_with_another_method_leaves_quantized_layers_and_warns(caplog):
    model = Block()
    replace_modules_for_qat(model, {"first": V2})
    with caplog.at_level(logging.WARNING):
        report = replace_modules_for_qat(model, "bitnet")
    assert {layer.name: layer.scheme for layer in report.replaced}["first"] == METHODS[V2]
    assert model.odd.scheme == METHODS["bitnet"]
    assert "first stays complex_phase_v2 as it already is" in caplog.text


# Bad input: an error, and nothing replaced


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_module(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    assert_error_changes_nothing(model, re.escape("the weight of model.layers.1.mlp.up_proj has NaN or infinite"))


def test_a_skipped_weight_may_be_anything():
    model = Block()
    with torch.no_grad():
        model.last.weight.fill_(float("nan"))
    assert len(replace_modules_for_qat(model, V2, skip_modules=["last"]).replaced) == 2


def test_an_unknown_method_is_an_error_that_lists_the_known():
    for method in ("complex_phase_v9", {"*": "complex_phase_v9"}):
        assert_error_changes_nothing(Block(), "Did you mean 'complex_phase_v.'.* bitnet, bitnet_1_58,", method)


def test_a_pattern_of_a_mapping_that_matches_nothing_is_an_error_that_names_it_and_the_layers():
    assert_error_changes_nothing(Block(), r"no linear layer matches 'qproj'.*first, odd", {"qproj": V2, "*": V2})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LayerNorm(4), nn.ReLU()), r"nothing to replace.*no linear layers.*0: LayerNorm, 1: ReLU"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), r"nothing to replace. 0 \(odd size 4x3.*1 \(odd size 5x4"),
        (nn.Linear(4, 4), r"nothing to replace.*is the model itself; pass a module that contains it"),
    ],
    ids=["no linear layers", "all odd", "the model itself"],
)
def test_nothing_to_replace_is_an_error_that_names_what_was_seen(model, message):
    assert_error_changes_nothing(model, message)


def test_everything_skipped_is_an_error_that_says_why():
    assert_error_changes_nothing(Block(), "nothing to replace. first .skip_modules has", skip_modules=["*"])


def test_a_model_quantized_by_another_library_is_an_error_that_names_it():
    model = tiny_model("llama")
    model.is_quantized = True
    model.config.quantization_config = type("Other", (), {"quant_method": "gptq"})()
    with pytest.raises(ValueError, match="already quantized by gptq"):
        replace_modules_for_qat(model, V2)


# The report


def test_the_report_counts_layers_weights_and_true_bits():
    report = replace_modules_for_qat(Block(), V2)
    assert report.quantized_weights == 12 * 8 + 8 * 6 + 10 * 8
    # two bits of code, 8 scales of 32 bits for each of the three layers; "last" is 4 x 3 complex numbers, whose
    # 2 * 2 * 4 rows of three 2-bit codes fill a byte each
    assert report.bits_per_weight == pytest.approx(2 + (3 * 8 * 32 + 16 * 2) / report.quantized_weights, rel=1e-12)
    assert report.total_parameters == sum(p.numel() for p in Block().parameters())


def test_the_report_reads_well():
    model = Block()
    text = repr(replace_modules_for_qat(model, {"first": "bitnet", "*": V2}))
    assert text.splitlines() == [
        "Fairy2i: 3 of 4 linear layers quantized: 1 x bitnet, 2 x complex_phase_v2",
        "  weights  224 at 4.143 bits each, scales counted (56.4% of 397 parameters)",
        "  skipped  odd (5x12): odd size 5x12: features cannot be paired into complex numbers",
    ]


def test_the_report_counts_learned_scales_of_the_layers_once():
    model = Block()
    report = replace_modules_for_qat(model, LEARNED)
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("scales"))
    assert report.bits_per_weight == pytest.approx(2 + (32 * scales + 16 * 2) / report.quantized_weights, rel=1e-12)


# Out again


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [*METHODS, LEARNED], ids=str)
def test_inference_mode_changes_no_bit_of_the_outputs(method, family, dtype, packed):
    model = tiny_model(family, dtype=dtype)
    replace_modules_for_qat(model, method)
    before, quantized = logits(model), quantized_names(model)
    kinds = {name: type(module) for name, module in tiny_model(family).named_modules()}
    if packed:
        kinds |= dict.fromkeys(quantized, PackedLinear)
    assert convert_to_inference_mode(model, packed) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(logits(model), before)


def test_the_weights_of_plain_inference_mode_are_the_dequantized_ones_and_frozen():
    model = Block()
    replace_modules_for_qat(model, V2)
    expected = model.first.quantized_weight()
    model.train()
    convert_to_inference_mode(model, packed=False)
    assert torch.equal(model.first.weight, expected)
    assert not model.first.weight.requires_grad
    assert not model.first.bias.requires_grad
    assert not model.training


def test_a_packed_layer_has_no_parameter_but_a_frozen_bias():
    model = Block()
    replace_modules_for_qat(model, V2)
    model.train()
    convert_to_inference_mode(model)
    assert [(name, p.requires_grad) for name, p in model.first.named_parameters()] == [("bias", False)]
    assert list(model.last.parameters()) == []
    assert not model.training


@pytest.mark.parametrize("first", [True, False])
@EACH_FORM
def test_a_second_conversion_changes_nothing(packed, first):
    for model, run in ((tiny_model("llama"), logits), (Block(), lambda model: model(IDS))):
        replace_modules_for_qat(model, V2)
        convert_to_inference_mode(model, first)
        before, modules = run(model), [id(module) for module in model.modules()]
        convert_to_inference_mode(model, packed)
        assert torch.equal(run(model), before)
        assert [id(module) for module in model.modules()] == modules


@EACH_FORM
@pytest.mark.parametrize("skip", [None, True, False])
def test_a_tied_head_is_untied_when_and_only_when_it_was_quantized(skip, packed):
    model = tiny_model("llama", tied=True)
    replace_modules_for_qat(model, V2, skip_lm_head=skip)
    embedding, before = model.model.embed_tokens.weight.detach().clone(), logits(model)
    convert_to_inference_mode(model, packed)
    untied = skip is False
    assert model.config.tie_word_embeddings is not untied
    assert isinstance(model.lm_head, PackedLinear) is (untied and packed)
    assert (getattr(model.lm_head, "weight", None) is not model.model.embed_tokens.weight) is untied
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(logits(model), before)


def test_converting_a_model_that_never_was_qat_is_an_error():
    with pytest.raises(ValueError, match="no QATLinear layers; call replace_modules_for_qat"):
        convert_to_inference_mode(tiny_model("llama"))


def test_a_model_on_meta_is_packed_and_filled_later():
    with torch.device("meta"):
        model = Block()
    replace_modules_for_qat(model, LEARNED)
    convert_to_inference_mode(model)
    torch.manual_seed(0)
    source = Block()
    replace_modules_for_qat(source, LEARNED)
    before = source(IDS)
    model.load_state_dict(convert_to_inference_mode(source).state_dict(), assign=True)
    assert torch.equal(model(IDS), before)


def test_packing_a_model_again_is_an_error_that_names_the_layer():
    for model, name in ((Block(), "first"), (tiny_model("llama"), "model.layers.0.self_attn.q_proj")):
        replace_modules_for_qat(model, V2)
        convert_to_inference_mode(model)
        before = [id(module) for module in model.modules()]
        with pytest.raises(ValueError, match=f"^{re.escape(name)} is packed already"):
            replace_modules_for_qat(model, V2)
        assert [id(module) for module in model.modules()] == before


def test_quantizing_dequantized_weights_again_is_an_error():
    model = tiny_model("llama")
    replace_modules_for_qat(model, V2)
    convert_to_inference_mode(model, packed=False)
    assert getattr(model.config, DEQUANTIZED_KEY) == V2
    assert_error_changes_nothing(model, r"already quantized values \(complex_phase_v2\).*Load the QAT checkpoint")


def test_quantizing_a_dequantized_plain_module_again_is_an_error():
    model = Block()
    replace_modules_for_qat(model, V2)
    convert_to_inference_mode(model, packed=False)
    assert_error_changes_nothing(model, "already quantized values")
