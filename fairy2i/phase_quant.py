"""PhaseQuant: complex weights in {+1, -1, +i, -i}, in residual stages.

One stage maps each complex entry z of U and W to the nearest of 1, i, -1, -i by angle, in the half-open sectors
[-pi/4, pi/4), [pi/4, 3pi/4), [3pi/4, 5pi/4), [5pi/4, 7pi/4), and 0 to 1. Two scales per group restore the size:
s_re = mean |Re z| over the entries that went to +-1, s_im = mean |Im z| over those that went to +-i. T stages quantize
the rest that the stages before left over, and add up: T bits per real weight (arXiv 2512.02901, section 4).

The sectors are decided by the signs of p = Re + Im and q = Re - Im, never by an angle. A floating-point sum has the
exact sign of the true sum, so ties fall the same way at every position, dtype and device:

    (p, q) = (+, +) -> 1    (+, -) -> i    (-, -) -> -1    (-, +) -> -i;    zero p takes the sign of q, zero q of -p.

A code is two bits, ``imaginary * 2 + positive``: 0 = -1, 1 = +1, 2 = -i, 3 = +i. Scales come in three kinds:

    mean     the paper's: each stage's own means, greedily.
    joint    least squares over all stages at once, for the same codes; codes and scales then take turns (`refits`).
    learned  given from outside (parameters); only the codes are made here.

All arithmetic is float32 whatever the dtype of the weight; means are summed in float64 and rounded once, so that the
order of the sum does not show and every backend has the same codes. `codes` and `scales` are the result; the dense
weight is :func:`phase_dequantize` of them and nothing else, so fake-quantized and packed weights agree by construction.
"""

import torch
from torch import Tensor

from .granularity import Granularity, expand_groups, group_sum, wide
from .widely_linear import from_parts, parts_gradient, to_parts

SCALE_MIN = 1e-6  # the paper's clamp; also what a group gets that has no entry on an axis


def phase_encode(re: Tensor, im: Tensor) -> Tensor:
    """Code each complex entry by its sector: one stage, no scales.

    Args:
        re, im: real tensors of one shape.

    Returns:
        uint8 codes of that shape, 0 = -1, 1 = +1, 2 = -i, 3 = +i.
    """
    p, minus_q = re + im, im - re
    p_positive = torch.where(p == 0, re, p) >= 0  # p = 0: q = 2 re has the sign of re
    q_positive = torch.where(minus_q == 0, p, minus_q) <= 0
    return (p_positive != q_positive).to(torch.uint8) * 2 + p_positive.to(torch.uint8)


def phase_units(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit each code stands for as float32 (re, im), entries in {-1, 0, 1}, shaped as ``codes``."""
    p = codes & 1
    q = p ^ (codes >> 1)
    p, q = p.to(torch.int8), q.to(torch.int8)  # 1 where p and q are positive: re = (p + q) - 1, im = p - q
    return (p + q - 1).float(), (p - q).float()


def _least_squares(units: Tensor, target: Tensor, granularity: Granularity, tile: int) -> Tensor:
    """Fit target = sum_t s_t units_t in each group.

    units (T, 2, n, m), target (2, n, m) -> s (T, 2, *group). Gaussian elimination on the T x T normal equations,
    elementwise over the groups; a stage that the stages before it already span gets no share.
    """
    stages = units.shape[0]
    gram = [[group_sum(units[s] * units[t], granularity, tile) for t in range(stages)] for s in range(stages)]
    rhs = [group_sum(units[s] * target, granularity, tile) for s in range(stages)]
    size = [gram[t][t].clone() for t in range(stages)]
    inverse = []
    for k in range(stages):
        alive = gram[k][k] > 1e-4 * size[k].clamp(min=1)
        inverse.append(torch.where(alive, 1 / gram[k][k], 0.0))
        for s in range(k + 1, stages):
            factor = gram[s][k] * inverse[k]
            for t in range(k + 1, stages):
                gram[s][t] = gram[s][t] - factor * gram[k][t]
            rhs[s] = rhs[s] - factor * rhs[k]
    solution: list[Tensor] = [rhs[0]] * stages
    for k in reversed(range(stages)):
        known = sum((gram[k][t] * solution[t] for t in range(k + 1, stages)), start=torch.zeros_like(rhs[k]))
        solution[k] = (rhs[k] - known) * inverse[k]
    return torch.stack(solution)


def _encode_stages(
    re: Tensor, im: Tensor, stages: int, granularity: Granularity, tile: int, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the residual loop: (2, n, m) parts -> codes (T, 2, n, m), scales (T, 2, 2, *group).

    With ``given`` scales only the codes are new; without, each stage takes its mean magnitudes.
    """
    rows, cols = re.shape[-2:]
    all_codes, all_scales = [], []
    for t in range(stages):
        codes = phase_encode(re, im)
        unit_re, unit_im = phase_units(codes)
        if given is None:
            means = []
            for part, unit in ((re, unit_re), (im, unit_im)):
                count = group_sum(unit.abs(), granularity, tile, wide(unit))
                total = group_sum(part * unit, granularity, tile, wide(part))  # |part| where the unit is on this axis
                means.append((total / count.clamp(min=1)).float().clamp(min=SCALE_MIN))
            scale = torch.stack(means, dim=1)
        else:
            scale = given[t]
        full = expand_groups(scale, rows, cols, granularity, tile)  # (2, 2, n, m) or broadcastable
        if t + 1 < stages:
            re = torch.addcmul(re, full[:, 0], unit_re, value=-1)
            im = torch.addcmul(im, full[:, 1], unit_im, value=-1)
        all_codes.append(codes)
        all_scales.append(scale)
    return torch.stack(all_codes), torch.stack(all_scales)


def _refit(re: Tensor, im: Tensor, codes: Tensor, scales: Tensor, granularity: Granularity, tile: int) -> Tensor:
    """Refit the scales of given codes by least squares; a group whose fit is not positive keeps its old scales."""
    fits = []
    for axis, (part, unit) in enumerate(zip((re, im), phase_units(codes), strict=True)):
        fit = _least_squares(unit, part, granularity, tile)
        unused = group_sum(unit.abs(), granularity, tile) == 0
        good = ((fit > 0) | unused).all(dim=0)
        fits.append(torch.where(good, fit.clamp(min=SCALE_MIN), scales[:, :, axis]))
    return torch.stack(fits, dim=2)


def _group_error(re: Tensor, im: Tensor, codes: Tensor, scales: Tensor, granularity: Granularity, tile: int) -> Tensor:
    """Squared error of each group of U and W: (2, *group)."""
    back_re, back_im = _decode(codes, scales, granularity, tile)
    return group_sum((re - back_re).square() + (im - back_im).square(), granularity, tile)


def _decode(codes: Tensor, scales: Tensor, granularity: Granularity, tile: int) -> tuple[Tensor, Tensor]:
    """Sum the stages, first to last: codes (T, 2, n, m), scales (T, 2, 2, *group) -> float32 parts (2, n, m)."""
    rows, cols = codes.shape[-2:]
    unit_re, unit_im = phase_units(codes)
    full = expand_groups(scales, rows, cols, granularity, tile)
    re, im = full[0, :, 0] * unit_re[0], full[0, :, 1] * unit_im[0]
    for t in range(1, codes.shape[0]):
        re, im = torch.addcmul(re, full[t, :, 0], unit_re[t]), torch.addcmul(im, full[t, :, 1], unit_im[t])
    return re, im


def phase_quantize(
    weight: Tensor,
    *,
    stages: int,
    granularity: Granularity = "tensor",
    tile: int = 64,
    refits: int = 0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize a real matrix to phase codes and scales.

    Args:
        weight: (2n, 2m), any floating dtype, any strides; not changed.
        stages: number of residual stages T = bits per real weight.
        granularity, tile: what shares a scale, see :mod:`fairy2i.granularity`; groups are of the complex (n, m) matrix.
        refits: 0 for the paper's mean scales; k > 0 for joint scales, refitted k times with new codes in between. Each
            round is kept only in the groups where it lowers the squared error.
        scales: scales to use instead of fitting any, (T, 2, 2, *group); values below 1e-6 count as 1e-6.

    Returns:
        codes: uint8 (T, 2, n, m), index 1 is U then W.
        scales: float32 (T, 2, 2, *group), index 2 is re then im.

    Raises:
        ValueError: a side of ``weight`` is odd or zero.

    Source: arXiv 2512.02901, section 4; the joint fit is this library's own.
    """
    re, im = to_parts(weight.float())
    if scales is not None:
        return _encode_stages(re, im, stages, granularity, tile, scales.float().clamp(min=SCALE_MIN))
    codes, fitted = _encode_stages(re, im, stages, granularity, tile, None)
    if refits and stages > 1:  # one stage: the mean already is the least-squares fit
        error = _group_error(re, im, codes, fitted, granularity, tile)
        new_codes, new_scales = codes, fitted
        for k in range(refits):
            if k:
                new_codes, _ = _encode_stages(re, im, stages, granularity, tile, new_scales)
            new_scales = _refit(re, im, new_codes, new_scales, granularity, tile)
            new_error = _group_error(re, im, new_codes, new_scales, granularity, tile)
            better = new_error < error  # (2, *group)
            rows, cols = re.shape[-2:]
            codes = torch.where(expand_groups(better, rows, cols, granularity, tile), new_codes, codes)
            fitted = torch.where(better[:, None], new_scales, fitted)
            error = torch.where(better, new_error, error)
    return codes, fitted


def phase_dequantize(codes: Tensor, scales: Tensor, *, granularity: Granularity = "tensor", tile: int = 64) -> Tensor:
    """Rebuild the dense weight from codes and scales.

    Args:
        codes: uint8 (T, 2, n, m).
        scales: float32 (T, 2, 2, *group).
        granularity, tile: as given to :func:`phase_quantize`.

    Returns:
        float32 (2n, 2m). Cast once at the end if another dtype is wanted.
    """
    return from_parts(*_decode(codes, scales, granularity, tile))


def phase_scale_gradient(grad: Tensor, codes: Tensor, *, granularity: Granularity = "tensor", tile: int = 64) -> Tensor:
    """Return the gradient of the scales from that of the dense weight, the codes held constant.

    Args:
        grad: (2n, 2m), the gradient on the dense quantized weight.
        codes: uint8 (T, 2, n, m).

    Returns:
        float32 (T, 2, 2, *group).
    """
    grads = parts_gradient(grad.float())
    products = [g * unit for g, unit in zip(grads, phase_units(codes), strict=True)]
    return torch.stack([group_sum(x, granularity, tile, wide(x)).float() for x in products], dim=2)
