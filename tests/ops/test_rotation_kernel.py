"""Rotation by a kernel: the bits of PyTorch's, alone and in quantized layers of rotated schemes."""

import copy
from dataclasses import replace

import pytest
import torch
from layers import DTYPES, NEEDS_TRITON, on_both

from fairy2i import METHODS, PhaseScheme, QATLinear
from fairy2i.ops import training as ops
from fairy2i.reuse import KEPT, reuse_quantized
from fairy2i.rotation import rotate

pytestmark = NEEDS_TRITON
SCHEMES = [
    METHODS["fairy2i_w2"],
    PhaseScheme(stages=3, rotation=16),
    PhaseScheme(stages=2, granularity="tile", tile=8, scales="joint", rotation=4),
    PhaseScheme(stages=1, granularity="row", rotation=256),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Use the kernels on every device."""
    monkeypatch.setattr(ops, "_backend", "triton")


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "width"), [((5, 12), 4), ((3, 48), 16), ((70, 576), 64), ((2, 512), 256), ((0, 64), 64)]
)
def test_the_kernel_has_the_bits_of_the_reference(device, shape, width, dtype):
    from fairy2i.ops.triton.rotate import rotate as run

    x = torch.randn(shape, device=device).to(dtype)
    for y in (x, x.T.contiguous().T, torch.nn.functional.pad(x, (3, 2))[:, 3:-2]):
        found = run(y, width, torch.float32, torch.float32)
        assert found.dtype == torch.float32 and found.is_contiguous()
        expected = rotate(x.float(), width)
        assert torch.equal(found, expected)
        found = run(y, width, dtype, torch.bfloat16)
        assert found.is_contiguous() and torch.equal(found, expected.to(dtype).to(torch.bfloat16))


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_as_pytorch(monkeypatch, weight, *how, grad=None, dtype=None, exact=True):
    """Check all ops on this weight, with scales found and given, against themselves without kernels."""
    run, dtype, grad, results = torch.ops.fairy2i, dtype or weight.dtype, weight if grad is None else grad, []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(ops, "_backend", backend)
        dense, scales, blocks = run.phase_quantize_mean(weight, *how, dtype, True)
        again, same = run.phase_quantize_given(weight, scales, *how, dtype, True, None)
        back = run.phase_dequantize_blocks(blocks, scales, *how, weight.dtype, dtype, None)
        moved = [
            run.phase_scale_gradient(grad, weight, *some) for some in ((None, scales, *how), (blocks, scales, *how))
        ]
        results.append([dense, scales, blocks, again, same, back, *moved])
        assert equal(again, dense) and equal(same, blocks) and equal(back, dense)
    assert all(map(equal, *[result[:6] for result in results]))
    for by_torch, by_kernel in zip(results[0][6:], results[1][6:], strict=True):  # sums in another order
        torch.testing.assert_close(by_kernel, by_torch, rtol=1e-5, atol=1e-6, equal_nan=True)
    return results[1]


@pytest.fixture
def apart(monkeypatch):
    """Return a list of what has been rotated by a kernel of its own."""
    calls, original = [], ops._turned

    def turned(matrix, *rest):
        calls.append(matrix.shape)
        return original(matrix, *rest)

    monkeypatch.setattr(ops, "_turned", turned)
    return calls


@on_both
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("granularity", ["row", "tensor", "tile"])
@pytest.mark.parametrize(("shape", "rotation"), [((6, 384), 64), ((4, 32), 16), ((4, 24), 4), ((2, 512), 256)])
def test_kernels_rotate_on_their_way(monkeypatch, apart, device, granularity, stages, shape, rotation):
    tile = max(64, rotation)
    for dtype in DTYPES if rotation == 64 and stages == 2 else (torch.float32,):
        weight = torch.randn(shape, device=device).to(dtype)
        grad = torch.randn(shape, device=device)
        assert_as_pytorch(monkeypatch, weight, stages, granularity, tile, rotation, grad=grad)
    if rotation == 256:
        assert_as_pytorch(monkeypatch, weight, stages, granularity, tile, rotation, grad=grad, dtype=torch.float16)
    assert not apart


@on_both
def test_what_they_cannot_rotate_goes_through_a_kernel_of_its_own(monkeypatch, apart, device):
    halves, rows = torch.randn(6, 192, device=device), torch.randn(128, 6, device=device).T  # m = 96; other strides
    for weight, granularity, tile in ((halves, "row", 64), (halves, "tensor", 64), (rows, "row", 64)):
        before = len(apart)
        assert_as_pytorch(monkeypatch, weight, 2, granularity, tile, 64)
        assert len(apart) > before
    assert_as_pytorch(monkeypatch, torch.randn(6, 128, device=device), 2, "tile", 10, 64)  # tiles through blocks
    assert_as_pytorch(monkeypatch, torch.randn(6, 10, device=device), 2, "row", 64, 64)  # no blocks
    assert_as_pytorch(monkeypatch, torch.randn(6, 128, device=device), 2, "row", 64, 64, grad=rows.T.contiguous().T)


@on_both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize(("granularity", "tile"), [("row", 64), ("tensor", 64), ("tile", 64)])
def test_what_is_not_finite_spreads_over_its_block_as_in_the_reference(monkeypatch, device, granularity, tile, bad):
    weight = torch.randn(4, 256, device=device)
    weight[3, 70:72] = bad
    dense, *_ = assert_as_pytorch(monkeypatch, weight, 2, granularity, tile, 64, grad=torch.randn_like(weight))
    assert not dense[3, 64:128].isfinite().any()


@on_both
@pytest.mark.parametrize("kept", [None, *KEPT])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_of_rotated_schemes_are_those_of_pytorch(device, scheme, kept, monkeypatch):
    torch.manual_seed(1)
    layer = QATLinear(512, 12, scheme=scheme).to(device)
    x = torch.randn(7, 512, device=device)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(ops, "_backend", backend)
        mine, inputs = copy.deepcopy(layer), x.clone().requires_grad_()
        if kept is None:
            y = mine(inputs)
            y.square().sum().backward()
        else:
            with reuse_quantized(mine, kept, verify=True):
                y = mine(inputs)
                y.square().sum().backward()
        results.append([y, mine.quantized_weight(), *mine.codes_and_scales(), inputs.grad, mine.weight.grad])
        if scheme.learned:
            results[-1].append(mine.scales.grad)
    *same, scales_by_torch = results[0] if scheme.learned else (*results[0], None)
    *found, scales_by_kernel = results[1] if scheme.learned else (*results[1], None)
    assert all(map(torch.equal, same, found))
    if scheme.learned:  # sums in another order
        torch.testing.assert_close(scales_by_kernel, scales_by_torch, rtol=1e-5, atol=1e-6)


@on_both
def test_a_rotation_that_does_nothing_changes_nothing(device):
    plain = QATLinear(10, 6, scheme=PhaseScheme(stages=2)).to(device)
    turned = copy.deepcopy(plain)
    turned.scheme = replace(plain.scheme, rotation=64)  # 10 features: no block
    x = torch.randn(3, 10, device=device)
    assert torch.equal(plain(x), turned(x))
