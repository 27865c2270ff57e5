"""Launches of the kernels in :mod:`fairy2i.ops.triton.packed`: shapes of blocks and grids, and partial sums."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..gpu import pieces
from . import on_device, packed, power

INTERPRETED = triton.knobs.runtime.interpret  # its NumPy knows no bf16, and it cuts bits off where a GPU rounds
Layout = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        signs: rows of the codes times their signs in a program (planes), or rows (blocks).
        warps: of a program.
        split: ranges of columns, each with programs of its own.
        depth: chunks that are fetched ahead.
        magic: whether bits become numbers by the shorter way (planes; not for float32).
    """

    signs: int = 128
    warps: int = 2
    split: int = 1
    depth: int = 3
    magic: bool = True


# (rows of codes, chunks, G, columns of the product): measured by `benchmarks/bench_inference.py --tune`
TUNED: dict[tuple[int, int, int, int], Config] = {}


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def planes_columns(tokens: int, kind: int) -> int:
    """Return the columns of the product of a program: tokens, for phase codes twice, at most 32 of them."""
    return min(max(power(tokens * (2 if kind == 0 else 1)), 8), 32)


def planes_config(words: Tensor, columns: int) -> Config:
    """Return the measured configuration for such words, or a guess: enough programs for four warps a processor."""
    chunks, _, n, signs, _ = words.shape
    if (tuned := TUNED.get((n, chunks, signs, columns))) is not None:
        return tuned
    programs = triton.cdiv(n * signs, 128)
    wanted = 2 * _processors(words)
    split = min(power(triton.cdiv(wanted, programs)), 8, chunks) if programs < wanted else 1
    return Config(split=split)


def blocks_config(words: Tensor, tokens: int) -> Config:
    """Return a configuration of the blocks kernel."""
    chunks, _, n, _, _ = words.shape
    rows = 64
    programs = triton.cdiv(n, rows) * triton.cdiv(tokens, 64)
    wanted = 2 * _processors(words)
    split = min(power(triton.cdiv(wanted, programs)), 8, chunks) if programs < wanted else 1
    return Config(signs=rows, warps=4, split=split)


def _settle(run: Any, y: Tensor, bias: Tensor | None, split: int) -> None:
    """Let a kernel write ``y``, or partial sums that are then added; round in PyTorch where Triton is interpreted."""
    rounded = y
    if INTERPRETED:
        y = torch.empty_like(y, dtype=torch.float32)
    if split == 1:
        run(y)
    else:
        parts = y.new_empty((split, *y.shape), dtype=torch.float32)
        run(parts)
        packed.add_splits[(triton.cdiv(y.numel(), 512),)](parts, bias, y, *y.shape, SPLIT=split, BLOCK=512, num_warps=4)
    if INTERPRETED:
        rounded.copy_(y)


def planes(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
    config: Config | None = None,
) -> None:
    """Multiply (tokens, in_features), rows contiguous, into y; scales of the tensor or of rows."""
    kind, stages, granularity = layout[:3]
    chunks, passes, n, signs, width = words.shape
    tokens = x.shape[0]
    columns = planes_columns(tokens, kind)
    config = config or planes_config(words, columns)
    rows = max(config.signs // signs, 1)
    split = min(config.split, chunks)
    halves = 2 if kind == 0 else 1
    count = pieces(x.dtype)
    grid = (triton.cdiv(n, rows), split, triton.cdiv(tokens, columns // halves))

    def run(to: Tensor) -> None:
        packed.multiply_planes[grid](
            x, words, scales, bias, places, to,
            tokens, x.stride(0), y.shape[1], n, x.shape[1] // halves, chunks, words.stride(0), words.stride(1),
            y.shape[1],
            KIND=kind, STAGES=stages, PASSES=passes, G=signs, BK=width,
            ROWS=granularity == 1, PLACES=places is not None, PIECES=count, MAGIC=config.magic and count < 3,
            SPLIT=split, BR=rows, NC=columns, EVEN=n % rows == 0, DEPTH=config.depth, EXACT=INTERPRETED,
            num_warps=config.warps,
        )  # fmt: skip

    with on_device(x):
        _settle(run, y, bias, split)


def blocks(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
    config: Config | None = None,
) -> None:
    """Multiply (tokens, in_features), rows contiguous, into y; any scales."""
    kind, stages, granularity, tile = layout[:4]
    chunks, passes, n, signs, width = words.shape
    tokens = x.shape[0]
    config = config or blocks_config(words, tokens)
    split = min(config.split, chunks)
    block = min(max(power(tokens), 16), 64)
    grid = (triton.cdiv(n, config.signs), split, triton.cdiv(tokens, block))

    def run(to: Tensor) -> None:
        packed.multiply_blocks[grid](
            x, words, scales, bias, places, to,
            tokens, x.stride(0), y.shape[1], n, x.shape[1] // (2 if kind == 0 else 1), tile, chunks, words.stride(0),
            words.stride(1), y.shape[1],
            KIND=kind, STAGES=stages, PASSES=passes, G=signs, BK=width, GROUPS=granularity,
            PLACES=places is not None, SPLIT=split, BR=config.signs, BM=block, EXACT=INTERPRETED,
            num_warps=config.warps,
        )  # fmt: skip

    with on_device(x):
        _settle(run, y, bias, split)


def dense_weight(
    words: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    layout: Layout,
    places: Tensor | None,
) -> Tensor:
    """Return the dense weight (out_features, in_features), rounded once."""
    kind, stages, granularity, tile = layout[:4]
    chunks, passes, n, signs, width = words.shape
    dense = torch.empty(out_features, in_features, dtype=torch.float32 if INTERPRETED else dtype, device=words.device)
    rows = 32
    with on_device(words):
        packed.write_dense[(triton.cdiv(n, rows), chunks)](
            words, scales, places, dense, n, in_features // (2 if kind == 0 else 1), tile, words.stride(0),
            words.stride(1), in_features,
            KIND=kind, STAGES=stages, PASSES=passes, G=signs, BK=width, GROUPS=granularity,
            PLACES=places is not None, BR=rows, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dense.to(dtype)
