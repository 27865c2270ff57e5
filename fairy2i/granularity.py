"""Groups of matrix entries that share a scale: the whole matrix, a row, or a square tile.

Scales of a matrix (rows, cols) have the trailing shape
    tensor: ()        row: (rows,)        tile: (ceil(rows/tile), ceil(cols/tile)),
with any number of leading dimensions before it. The last tiles of a side that ``tile`` does not divide are smaller.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Granularity = Literal["tensor", "row", "tile"]
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row", "tile")


def group_shape(rows: int, cols: int, granularity: Granularity, tile: int) -> tuple[int, ...]:
    """Return the trailing shape of the scales of a (rows, cols) matrix."""
    if granularity == "tensor":
        return ()
    if granularity == "row":
        return (rows,)
    return (-(-rows // tile), -(-cols // tile))


def wide(x: Tensor) -> torch.dtype:
    """Return what to sum float32 in where the order of the terms must not show: float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def group_sum(x: Tensor, granularity: Granularity, tile: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sum the entries of each group, in ``dtype`` if given: (..., rows, cols) -> (..., *group_shape)."""
    if granularity == "tensor":
        return x.sum(dim=(-2, -1), dtype=dtype)
    if granularity == "row":
        return x.sum(dim=-1, dtype=dtype)
    rows, cols = x.shape[-2:]
    a, b = group_shape(rows, cols, granularity, tile)
    x = F.pad(x, (0, b * tile - cols, 0, a * tile - rows))
    return x.unflatten(-1, (b, tile)).unflatten(-3, (a, tile)).sum(dim=(-3, -1), dtype=dtype)


def expand_groups(scales: Tensor, rows: int, cols: int, granularity: Granularity, tile: int) -> Tensor:
    """Give each entry its group's scale: (..., *group_shape) -> broadcastable to (..., rows, cols)."""
    if granularity == "tensor":
        return scales[..., None, None]
    if granularity == "row":
        return scales[..., None]
    full = scales.repeat_interleave(tile, dim=-2)[..., :rows, :]
    return full.repeat_interleave(tile, dim=-1)[..., :cols]
