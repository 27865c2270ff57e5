"""Decoder layers that take a token as a whole: the numbers of the way of transformers, and who must go that way."""

import copy
import os
import pickle

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, token_batch
from torch import nn

from fairy2i import PhaseScheme, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.decoding import fuse_decoder_layers
from fairy2i.ops import cpu
from fairy2i.packed import use_backend

pytestmark = pytest.mark.skipif(cpu.why_off() is not None and not os.environ.get("CI"), reason=str(cpu.why_off()))
FAMILIES = ("llama", "mistral", "qwen2")  # qwen2 has biases
SCHEME = PhaseScheme(stages=2, granularity="row")


def packed_model(family="llama", scheme=SCHEME, backend="cpu_exact", **more):
    """A packed model in which every bias and norm says something."""
    model = tiny_model(family, **more)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else nn.init.normal_(parameter)
    replace_modules_for_qat(model, scheme)
    return use_backend(convert_to_inference_mode(model).requires_grad_(False), backend)


@pytest.fixture
def fused_calls(monkeypatch):
    """Count the tokens that go through the fused kernels."""
    calls = []
    real = cpu.decoder_out
    monkeypatch.setattr(cpu, "decoder_out", lambda *args: (calls.append(args[-1].shape[0]), real(*args))[1])
    return calls


def decode(model, rows=1, steps=5, **more):
    """Logits of tokens one by one, behind a prompt."""
    with torch.no_grad():
        out = model(token_batch(rows, 4), use_cache=True)
        found = []
        for step in range(steps):
            ids = token_batch(rows, 1, seed=step)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True, **more)
            found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", list(cpu.MODES))
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_are_those_of_the_layers_one_by_one(family, backend, rows, fused_calls):
    model = packed_model(family, backend=backend)
    fused = decode(model, rows)
    assert fused_calls == [rows] * 10  # 2 layers, 5 tokens
    assert fuse_decoder_layers(model, False) == 0
    plain = decode(model, rows)
    assert len(fused_calls) == 10
    if backend == "cpu_exact":
        torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-5 * float(plain.abs().max()))
    else:  # a rounding of float32 may move an activation by a step of 8 bits
        assert (fused - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("scheme", [PhaseScheme(stages=1), PhaseScheme(stages=3, granularity="row", rotation=16)])
def test_other_schemes_and_heads_of_their_own_size(scheme, fused_calls):
    model = packed_model(scheme=scheme, head_dim=6, num_key_value_heads=4, hidden_size=48)
    fused = decode(model)
    fuse_decoder_layers(model, False)
    torch.testing.assert_close(fused, decode(model), rtol=2e-5, atol=2e-5)
    assert len(fused_calls) == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_the_layers_one_by_one(dtype, fused_calls):
    model = packed_model(dtype=dtype)
    exact = packed_model()
    exact.load_state_dict(model.state_dict())
    fuse_decoder_layers(exact, False)
    expected, fused = decode(exact), decode(model)
    assert len(fused_calls) == 10
    fuse_decoder_layers(model, False)
    plain = decode(model)
    assert fused.dtype == plain.dtype == dtype
    assert (fused.float() - expected).norm() <= 1.1 * (plain.float() - expected).norm()


def test_generate_gives_the_same_tokens_greedy_and_by_beams(fused_calls):
    model = packed_model()
    prompt = token_batch(1, 5)
    ways = ({"do_sample": False}, {"num_beams": 3})
    fused = [model.generate(prompt, max_new_tokens=12, **way) for way in ways]
    assert len(fused_calls) > 20
    fuse_decoder_layers(model, False)
    for way, tokens in zip(ways, fused, strict=True):
        assert torch.equal(model.generate(prompt, max_new_tokens=12, **way), tokens)


def test_hidden_states_can_be_looked_at():
    model = packed_model()
    ids = token_batch(1, 1)
    with torch.no_grad():
        fused = model(ids, output_hidden_states=True).hidden_states
        fuse_decoder_layers(model, False)
        plain = model(ids, output_hidden_states=True).hidden_states
    assert len(fused) == len(plain) == 3
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_what_is_no_single_token_goes_the_other_way(fused_calls):
    model = packed_model()
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[0, :3] = 0
    with torch.no_grad():
        model(token_batch(1, 2))  # two tokens
        model(token_batch(8, 1))  # many sequences
        cache = model(token_batch(2, 6), attention_mask=padded[:, :6]).past_key_values
        model(token_batch(2, 1), attention_mask=padded, past_key_values=cache)  # padding
        with torch.autocast("cpu", torch.bfloat16):
            model(token_batch(1, 1))
    with torch.enable_grad():
        model(token_batch(1, 1))
    assert fused_calls == []
    with torch.no_grad():
        model(token_batch(1, 1))
        assert len(fused_calls) == 2
        eager = packed_model(attn_implementation="eager")
        assert eager(token_batch(1, 1), output_attentions=True).attentions[0] is not None
        model.train()(token_batch(1, 1))
    assert len(fused_calls) == 2


def test_layers_that_changed_are_not_mistaken_for_what_they_were(fused_calls):
    model = packed_model("qwen2")
    other = packed_model("qwen2")
    ids = token_batch(1, 1)
    first, second = model.model.layers

    def check(fused_layers):
        before = len(fused_calls)
        with torch.no_grad():
            fused = model(ids).logits
            assert len(fused_calls) - before == fused_layers
            fuse_decoder_layers(model, False)
            torch.testing.assert_close(fused, model(ids).logits, rtol=2e-5, atol=2e-5)
            fuse_decoder_layers(model)
        return fused

    start = check(2)
    first.input_layernorm.weight.data.mul_(1.5)
    first.input_layernorm.weight.mul_(1.0)  # .data hides a change from everyone; this does not
    second.self_attn.q_proj.bias.add_(1)
    assert not torch.equal(check(2), start)
    model.load_state_dict(other.state_dict())
    use_backend(model, "cpu_exact")
    assert torch.equal(check(2), start)
    first.mlp.down_proj.scales = first.mlp.down_proj.scales * 2
    changed = check(2)
    assert not torch.equal(changed, start)
    first.self_attn.v_proj.bias = None
    assert not torch.equal(check(2), changed)
    first.mlp.up_proj = first.mlp.up_proj.dequantize()
    check(1)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp", "input_layernorm", "self_attn"])
def test_hooks_are_called(name, fused_calls):
    model, seen = packed_model(), []
    first, second = model.model.layers
    handle = first.get_submodule(name).register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        model(token_batch(1, 1))
        assert (len(seen), len(fused_calls)) == (1, 1)
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
        try:
            model(token_batch(1, 1))
        finally:
            handle.remove()
        assert second.mlp.down_proj in seen
        assert len(fused_calls) == 1
        model(token_batch(1, 1))
    assert len(fused_calls) == 3


def test_copies_and_files_are_of_a_model_as_ever(tmp_path, monkeypatch, fused_calls):
    model = packed_model()
    expected = decode(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(decode(twin), expected)
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(decode(again), expected)
    twin.save_pretrained(tmp_path)
    fused_calls.clear()
    monkeypatch.setattr("fairy2i.packed.DEFAULT", "auto")  # as where nobody asks for the reference
    assert torch.equal(decode(type(model).from_pretrained(tmp_path)), expected)
    assert len(fused_calls) == 10  # without a word


def test_layers_that_accelerate_has_its_hand_in_go_the_other_way(fused_calls):
    model = packed_model()
    expected = decode(model)
    fused_calls.clear()
    accelerate.cpu_offload(model.model.layers[0], torch.device("cpu"))
    torch.testing.assert_close(decode(model), expected, rtol=2e-5, atol=2e-5)
    assert len(fused_calls) == 5  # of the other layer


def test_use_backend_fuses_and_takes_it_back_and_leaves_others_alone():
    model = packed_model()
    assert all("forward" in layer.__dict__ for layer in model.model.layers)
    use_backend(model, "reference")
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    for family in ("qwen3", "gemma3", "gpt2", "opt"):
        assert fuse_decoder_layers(packed_model(family)) == 0
    assert fuse_decoder_layers(packed_model(hidden_act="gelu")) == 0
    assert fuse_decoder_layers(tiny_model()) == 0
    model.model.layers[0].forward = model.model.layers[0].forward  # somebody's own
    assert fuse_decoder_layers(use_backend(model, "cpu_exact")) == 1


def test_sizes_that_do_not_belong_together_get_the_error_of_the_layers():
    model = packed_model()
    layer = model.model.layers[0]
    layer.mlp.down_proj = packed_model(intermediate_size=64).model.layers[0].mlp.down_proj
    with torch.no_grad(), pytest.raises(RuntimeError, match="64 input features"):
        model(token_batch(1, 1))


def test_inputs_of_other_sizes_get_the_error_of_the_layers(fused_calls):
    layer = packed_model().model.layers[0]
    x, positions = torch.randn(2, 1, 32), (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))
    with torch.no_grad():
        layer(x, position_embeddings=positions)
        assert fused_calls == [2]
        with pytest.raises(RuntimeError, match=r"size of tensor|32 input features"):
            layer(torch.randn(2, 1, 30), position_embeddings=positions)
        with pytest.raises(RuntimeError, match="size of tensor"):
            layer(x, position_embeddings=(torch.ones(3, 1, 8), torch.zeros(3, 1, 8)))
        with pytest.raises(RuntimeError, match="size of tensor"):
            layer(x, position_embeddings=(torch.ones(1, 1, 6), torch.zeros(1, 1, 6)))
    assert fused_calls == [2]


def test_no_memory_is_an_error_and_the_input_stays(monkeypatch):
    model = packed_model()
    hidden = torch.randn(1, 1, 32)
    before = hidden.clone()
    positions = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    with torch.no_grad():
        model.model.layers[0](hidden, position_embeddings=positions)
        assert torch.equal(hidden, before)

        class Full:
            def __getattr__(self, name):
                return lambda *args: -1

        monkeypatch.setattr(cpu, "library", Full)
        with pytest.raises(MemoryError, match="scratch space"):
            model.model.layers[0](hidden, position_embeddings=positions)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-200, 200, width=32), min_size=16, max_size=16),
    st.integers(1, 4),
    st.sampled_from([0.0, 1e-6, 1e-2]),
    st.integers(0, 2**31 - 1),
)
def test_the_arithmetic_between_the_layers_in_float64(values, tokens, eps, seed):
    """Layers without weights but for their biases: what is left is the unit's gate and the sums."""
    generator = torch.Generator().manual_seed(seed)
    model = packed_model("qwen2", hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    layer = model.model.layers[0]
    gate, up = torch.tensor(values), torch.randn(16, generator=generator)
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(layer.mlp, name)
        if name != "down_proj":
            linear.scales.zero_()
            linear.bias = nn.Parameter(gate if name == "gate_proj" else up, requires_grad=False)
    layer.self_attn.o_proj.scales.zero_()
    layer.post_attention_layernorm.variance_epsilon = eps
    use_backend(model, "cpu_exact")
    hidden = torch.randn(tokens, 1, 16, generator=generator)
    angle = torch.randn(tokens, 1, 8, generator=generator)
    with torch.no_grad():
        y = layer(hidden, position_embeddings=(angle.cos(), angle.sin()))
    inner = gate.double() * torch.sigmoid(gate.double()) * up.double()
    expected = hidden.double() + inner @ layer.mlp.down_proj.dense_weight().double().T
    sizes = hidden.double().abs() + inner.abs() @ layer.mlp.down_proj.dense_weight().double().abs().T
    assert ((y.double() - expected).abs() <= 4e-6 * sizes + 1e-30).all()


def test_not_a_number_comes_out_as_one():
    layer = packed_model().model.layers[0]
    hidden = torch.randn(1, 1, 32)
    hidden[0, 0, 3] = float("nan")
    with torch.no_grad():
        assert layer(hidden, position_embeddings=(torch.ones(1, 1, 8), torch.zeros(1, 1, 8))).isnan().all()


def test_a_fused_model_compiles_into_one_graph(fused_calls):
    model = packed_model()
    ids = token_batch(1, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(ids, use_cache=False).logits
        assert fused_calls == []
        torch.testing.assert_close(found, model(ids).logits, rtol=2e-5, atol=2e-5)
