"""The real-valued quantizers of the paper's table: binary and ternary weights with a mean-magnitude scale.

    binary   sign(w - mean w) * mean |w|                      codes 0, 1 = -1, +1          (`bitnet`)
    ternary  clamp(round(w / mean |w|), -1, 1) * mean |w|     codes 0, 1, 2 = -1, 0, +1    (`bitnet_1_58`)

Means run over each group (the paper: the whole matrix), in float32, with mean |w| at least 1e-6. One bit has no zero,
so an entry exactly equal to the mean goes to +1. Sources: arXiv 2310.11453 and 2402.17764 as used in 2512.02901.
"""

import torch
from torch import Tensor

from .granularity import Granularity, expand_groups, group_sum
from .phase_quant import SCALE_MIN


def real_units(codes: Tensor, levels: int) -> Tensor:
    """Return the level each code stands for, float32: {-1, 1} for two levels, {-1, 0, 1} for three."""
    return codes.float() * 2 - 1 if levels == 2 else codes.float() - 1


def real_quantize(
    weight: Tensor,
    *,
    levels: int,
    granularity: Granularity = "tensor",
    tile: int = 64,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize a real matrix to two or three levels.

    Args:
        weight: (out, in), any floating dtype; not changed.
        levels: 2 (binary) or 3 (ternary).
        granularity, tile: what shares a scale, see :mod:`fairy2i.granularity`.
        scales: scales to use instead of mean |w|, (*group); values below 1e-6 count as 1e-6.

    Returns:
        codes: uint8 (out, in), in [0, levels).
        scales: float32 (*group).
    """
    w = weight.float().contiguous()  # the strides of codes show in the last bit of a product in float16
    rows, cols = w.shape
    count = group_sum(torch.ones_like(w), granularity, tile)
    scales = group_sum(w.abs(), granularity, tile) / count if scales is None else scales.float()
    scales = scales.clamp(min=SCALE_MIN)
    if levels == 2:
        mean = expand_groups(group_sum(w, granularity, tile) / count, rows, cols, granularity, tile)
        # a second pass takes the rounding out: else a constant group may lie below its own mean and change its sign
        rest = expand_groups(group_sum(w - mean, granularity, tile) / count, rows, cols, granularity, tile)
        return (w >= mean + rest).to(torch.uint8), scales
    ratio = w / expand_groups(scales, rows, cols, granularity, tile)
    return (ratio.round().clamp(-1, 1) + 1).to(torch.uint8), scales


def real_dequantize(
    codes: Tensor, scales: Tensor, *, levels: int, granularity: Granularity = "tensor", tile: int = 64
) -> Tensor:
    """Rebuild the dense weight, float32 (out, in), from uint8 codes (out, in) and scales (*group)."""
    rows, cols = codes.shape
    return real_units(codes, levels) * expand_groups(scales, rows, cols, granularity, tile)


def real_scale_gradient(
    grad: Tensor, codes: Tensor, *, levels: int, granularity: Granularity = "tensor", tile: int = 64
) -> Tensor:
    """Return the gradient of the scales (*group) from that of the dense weight (out, in), the codes held constant."""
    return group_sum(grad.float() * real_units(codes, levels), granularity, tile)
