"""PackedLinear: the QATLinear it came from, bit for bit, at the promised bits, with the input's gradient."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairy2i import METHODS, PackedLinear, PhaseScheme, QATLinear, RealScheme
from fairy2i.ops import cpu
from fairy2i.packed import keep_dense_weights, use_backend

ROW = PhaseScheme(granularity="row", scales="learned")
SCHEMES = [
    *METHODS.values(),
    ROW,
    PhaseScheme(stages=3, granularity="tile", tile=5, scales="joint"),
    PhaseScheme(stages=1, scales="learned"),
    RealScheme(levels=2, granularity="row"),
    RealScheme(levels=3, granularity="tile", tile=7, scales="learned"),
]
EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
V2 = METHODS["complex_phase_v2"]
OUT, IN = 22, 34  # 17 complex columns: rows of codes that do not end on a byte


def qat_layer(scheme=V2, dtype=torch.float32, bias=True, out_features=OUT, in_features=IN, **kwargs):
    layer = QATLinear(in_features, out_features, bias, scheme=scheme, dtype=dtype, **kwargs)
    if layer.scales is not None:
        with torch.no_grad():  # trained, not those of the first fit
            layer.scales.mul_(1 + 0.3 * torch.rand_like(layer.scales))
    return layer


def packed_layer(*args, **kwargs):
    return PackedLinear.from_qat(qat_layer(*args, **kwargs))


# The same numbers


@pytest.mark.parametrize("stored", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@EACH_DTYPE
@EACH_SCHEME
def test_the_output_is_that_of_the_qat_layer_bit_for_bit(scheme, dtype, bias, stored):
    layer = qat_layer(scheme, dtype, bias, fan_in_fan_out=stored)
    packed = PackedLinear.from_qat(layer)
    x = torch.randn(2, 5, IN, dtype=dtype)
    y = packed(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x))
    assert torch.equal(packed.dense_weight().to(dtype), layer.quantized_weight())


@pytest.mark.parametrize("stored", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("method", METHODS)
def test_a_wide_layer_in_float16_is_bit_for_bit_the_same_too(method, stored):
    layer = qat_layer(METHODS[method], torch.float16, out_features=512, in_features=256, fan_in_fan_out=stored)
    x = torch.randn(7, 256, dtype=torch.float16)
    assert torch.equal(PackedLinear.from_qat(layer)(x), layer(x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_SCHEME
def test_autocast_computes_what_the_qat_layer_does(scheme, dtype, x_dtype):
    layer = qat_layer(scheme, dtype)
    packed, x = PackedLinear.from_qat(layer), torch.randn(5, IN, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layer(x))


@EACH_SCHEME
def test_codes_and_scales_come_back_as_they_were_packed(scheme):
    layer = qat_layer(scheme)
    for got, expected in zip(PackedLinear.from_qat(layer).codes_and_scales(), layer.codes_and_scales(), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_its_weight_reads_as_the_dense_one_and_cannot_be_written_through():
    packed = packed_layer()
    before = packed.dense_weight()
    assert torch.equal(packed.weight, before)
    packed.weight.zero_()
    assert torch.equal(packed.weight, before)


def test_packing_changes_nothing_in_the_qat_layer_and_shares_nothing_with_it():
    layer = qat_layer(ROW).train()
    before = copy.deepcopy(layer.state_dict())
    packed = PackedLinear.from_qat(layer)
    assert packed.training
    for tensor in packed.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


# Gradients and memory


@EACH_DTYPE
def test_gradients_of_input_and_bias_are_those_of_a_linear_layer(dtype):
    packed = packed_layer(dtype=dtype)
    packed.bias.requires_grad_(True)
    dense = packed.dense_weight().to(dtype)
    x, grad = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True), torch.randn(2, 5, OUT, dtype=dtype)
    got = torch.autograd.grad(packed(x), (x, packed.bias), grad)
    expected = torch.autograd.grad(F.linear(x, dense, packed.bias), (x, packed.bias), grad)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_without_a_gradient_to_give_there_is_no_graph():
    assert packed_layer()(torch.randn(3, IN)).grad_fn is None


def test_no_dense_weight_is_kept_between_forward_and_backward(monkeypatch):
    packed, dense, saved = packed_layer(), [], []
    made = PackedLinear.dense_weight

    def watch(layer):
        weight = made(layer)
        dense.append(weakref.ref(weight))
        return weight

    def save(tensor):
        saved.append(tensor.shape)
        return tensor

    monkeypatch.setattr(PackedLinear, "dense_weight", watch)
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = packed(x)
    gc.collect()
    assert [ref() for ref in dense] == [None]
    assert saved == []  # not even the input: the weight has no gradient
    assert not any(isinstance(value, torch.Tensor) for value in vars(y.grad_fn).values())
    y.sum().backward()
    assert [ref() for ref in dense] == [None, None]


def test_the_module_holds_codes_scales_and_bias_and_nothing_else():
    packed = packed_layer(ROW, dtype=torch.bfloat16)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in packed.state_dict().items()} == {
        "bias": (torch.bfloat16, (OUT,)),
        "codes": (torch.uint8, (2, 2, OUT // 2, 5)),
        "scales": (torch.float32, (2, 2, 2, OUT // 2)),
    }
    packed(torch.randn(3, IN, dtype=torch.bfloat16))
    held = [value for module in packed.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert held == []
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    assert [name for name, _ in packed.named_buffers()] == ["codes", "scales"]
    assert list(packed_layer(bias=False).state_dict()) == ["codes", "scales"]


@pytest.mark.parametrize("shape", [(OUT, IN), (2, 2), (128, 64)], ids=str)
@EACH_SCHEME
def test_the_bytes_held_are_exactly_the_promised_bits(scheme, shape):
    packed = packed_layer(scheme, out_features=shape[0], in_features=shape[1])
    bits = 8 * (packed.codes.nbytes + packed.scales.nbytes)
    assert bits / (shape[0] * shape[1]) == scheme.bits_per_weight(*shape)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_t_stages_of_a_large_layer_are_t_bits_and_at_most_a_thousandth_more(stages):
    packed = packed_layer(PhaseScheme(stages=stages), out_features=1024, in_features=1024, bias=False)
    bits = 8 * sum(tensor.nbytes for tensor in packed.state_dict().values()) / 1024**2
    assert stages < bits <= 1.001 * stages


# As a module


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_scales_stay_float32_and_exact_when_the_module_is_cast(cast):
    packed = packed_layer()
    codes, scales = packed.codes.clone(), packed.scales.clone()
    cast(packed)
    assert packed.bias.dtype != torch.float32
    assert packed.scales.dtype == torch.float32
    assert torch.equal(packed.scales, scales)
    assert torch.equal(packed.codes, codes)
    assert "scales" in packed.state_dict()


def test_scales_move_and_stay_float32_in_one_call():
    packed = packed_layer().to("meta", torch.bfloat16)
    assert packed.scales.is_meta
    assert packed.scales.dtype == torch.float32


@EACH_SCHEME
def test_a_layer_on_meta_is_packed_on_meta_and_filled_later(scheme):
    with torch.device("meta"):
        empty = PackedLinear.from_qat(QATLinear(IN, OUT, scheme=scheme))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    source, x = packed_layer(scheme), torch.randn(3, IN)
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty(x), source(x))


@pytest.mark.parametrize("bias", [True, False])
@EACH_DTYPE
def test_dequantize_is_a_frozen_linear_layer_with_the_same_output(dtype, bias):
    packed = packed_layer(dtype=dtype, bias=bias)
    plain, x = packed.dequantize(dtype), torch.randn(3, IN, dtype=dtype)
    assert type(plain) is nn.Linear
    assert not any(p.requires_grad for p in plain.parameters())
    assert torch.equal(plain(x), packed(x))
    assert packed.dequantize().weight.dtype == torch.float32


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_is_its_own(clone):
    packed, x = packed_layer(ROW), torch.randn(3, IN)
    other = clone(packed)
    before = packed(x)
    assert other.scheme == packed.scheme
    assert torch.equal(other(x), before)
    other.codes.zero_()
    assert torch.equal(packed(x), before)


def test_a_state_dict_of_another_shape_is_an_error_that_names_the_tensor():
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        packed_layer().load_state_dict(packed_layer(METHODS["complex_phase_v1"]).state_dict())


def test_an_odd_size_is_an_error_that_names_method_and_shape():
    with pytest.raises(ValueError, match="complex_phase_v2 cannot pack a 3x4 layer: odd size 3x4"):
        PackedLinear(4, 3, scheme=V2)


def test_the_repr_shows_sizes_and_method():
    text = repr(packed_layer(bias=False))
    sizes = f"in_features={IN}, out_features={OUT}, bias=False"
    assert text == f"PackedLinear({sizes}, method=complex_phase_v2, backend=reference)"


def test_it_compiles_without_a_graph_break_and_gives_the_input_its_gradient():
    packed, x = packed_layer(), torch.randn(3, IN, requires_grad=True)
    compiled = torch.compile(packed, fullgraph=True)
    got, expected = compiled(x), packed(x)
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)))


@EACH_SCHEME
def test_kept_dense_weights_change_no_bit_and_are_not_saved(scheme):
    model, x = nn.Sequential(packed_layer(scheme)), torch.randn(3, IN, requires_grad=True)
    expected, state = model(x), model.state_dict()
    expected_grad = torch.autograd.grad(expected.sum(), x)[0]
    keep_dense_weights(model)
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], expected_grad)
    assert model.state_dict().keys() == state.keys()
    assert model[0].dense_weight_as(torch.float32) is model[0].dense_weight_as(torch.float32)
    assert model[0].dense_weight_as(torch.bfloat16).dtype == torch.bfloat16
    keep_dense_weights(model, False)
    assert model[0].dense_weight_as(torch.float32) is not model[0].dense_weight_as(torch.float32)


def test_kept_dense_weights_follow_a_move_of_the_model():
    model = keep_dense_weights(nn.Sequential(packed_layer(bias=False)))
    model(torch.randn(3, IN))
    assert model.to("meta")(torch.randn(3, IN, device="meta")).is_meta


@pytest.mark.skipif(cpu.why_off() is not None, reason="needs the CPU's kernels")
def test_training_reads_the_codes_in_the_order_of_the_format():
    layer = use_backend(packed_layer(METHODS["complex_phase_v2"]).eval(), "cpu_exact")
    x, words = torch.randn(2, layer.in_features), layer.words
    expected = layer(x)
    assert words is not None
    codes = layer.train()._buffers["codes"]
    assert codes is not None and layer.words is None
    torch.testing.assert_close(layer.eval()(x), expected)
