"""The bit layout of packed codes: a byte holds four codes of two bits, or eight of one.

Along the last dimension, entry j of a row sits in byte j // 4, at bits 2 * (j % 4) and up (for one-bit codes in byte
j // 8, at bit j % 8). Rows start on a byte; the padding bits of a last byte are 0.

A worked byte: the codes -i, +1, -1, +i are 2, 1, 0, 3, in bits 10, 01, 00, 11. Entry 0 takes the lowest two bits, so
the byte is 11 00 01 10 = 0xC6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_columns(columns: int, bits: int) -> int:
    """Return the bytes of a row of so many codes."""
    return -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 (..., columns), each below 2**bits; on any device.
        bits: 1 or 2.

    Returns:
        uint8 (..., ceil(columns * bits / 8)).

    Raises:
        ValueError: a code does not fit its bits.
    """
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    per_byte = 8 // bits
    width = packed_columns(codes.shape[-1], bits)
    slots = F.pad(codes, (0, width * per_byte - codes.shape[-1])).unflatten(-1, (width, per_byte))
    packed = slots[..., 0].clone()
    for slot in range(1, per_byte):
        packed |= slots[..., slot] << (slot * bits)
    return packed


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Unpack what :func:`pack_codes` packed.

    Args:
        packed: uint8 (..., bytes of a row).
        columns: codes in a row.
        bits: 1 or 2.

    Returns:
        uint8 (..., columns).

    Raises:
        ValueError: the rows have another length than so many codes need.
    """
    if packed.shape[-1] != packed_columns(columns, bits):
        need = packed_columns(columns, bits)
        raise ValueError(f"rows of {columns} codes of {bits} bits have {need} bytes, got {packed.shape[-1]}")
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :columns]
