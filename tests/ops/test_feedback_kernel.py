"""Rounding with feedback by a kernel, against PyTorch: the same codes but for ties, those of what it returns."""

import pytest
import torch
from layers import NEEDS_TRITON, on_both

from fairy2i import PhaseScheme
from fairy2i.calibrate import output_error, round_with_feedback
from fairy2i.ops import training as ops

pytestmark = NEEDS_TRITON


@on_both
@pytest.mark.parametrize(
    ("rows", "columns", "lazy"), [(2, 2, 64), (10, 26, 1), (10, 26, 5), (22, 140, 5), (22, 140, 64)]
)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_kernel_rounds_as_pytorch_does(device, stages, rows, columns, lazy, monkeypatch):
    torch.manual_seed(2)
    weight = torch.randn(rows, columns, device=device)
    x = torch.randn(3 * columns, columns, device=device) @ torch.randn(columns, columns, device=device)
    gram = x.T @ x
    scheme = PhaseScheme(stages=stages, granularity="row", scales="learned")
    plain, scales = scheme.quantize(weight)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(ops, "_backend", backend)
        codes, moved = round_with_feedback(weight, gram, scales, scheme, lazy=lazy)
        assert torch.equal(scheme.quantize(moved, scales)[0], codes)
        results.append((codes, moved, output_error(weight, scheme.dequantize(codes, scales), gram)))
    (codes, moved, error), (its_codes, its_moved, its_error) = results
    same = (codes == its_codes).flatten(0, 1).all(0).all(1)  # rows in which no tie fell the other way
    assert same.float().mean() >= 0.8
    both = same.repeat(2)
    torch.testing.assert_close(its_moved[both], moved[both], rtol=1e-3, atol=1e-3)
    assert its_error == pytest.approx(error, rel=0.05)
    if columns > 100:
        assert its_error < output_error(weight, scheme.dequantize(plain, scales), gram)
