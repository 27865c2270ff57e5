"""A kernel that multiplies blocks of features by a Hadamard matrix: what :func:`fairy2i.rotation.rotate` does.

A program has some blocks, of any rows. Sums are float32 and made in the order of the reference, neighbours first, so
the bits are the same. A block is read and written once; between the steps numbers move within and between threads.
"""

# mypy: ignore-errors
# a kernel is written in a language of its own

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device
from .quantize import INTERPRETED, MASTERS

ENTRIES = 4096  # of a program


@triton.jit
def rotate_blocks(
    x, y, blocks, across, row_stride, col_stride, scale,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr, MASTER: tl.constexpr,
):  # fmt: skip
    """Write y (rows, across * WIDTH), contiguous, from x with any strides."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None]
    row = (block // across).to(tl.int64)
    start = (block % across).to(tl.int64) * WIDTH
    column = tl.arange(0, WIDTH)
    z = tl.load(x + row[:, None] * row_stride + (start[:, None] + column[None, :]) * col_stride, inside, 0.0)
    z = z.to(tl.float32)
    for _ in tl.static_range(STEPS):
        a, b = tl.split(tl.reshape(z, [BLOCKS, WIDTH // 2, 2]))
        z = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [BLOCKS, WIDTH])
    z = z * scale
    at = y + block.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(at, z.to(MASTER).to(y.dtype.element_ty), inside)


def rotate(x: Tensor, width: int, master: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Return the blocks of ``width`` features of a (rows, features) matrix rotated, contiguous.

    The float32 sums are rounded to ``master``, and then to ``dtype``.
    """
    if INTERPRETED and not (master == dtype == torch.float32):  # it cuts bits off where a GPU rounds
        return rotate(x, width, torch.float32, torch.float32).to(master).to(dtype)
    rows, features = x.shape
    y = torch.empty(rows, features, dtype=dtype, device=x.device)
    if not x.numel():
        return y
    blocks = x.numel() // width
    some = max(ENTRIES // width, 1)
    with on_device(x):
        rotate_blocks[(triton.cdiv(blocks, some),)](
            x, y, blocks, features // width, x.stride(0), x.stride(1), 1 / math.sqrt(width),
            WIDTH=width, STEPS=width.bit_length() - 1, BLOCKS=some, MASTER=MASTERS[master], num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y
