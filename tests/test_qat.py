"""QATLinear: its forward is the quantized weight's, its backward is straight-through, and it keeps no dense copy."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fairy2i import METHODS, PhaseScheme, QATLinear, RealScheme

LEARNED = [
    PhaseScheme(stages=2, granularity="row", scales="learned"),
    PhaseScheme(stages=3, granularity="tensor", scales="learned"),
    PhaseScheme(stages=1, granularity="tile", tile=5, scales="learned"),
    RealScheme(levels=2, granularity="row", scales="learned"),
    RealScheme(levels=3, granularity="tensor", scales="learned"),
    RealScheme(levels=3, granularity="tile", tile=5, scales="learned"),
]
SCHEMES = [*METHODS.values(), PhaseScheme(scales="joint", granularity="tile", tile=5), *LEARNED]
TWO = [METHODS["complex_phase_v2"], LEARNED[0]]
SHAPES = {"1-D": (24,), "2-D": (7, 24), "3-D": (2, 5, 24)}


def make_layer(scheme, bias=True, dtype=torch.float32, **kwargs):
    return QATLinear(24, 16, bias, scheme=scheme, dtype=dtype, **kwargs)


def gradients(function, *inputs):
    """Return the output and the gradients of all inputs, for a fixed random gradient of the output."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    y = function(*inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    return y.detach(), [value.grad for value in inputs]


def layer_gradients(layer, x, run=None):
    """Return the output and the gradients (x, weight, bias) of one pass through a layer."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = (run or layer)(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    return y.detach(), [x.grad, layer.weight.grad, *([] if layer.bias is None else [layer.bias.grad])]


def assert_all_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


# Forward and backward


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_output_and_gradients_equal_those_of_the_constant_quantized_weight_bit_for_bit(scheme, shape, bias):
    layer, x = make_layer(scheme, bias), torch.randn(shape)
    y, grads = layer_gradients(layer, x)
    constants = [layer.bias] if bias else []
    true_y, true_grads = gradients(F.linear, x, layer.quantized_weight(), *constants)
    assert torch.equal(y, true_y)
    assert_all_equal(grads, true_grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", TWO, ids=str)
def test_narrow_modules_use_the_quantized_weight_rounded_once(scheme, dtype):
    layer, x = make_layer(scheme, dtype=dtype), torch.randn(7, 24, dtype=dtype)
    dense = scheme.dequantize(*layer.codes_and_scales())
    assert dense.dtype == torch.float32
    assert torch.equal(layer.quantized_weight(), dense.to(dtype))
    y, grads = layer_gradients(layer, x)
    true_y, true_grads = gradients(F.linear, x, dense.to(dtype), layer.bias)
    assert torch.equal(y, true_y)
    assert_all_equal(grads, true_grads)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantized_codes_and_scales_are_what_the_forward_used_bit_for_bit(scheme):
    layer = make_layer(scheme, bias=False)
    seen = layer(torch.eye(24)).T  # a product with 1 and sums with 0 are exact
    codes, scales = layer.codes_and_scales()
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float32
    assert torch.equal(scheme.dequantize(codes, scales), seen)


@pytest.mark.parametrize("scheme", TWO, ids=str)
def test_a_weight_stored_transposed_gives_the_same_results(scheme):
    layer, turned = make_layer(scheme), make_layer(scheme, fan_in_fan_out=True)
    with torch.no_grad():
        turned.weight.copy_(layer.weight.T)
        turned.bias.copy_(layer.bias)
    turned.init_scales()
    assert turned.weight.shape == (24, 16)
    x = torch.randn(7, 24)
    y, (grad_x, grad_weight, grad_bias) = layer_gradients(layer, x)
    turned_y, turned_grads = layer_gradients(turned, x)
    # the sums of the scales and of the products may run in another order
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(turned_y, y, **close)
    torch.testing.assert_close(turned_grads, [grad_x, grad_weight.T, grad_bias], **close)


@pytest.mark.parametrize("scheme", LEARNED, ids=str)
def test_learned_scale_gradient_is_that_of_dequantize_over_root_of_codes_per_scale(scheme):
    layer, x = make_layer(scheme), torch.randn(2, 5, 24)
    layer_gradients(layer, x)
    codes, scales = layer.codes_and_scales()
    _, (true_grad,) = gradients(lambda s: F.linear(x, scheme.dequantize(codes, s), layer.bias), scales)
    grad = layer.scales.grad.view(scales.shape)  # a single scale is stored as (1,)
    torch.testing.assert_close(grad, true_grad / math.sqrt(codes.numel() / scales.numel()), rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_asked_for_are_made():
    layer, x = make_layer(LEARNED[0]), torch.randn(3, 24)
    layer(x).sum().backward()  # x asks for none
    assert layer.weight.grad is not None
    layer.zero_grad()
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is layer.scales.grad is layer.bias.grad is None


@pytest.mark.parametrize("scheme", LEARNED, ids=str)
def test_training_learned_scales_alone_lowers_the_error(scheme):
    layer, x = make_layer(scheme), torch.randn(64, 24)
    layer.weight.requires_grad_(False)
    target = F.linear(x, layer.weight, layer.bias)
    optimizer = torch.optim.SGD([layer.scales], lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(F.mse_loss(layer(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


# Memory


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["(out, in)", "(in, out)"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_only_the_input_the_master_weight_and_the_scales_are_kept_until_backward(scheme, fan_in_fan_out):
    layer, x = make_layer(scheme, fan_in_fan_out=fan_in_fan_out), torch.randn(7, 24, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    allowed = {t.data_ptr(): t.numel() for t in (x, layer.weight, layer.scales) if t is not None}
    made = [t for t in kept if t.data_ptr() not in allowed]  # mean scales, which the backward need not find again
    assert [t.shape for t in made] == [scheme.scale_shape(16, 24)] * (scheme.scales == "mean")
    assert {t.data_ptr(): t.numel() for t in kept if t.data_ptr() in allowed} == allowed
    assert not any(isinstance(value, torch.Tensor) for value in vars(y.grad_fn).values())  # nor past the hooks
    y.sum().backward()
    assert layer.weight.grad is not None


def test_the_hooks_of_the_memory_test_do_see_a_dense_copy():
    # the proof above is worth something only if a plain F.linear(x, q) fails it
    layer, x, kept = make_layer(TWO[0]), torch.randn(7, 24, requires_grad=True), []
    dense = layer.quantized_weight().requires_grad_()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear(x, dense)
    assert dense.data_ptr() in {t.data_ptr() for t in kept}


# Autocast, checkpointing, compile


@pytest.mark.parametrize("scheme", TWO, ids=str)
def test_autocast_computes_in_bfloat16_and_returns_gradients_in_the_dtype_of_each_tensor(scheme):
    layer, x = make_layer(scheme), torch.randn(2, 5, 24)

    def autocast(function):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args)

        return run

    y, grads = layer_gradients(layer, x, autocast(layer))
    true_y, true_grads = gradients(autocast(F.linear), x, layer.quantized_weight(), layer.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, true_y)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    assert_all_equal(grads, true_grads)
    if scheme.learned:
        assert layer.scales.grad.dtype == torch.float32


@pytest.mark.parametrize("scheme", TWO, ids=str)
def test_autocast_takes_an_input_that_an_earlier_layer_made_bfloat16(scheme):
    layer, x = make_layer(scheme), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.bfloat16()), layer(x))


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("scheme", TWO, ids=str)
def test_gradient_checkpointing_changes_no_bit(scheme, reentrant):
    layer, x = make_layer(scheme), torch.randn(2, 5, 24)
    y, grads = layer_gradients(layer, x)
    grads = [grad.clone() for grad in grads]
    again, again_grads = layer_gradients(layer, x, lambda v: checkpoint(layer, v, use_reentrant=reentrant))
    assert torch.equal(again, y)
    assert_all_equal(again_grads, grads)


def compile_case(backend):
    """Run forward and backward of both kinds of layer eagerly and as one compiled graph."""
    model = nn.Sequential(QATLinear(24, 32, scheme=TWO[0]), nn.SiLU(), QATLinear(32, 16, scheme=TWO[1]))
    x = torch.randn(7, 24)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    return results


def test_aot_compiled_as_one_graph_changes_no_bit():
    eager, compiled = compile_case("aot_eager")
    assert_all_equal(compiled, eager)


def test_inductor_compiles_it_as_one_graph():
    eager, compiled = compile_case("inductor")
    # generated code sums in another order
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


# The module


def test_from_linear_shares_parameters_and_keeps_mode_and_keys():
    linear = nn.Linear(24, 16).eval()
    keys, state = list(linear.state_dict()), {k: v.clone() for k, v in linear.state_dict().items()}
    layer = QATLinear.from_linear(linear, METHODS["complex_phase_v2"])
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert list(layer.state_dict()) == keys
    assert all(torch.equal(layer.state_dict()[k], state[k]) for k in keys)


def test_learned_scales_are_one_more_parameter_that_starts_from_the_joint_fit():
    linear = nn.Linear(24, 16, bias=False)
    layer = QATLinear.from_linear(linear, LEARNED[0])
    assert set(layer.state_dict()) == {"weight", "scales"}
    joint = PhaseScheme(stages=2, granularity="row", scales="joint").quantize(linear.weight.detach())[1]
    assert torch.equal(layer.scales, joint)
    assert layer.scales.requires_grad
    assert layer.scales.dtype == torch.float32


def test_scales_of_a_frozen_layer_are_frozen():
    linear = nn.Linear(24, 16).requires_grad_(False)
    assert not QATLinear.from_linear(linear, LEARNED[0]).scales.requires_grad


def test_init_scales_starts_afresh_from_the_present_weight():
    layer = make_layer(LEARNED[0])
    with torch.no_grad():
        layer.weight.mul_(3)
    before = layer.scales.clone()
    layer.init_scales()
    torch.testing.assert_close(layer.scales, before * 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_leaves_learned_scales_float32(dtype):
    layer = make_layer(LEARNED[0])
    before = layer.scales.detach().clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, before)


def test_casting_between_two_backward_passes_still_trains():
    layer = make_layer(LEARNED[0])
    layer(torch.randn(3, 24)).sum().backward()
    before = layer.scales.grad.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.scales.grad, before)
    layer(torch.randn(3, 24, dtype=torch.bfloat16)).sum().backward()
    assert layer.scales.grad.dtype == torch.float32
    assert not torch.equal(layer.scales.grad, before)


@pytest.mark.parametrize("scheme", TWO, ids=str)
def test_a_meta_layer_costs_nothing_and_becomes_real_by_loading(scheme):
    source = make_layer(scheme)
    layer = make_layer(scheme, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, 24, device="meta")).shape == (3, 16)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("scheme", TWO, ids=str)
def test_a_deep_copy_is_independent_and_equal(scheme):
    layer, x = make_layer(scheme), torch.randn(3, 24)
    other = copy.deepcopy(layer)
    assert other.scheme == layer.scheme
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.mul_(2)
        if other.scales is not None:
            other.scales.mul_(2)
    assert not torch.equal(other(x), layer(x))


def test_a_shape_the_scheme_cannot_take_is_an_error():
    with pytest.raises(ValueError, match="complex_phase_v2 cannot quantize a 16x5 layer: odd size 16x5"):
        QATLinear(5, 16, scheme=METHODS["complex_phase_v2"])


def test_an_input_of_another_dtype_is_an_error_that_names_both():
    with pytest.raises(RuntimeError, match=r"input is torch.float32 but the weight is torch.bfloat16"):
        make_layer(TWO[0], dtype=torch.bfloat16)(torch.randn(2, 24))


def test_a_wrong_number_of_features_is_an_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_layer(TWO[0])(torch.randn(2, 22))


def test_an_empty_batch_works():
    layer, x = make_layer(LEARNED[0]), torch.randn(0, 24, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert x.grad.shape == (0, 24)
    assert layer.weight.grad.abs().max() == 0


def test_a_sharded_weight_is_an_error_that_says_what_to_use():
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = make_layer(TWO[0])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(RuntimeError, match=r"Tensor parallelism splits the paired halves.*FSDP2"):
            layer(torch.randn(2, 24))
    finally:
        dist.destroy_process_group()


def test_the_repr_names_the_method():
    assert repr(make_layer(TWO[0])) == "QATLinear(in_features=24, out_features=16, bias=True, method=complex_phase_v2)"
