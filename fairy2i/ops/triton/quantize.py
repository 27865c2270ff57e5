"""Launches of the kernels in :mod:`fairy2i.ops.triton.phase`: shapes of blocks and grids, and the buffers between."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import phase, power

PROGRAMS = 512  # at most, where one scale is of all entries; the same everywhere, so that results are
INTERPRETED = triton.knobs.runtime.interpret  # it cuts bits off where a GPU rounds to nearest even
MASTERS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _sizes(matrix: Tensor) -> tuple[int, ...]:
    """Return n, m and what the kernels address 2x2 blocks by: strides, and how far A21 and A12 are from A11."""
    n, m = matrix.shape[0] // 2, matrix.shape[1] // 2
    row, col = matrix.stride()
    return n, m, row, col, n * row, m * col


def _chunk(n: int, m: int, granularity: str, tile: int, turned: bool = False, most: int = 2048) -> tuple[int, int, int]:
    """Return rows and columns of a chunk, and warps: 8 blocks a thread, more of them along the side that is contiguous.

    ``turned``: columns are contiguous. ``most``: blocks in a chunk.
    """
    if granularity == "tile":
        cols = min(power(min(tile, m)), 64)
        rows = min(power(min(tile, n)), most // cols)
    elif turned:
        rows = min(power(n), 16 if granularity == "row" else 64)
        cols = min(power(m), most // rows)
    else:
        cols = min(power(m), most if granularity == "row" else 1024)
        rows = 1 if granularity == "row" else min(power(n), 1024 // cols)
    return rows, cols, min(max(rows * cols // 256, 1), 8)


def _own(chunk: tuple[int, int, int]) -> int:
    return min(chunk[1], 8)


def _rectangles(n: int, m: int, granularity: str, tile: int, rows: int) -> tuple[int, int, int]:
    """Return height and width of a program's rectangle, and how many programs there are."""
    if granularity == "tile":
        return tile, tile, triton.cdiv(n, tile) * triton.cdiv(m, tile)
    height = rows if granularity == "row" else triton.cdiv(n, min(PROGRAMS, n))
    return height, m, triton.cdiv(n, height)


def _write(
    weight: Tensor | None,
    scales: Tensor,
    partials: Tensor | None,
    dense: Tensor | None,
    codes: Tensor | None,
    sizes: tuple[int, ...],
    chunk: tuple[int, int, int],
    *,
    stages: int,
    granularity: str,
    tile: int,
    mean: bool,
    master: torch.dtype,
) -> None:
    """Launch what writes the dense weight, the block codes, or both; it reads the codes where there is no weight."""
    if INTERPRETED and dense is not None and not (dense.dtype == master == torch.float32):
        options: Any = {"stages": stages, "granularity": granularity, "tile": tile, "mean": mean}
        wide = torch.empty_like(dense, dtype=torch.float32)
        _write(weight, scales, partials, wide, codes, sizes, chunk, **options, master=torch.float32)
        dense.copy_(wide.to(master))
        return
    n, m, *layout = sizes
    rows, cols, warps = chunk
    height, width, programs = _rectangles(n, m, granularity, tile, rows)
    layout = [*layout, n * m, 2 * n * m, height]
    kinds: Any = {
        "STAGES": stages,
        "MEAN": mean,
        "MASTER": MASTERS[master],
        "FROM_CODES": weight is None,
        "DENSE": dense is not None,
        "CODES": codes is not None and weight is not None,
        "BR": rows,
        "BC": cols,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }
    if granularity == "tensor":
        phase.write_tensor[(programs,)](
            weight, scales, partials, dense, codes, n, m, *layout, n * m, programs,
            PROGRAMS=power(programs), **kinds,
        )  # fmt: skip
    else:
        groups = n if granularity == "row" else programs
        phase.write_groups[(programs,)](
            weight, scales, dense, codes, n, m, *layout, width, groups,
            ROWS=granularity == "row", OWN=_own(chunk), **kinds,
        )  # fmt: skip


def _sum_stages(weight: Tensor, scales: Tensor, sizes: tuple[int, ...], chunk: tuple[int, int, int]) -> Tensor:
    """Launch the sums of all stages where one scale is of all entries; they leave the scales of the last stage open."""
    n, m, *layout = sizes
    rows, cols, warps = chunk
    height, _, programs = _rectangles(n, m, "tensor", 0, rows)
    stages = scales.shape[0]
    partials = torch.empty((stages, 6, programs), dtype=torch.float64, device=weight.device)
    for stage in range(stages):
        phase.sum_stage_of_tensor[(programs,)](
            weight, scales, partials, n, m, *layout, height, n * m,
            STAGE=stage, PROGRAMS=power(programs), BR=rows, BC=cols, OWN=_own(chunk),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return partials


def quantize(
    weight: Tensor,
    scales: Tensor,
    dense: Tensor | None,
    codes: Tensor | None,
    *,
    stages: int,
    granularity: str,
    tile: int,
    mean: bool,
) -> None:
    """Write the dense quantized weight, the block codes, or both; with ``mean`` the scales too.

    Args:
        weight: (2n, 2m), any strides.
        scales: float32 (T, 2, 2, *group), contiguous; read, or written with ``mean``.
        dense: (2n, 2m), contiguous, any floating dtype, or None.
        codes: uint8 (ceil(T/2), n, m), contiguous, or None.
    """
    sizes = _sizes(weight)
    chunk = _chunk(sizes[0], sizes[1], granularity, tile, weight.stride(0) < weight.stride(1))
    partials = _sum_stages(weight, scales, sizes, chunk) if mean and granularity == "tensor" else None
    _write(
        weight, scales, partials, dense, codes, sizes, chunk,
        stages=stages, granularity=granularity, tile=tile, mean=mean, master=weight.dtype,
    )  # fmt: skip


def dequantize(
    codes: Tensor,
    scales: Tensor,
    dense: Tensor,
    *,
    stages: int,
    granularity: str,
    tile: int,
    master: torch.dtype,
) -> None:
    """Write the dense weight of block codes, rounded to ``master`` and then to its own dtype."""
    n, m = codes.shape[-2:]
    chunk = _chunk(n, m, granularity, tile)
    _write(
        None, scales, None, dense, codes, (n, m, 0, 0, 0, 0), chunk,
        stages=stages, granularity=granularity, tile=tile, mean=False, master=master,
    )  # fmt: skip


def scale_gradient(
    grad: Tensor, weight: Tensor, codes: Tensor | None, scales: Tensor, *, stages: int, granularity: str, tile: int
) -> Tensor:
    """Return the gradient of the scales, float32 and of their shape; from block codes where they are given."""
    n, m, *layout = _sizes(weight)
    _, _, *grad_layout = _sizes(grad)
    chunk = _chunk(n, m, granularity, tile, weight.stride(0) < weight.stride(1), most=512)
    rows, cols, warps = chunk
    height, width, programs = _rectangles(n, m, granularity, tile, rows)
    shared = granularity == "tensor"
    groups = n if granularity == "row" else programs
    if shared:
        sums = torch.empty((4 * stages, programs), dtype=torch.float64, device=grad.device)
    else:
        sums = torch.empty(scales.shape, dtype=torch.float32, device=grad.device)
    phase.sum_scale_gradients[(programs,)](
        grad, weight, codes, scales, sums, n, m, *grad_layout, *layout, n * m, height, width, groups,
        STAGES=stages, ROWS=granularity == "row", SHARED=shared, FROM_CODES=codes is not None,
        BR=rows, BC=cols, OWN=_own(chunk), num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return sums.sum(1).float().view(scales.shape) if shared else sums
