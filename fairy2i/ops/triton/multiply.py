"""Launches of the kernels in :mod:`fairy2i.ops.triton.packed`: shapes of blocks and grids, and partial sums."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..gpu import processors, writes_bf16
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
        depth: chunks that are fetched ahead (planes).
        inner: chunks that a program takes at once (planes); its columns are as many times as many.
    """

    signs: int = 128
    warps: int = 2
    split: int = 1
    depth: int = 2
    inner: int = 1


def planes_columns(tokens: int, kind: int) -> int:
    """Return the columns of the product of a program: tokens, for phase codes twice, at most 32 of them."""
    return min(max(power(tokens * (2 if kind == 0 else 1)), 8), 32)


def _split(words: Tensor, programs: int) -> int:
    """Return how many ranges of chunks give two programs to each processor."""
    return min(power(triton.cdiv(2 * processors(words.device), programs)), 8, words.shape[0])


def planes_config(words: Tensor, tokens: int) -> Config:
    """Return a configuration of the planes kernel: what was good on an H100 with phase codes."""
    chunks, _, n, signs, _ = words.shape
    if tokens == 1 and chunks > 2 and n * signs <= 32768:  # one launch: warps of a program share its rows
        return Config(signs=32, warps=2, inner=4)
    if tokens <= 2 and chunks > 1:
        return Config(signs=64, warps=2, inner=2)
    split = _split(words, triton.cdiv(n * signs, 64)) if tokens <= 4 else 1
    return Config(signs=64, warps=1, split=split)


def blocks_config(words: Tensor, tokens: int) -> Config:
    """Return a configuration of the blocks kernel."""
    rows = 64
    return Config(signs=rows, warps=4, split=_split(words, triton.cdiv(words.shape[2], rows) * triton.cdiv(tokens, 64)))


def _multiply(
    kernel: Any,
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
    config: Config,
    row_block: int,
    token_block: int,
    **more: Any,
) -> None:
    """Let a kernel write ``y``, or partial sums that are then added; round in PyTorch where Triton is interpreted."""
    kind, stages = layout[:2]
    chunks, passes, n, signs, width = words.shape
    tokens, features = x.shape
    split = min(config.split, chunks)
    whole = torch.empty_like(y, dtype=torch.float32) if INTERPRETED else y
    to = whole if split == 1 else y.new_empty((split, *y.shape), dtype=torch.float32)
    with on_device(x):
        kernel[(triton.cdiv(n, row_block), split, triton.cdiv(tokens, token_block))](
            x, words, scales, bias, places, to,
            tokens, x.stride(0), y.shape[1], n, features // (2 if kind == 0 else 1),
            chunks=chunks, chunk_stride=words.stride(0), pass_stride=words.stride(1),
            KIND=kind, STAGES=stages, PASSES=passes, G=signs, BK=width, PLACES=places is not None, SPLIT=split,
            BR=row_block, EXACT=INTERPRETED, num_warps=config.warps, **more,
        )  # fmt: skip
        if split > 1:
            _add_splits(to, bias, whole)
    if INTERPRETED:
        y.copy_(whole)


def planes(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
) -> None:
    """Multiply (tokens, in_features) of bf16 or fp16, rows contiguous, into y; scales of the tensor or of rows."""
    kind, _, granularity = layout[:3]
    chunks, _, n, signs, size = words.shape
    columns = planes_columns(x.shape[0], kind)
    config = planes_config(words, x.shape[0])
    rows = max(config.signs // signs, 1)
    halves = 2 if kind == 0 else 1
    if config.inner > 1:  # tensor cores have 8 columns at least, and few tokens do not fill them
        columns = max(min(power(x.shape[0] * halves), 32 // config.inner), 8 // config.inner)
    even = chunks % (config.inner * min(config.split, chunks)) == 0
    cols = x.shape[1] // halves
    _multiply(
        packed.multiply_planes, x, words, scales, bias, y, layout, places, config,
        row_block=rows, token_block=columns // halves,
        ROWS=granularity == 1, NC=columns * config.inner, INNER=config.inner,
        EVEN=n % rows == 0 and even, FULL=even and cols % (16 * size) == 0, DEPTH=config.depth,
    )  # fmt: skip


def blocks(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
) -> None:
    """Multiply (tokens, in_features) of bf16 or fp16, rows contiguous, into y; any scales."""
    tokens = x.shape[0]
    config = blocks_config(words, tokens)
    block = min(max(power(tokens), 16), 64)
    _multiply(
        packed.multiply_blocks, x, words, scales, bias, y, layout, places, config,
        row_block=config.signs, token_block=block,
        tile=layout[3], GROUPS=layout[2], BM=block,
    )  # fmt: skip


def _add_splits(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Add partial sums (split, tokens, out_features), and the bias, into y."""
    grid = (triton.cdiv(y.numel(), 512),)
    packed.add_splits[grid](parts, bias, y, *y.shape, SPLIT=parts.shape[0], BLOCK=512, num_warps=4)


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
    if writes_bf16(layout, dtype):
        with on_device(words):
            packed.write_dense_bf16[(triton.cdiv(n, rows), chunks)](
                words, scales, places, dense, n, in_features // 2, words.stride(0), words.stride(1), in_features,
                STAGES=stages, PASSES=passes, G=signs, BK=width, ROWS=granularity == 1, PLACES=places is not None,
                BR=rows, WB=width, EXACT=INTERPRETED, num_warps=4,
            )  # fmt: skip
        return dense.to(dtype)
    with on_device(words):
        packed.write_dense[(triton.cdiv(n, rows), chunks)](
            words, scales, places, dense, n, in_features // (2 if kind == 0 else 1), tile, words.stride(0),
            words.stride(1), in_features,
            KIND=kind, STAGES=stages, PASSES=passes, G=signs, BK=width, GROUPS=granularity,
            PLACES=places is not None, BR=rows, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dense.to(dtype)
