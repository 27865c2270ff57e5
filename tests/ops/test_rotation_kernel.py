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
    ("shape", "rotation"), [((5, 12), 4), ((3, 48), 16), ((70, 576), 64), ((2, 512), 256), ((3, 10), 64), ((0, 64), 64)]
)
def test_the_kernel_has_the_bits_of_the_reference(device, shape, rotation, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    for y in (x, x.T.contiguous().T, torch.nn.functional.pad(x, (3, 2))[:, 3:-2]):
        found = torch.ops.fairy2i.rotate(y, rotation, None, None, None)
        assert found.dtype == torch.float32 and found.is_contiguous()
        expected = rotate(x.float(), rotation)
        assert torch.equal(found, expected)
        found = torch.ops.fairy2i.rotate(y, rotation, dtype, torch.bfloat16, None)
        assert found.is_contiguous() and torch.equal(found, expected.to(dtype).to(torch.bfloat16))


@on_both
def test_op_is_well_formed(device):
    for x in (torch.randn(6, 64, device=device), torch.randn(6, 10, device=device)):
        torch.library.opcheck(torch.ops.fairy2i.rotate.default, (x, 64, None, None, None))
        torch.library.opcheck(torch.ops.fairy2i.rotate.default, (x, 64, torch.float32, torch.bfloat16, None))


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
