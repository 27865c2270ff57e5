"""A kernel for calibration: pairs of columns rounded one after the other, each error made good in those behind it.

What :func:`fairy2i.calibrate.round_with_feedback` does with some 70 small operations a pair of columns, for a group of
neighbouring pairs, in one launch. Rows of blocks are independent: a program has a few, with all columns of the group in
registers, and goes through the pairs; of the factor it reads two rows at a time. Row scales only.
"""

# mypy: ignore-errors
# a kernel is written in a language of its own

import triton
import triton.language as tl
from torch import Tensor

from . import on_device, power

ROWS = 4  # of blocks, in a program


@triton.jit
def _column(tile, here):
    return tl.sum(tl.where(here[None, :], tile, 0.0), 1)


@triton.jit
def _round(re, im, codes, scales, first, n, row, inside, STAGES: tl.constexpr, PLANE: tl.constexpr):
    """Return what is left of a column of U (PLANE 0) or W (1) behind all stages; write its codes."""
    for t in tl.static_range(STAGES):
        p = re + im
        minus_q = im - re
        p_positive = tl.where(p == 0, re, p) >= 0
        q_positive = tl.where(minus_q == 0, p, minus_q) <= 0
        real = p_positive == q_positive
        sign = tl.where(p_positive, 1.0, -1.0)
        code = tl.where(real, 0, 2) + p_positive.to(tl.int32)
        tl.store(codes + (2 * t + PLANE) * first, code.to(tl.uint8), inside)
        at = scales + (4 * t + 2 * PLANE) * n + row
        re -= tl.where(real, sign * tl.load(at, inside, 0.0), 0.0)
        im -= tl.where(real, 0.0, sign * tl.load(at + n, inside, 0.0))
    return re, im


@triton.jit(do_not_specialize=["n", "start", "width"])
def round_group(
    rest, errors, codes, factor, scales, n, columns, start, width,
    STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Round columns ``start`` to ``start + width`` of rest (2n, columns), in place what they were when rounded.

    errors (2n, BC), codes uint8 (STAGES, 2, n, columns / 2), factor (columns, columns), scales (STAGES, 2, 2, n).
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = row < n
    column = tl.arange(0, BC)
    there = inside[:, None] & (column < width)[None, :]
    at = rest + row.to(tl.int64)[:, None] * columns + (start + column)[None, :]
    down = n.to(tl.int64) * columns
    top = tl.load(at, there, 0.0)
    bottom = tl.load(at + down, there, 0.0)
    error_top = tl.zeros([BR, BC], tl.float32)
    error_bottom = tl.zeros([BR, BC], tl.float32)
    half = columns // 2
    for k in range(0, width, 2):
        line = factor + (start + k).to(tl.int64) * columns + start
        left, right = column == k, column == k + 1
        a11, a12 = _column(top, left), _column(top, right)
        a21, a22 = _column(bottom, left), _column(bottom, right)
        re_u, im_u, re_w, im_w = (a11 + a22) * 0.5, (a21 - a12) * 0.5, (a11 - a22) * 0.5, (a12 + a21) * 0.5
        code_at = codes + row.to(tl.int64) * half + (start + k) // 2
        re_u, im_u = _round(re_u, im_u, code_at, scales, n.to(tl.int64) * half, n, row, inside, STAGES, 0)
        re_w, im_w = _round(re_w, im_w, code_at, scales, n.to(tl.int64) * half, n, row, inside, STAGES, 1)
        d00, d01 = tl.load(line + k), tl.load(line + k + 1)
        d11 = tl.load(line + columns + k + 1)
        top_left = (re_u + re_w) / d00  # what is left over is the error of the pair
        top_right = (im_w - im_u - top_left * d01) / d11
        bottom_left = (im_u + im_w) / d00
        bottom_right = (re_u - re_w - bottom_left * d01) / d11
        behind = (column > k + 1) & (column < width)
        first = tl.load(line + column, behind, 0.0)[None, :]
        second = tl.load(line + columns + column, behind, 0.0)[None, :]
        top -= top_left[:, None] * first + top_right[:, None] * second
        bottom -= bottom_left[:, None] * first + bottom_right[:, None] * second
        left, right = left[None, :], right[None, :]
        error_top = tl.where(left, top_left[:, None], tl.where(right, top_right[:, None], error_top))
        error_bottom = tl.where(left, bottom_left[:, None], tl.where(right, bottom_right[:, None], error_bottom))
    tl.store(at, top, there)
    tl.store(at + down, bottom, there)
    error_at = errors + row[:, None] * BC + column[None, :]
    tl.store(error_at, error_top, inside[:, None])
    tl.store(error_at + n * BC, error_bottom, inside[:, None])


def round_columns(rest: Tensor, codes: Tensor, factor: Tensor, scales: Tensor, start: int, width: int) -> Tensor:
    """Round a group of columns and return their errors, float32 (2n, width).

    Args:
        rest: float32 (2n, columns), contiguous, pairs side by side; in the group what they were when rounded, after it.
        codes: uint8 (T, 2, n, columns / 2), contiguous; written.
        factor: float32 (columns, columns), contiguous, upper.
        scales: float32 (T, 2, 2, n), contiguous.
        start, width: the group, both even.
    """
    rows, columns = rest.shape
    n, wide = rows // 2, power(width)
    errors = rest.new_empty(rows, wide)
    with on_device(rest):
        round_group[(triton.cdiv(n, ROWS),)](
            rest, errors, codes, factor, scales, n, columns, start, width,
            STAGES=scales.shape[0], BR=ROWS, BC=wide, num_warps=4,
        )  # fmt: skip
    return errors[:, :width]
