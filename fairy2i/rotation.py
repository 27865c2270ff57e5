"""Rotation: a block-Hadamard transform of a layer's input features, inside which the weight is quantized.

A few weights and a few activations are far larger than the rest, and one scale for a row does them no justice. A
Hadamard matrix H mixes the features of a block so that all of them look alike (QuIP#, arXiv 2402.04396; QuaRot, arXiv
2404.00456). H is orthogonal and its own inverse, so with R' = R H the layer is unchanged, and

    y = q(R') H x        q(R') in the rotated basis: what is stored, and what a kernel multiplies with the rotated x
      = (q(R') H) x      the dense weight in the basis of the model, which is what everything else sees.

Blocks are powers of four wide. So 1/sqrt(width) is a power of two, multiplying by it is exact, and sums in one order
give the same bits on every device. Work at run time, in a kernel that rotates x: log2(width) additions a feature.
"""

import math

import torch
from torch import Tensor

ROTATIONS = (0, 4, 16, 64, 256)


def block_width(features: int, rotation: int) -> int:
    """Return the widest power of four up to ``rotation`` that divides the features; 1 where nothing is rotated."""
    width = 1
    while 4 * width <= rotation and features % (4 * width) == 0:
        width *= 4
    return width


def rotate(x: Tensor, rotation: int) -> Tensor:
    """Multiply each block of the last dimension by a Hadamard matrix; again, and ``x`` is back but for rounding.

    Args:
        x: (..., features), any floating dtype; the sums are made in it.
        rotation: width of a block, one of ROTATIONS. Where it does not divide the features the next smaller power of
            four does that does; 0 returns ``x`` itself.

    Returns:
        A tensor like ``x``: entry j of a block is sum_k (-1)^popcount(j & k) x_k / sqrt(width).
    """
    width = block_width(x.shape[-1], rotation)
    if width == 1:
        return x
    parts = x.unflatten(-1, (-1, width)).movedim(-1, 0).contiguous()  # (width, ..., blocks): long rows to add
    for _ in range(int(math.log2(width))):
        a, b = parts[0::2], parts[1::2]  # neighbours; after log2(width) steps all are in their places again
        parts = torch.cat((a + b, a - b))
    return (parts * (1 / math.sqrt(width))).movedim(0, -1).reshape(x.shape)
