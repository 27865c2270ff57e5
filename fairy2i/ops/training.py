"""Ops of quantized training: a master weight becomes its dense quantized weight, in one kernel call instead of many.

Schemas, fakes and the choice of a backend. The functions of :mod:`fairy2i.phase_quant` are the reference, and what runs
wherever no kernel is: :func:`fused` says where one is, and what calls these ops asks it first. Triton is imported at
the first use of a kernel. Codes are *block codes* here, uint8 (ceil(T/2), n, m): byte s of entry (i, j) has u and w of
stage 2s in bits 0-1 and 2-3, and those of stage 2s+1 in bits 4-5 and 6-7; at two stages a byte is four real weights.
With a rotation (:mod:`fairy2i.rotation`) codes and scales are of the rotated weight, all else is in the model's basis.

FAIRY2I_TRAINING_BACKEND=torch, or :func:`set_backend`, turns the kernels off; "triton" asks for them on any device, as
Triton's interpreter (TRITON_INTERPRET=1) runs them on the processor.
"""

import importlib.util
import os
from typing import Any, Literal

import torch
from torch import Tensor

from ..granularity import Granularity, group_shape
from ..phase_quant import SCALE_MIN, phase_dequantize, phase_quantize, phase_scale_gradient
from ..rotation import block_width, rotate
from .triton import on_device

Backend = Literal["auto", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton")
MOST_STAGES = 4  # that the kernels are made for
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of master weights that they take

_has_triton = importlib.util.find_spec("triton") is not None
_backend: str = os.environ.get("FAIRY2I_TRAINING_BACKEND", "auto")


def set_backend(name: Backend) -> str:
    """Choose what quantizes in training: "auto" (kernels on GPUs), "torch" or "triton"; return the choice before.

    Raises:
        ValueError: the name is unknown, or Triton is not installed.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"the training backend is one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "triton" and not _has_triton:
        raise ValueError("the training backend 'triton' needs the package triton")
    before, _backend = _backend, name
    return before


if _backend not in BACKENDS:
    raise ValueError(f"FAIRY2I_TRAINING_BACKEND is one of {', '.join(BACKENDS)}, not {_backend!r}")


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels of training, as they are chosen now, work on such tensors."""
    if _backend == "torch" or not _has_triton or dtype not in DTYPES:
        return False
    return device.type == "cuda" or (_backend == "triton" and device.type == "cpu")


def fused(weight: Tensor, stages: int, dtype: torch.dtype | None = None) -> bool:
    """Return whether kernels quantize this weight, or one of ``dtype`` on the same device."""
    return stages <= MOST_STAGES and has_kernels(weight.device, dtype or weight.dtype)


def clamped(scales: Tensor) -> Tensor:
    """Return given scales as the quantizer takes them: a copy, at least the least."""
    return scales.float().clamp(min=SCALE_MIN)


# Block codes


def to_blocks(codes: Tensor) -> Tensor:
    """Pack phase codes, uint8 (T, 2, n, m), into block codes."""
    nibbles = codes[:, 0] | (codes[:, 1] << 2)
    blocks = nibbles[0::2].clone()
    odd = nibbles[1::2]
    blocks[: odd.shape[0]] |= odd << 4
    return blocks


def from_blocks(blocks: Tensor, stages: int) -> Tensor:
    """Unpack block codes into phase codes, uint8 (T, 2, n, m)."""
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=1).flatten(0, 1)[:stages]
    return torch.stack((nibbles & 3, nibbles >> 2), dim=1)


# Ops


def _turned(
    matrix: Tensor, width: int, master: torch.dtype = torch.float32, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a matrix rotated by a kernel of its own, where the others do not do it on their way: see `rotates`."""
    from .triton.rotate import rotate as run

    return run(matrix, width, master, dtype or master)


def _widths(m: int, rotation: int, granularity: Granularity, tile: int, *matrices: Tensor) -> tuple[int, int]:
    """Return the width of the blocks that a kernel of its own rotates, and that the others do on their way; 1: none."""
    from .triton.quantize import rotates

    width = block_width(2 * m, rotation)
    return (1, width) if rotates(m, width, granularity, tile, *matrices) else (width, 1)


def _outputs(weight: Tensor, stages: int, dtype: torch.dtype | None, codes: bool) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    dense = weight.new_empty((rows, cols) if dtype is not None else (0,), dtype=dtype or weight.dtype)
    shape = (-(-stages // 2), rows // 2, cols // 2) if codes else (0,)
    return dense, weight.new_empty(shape, dtype=torch.uint8)


def _quantize(
    weight: Tensor,
    scales: Tensor | None,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
    dtype: torch.dtype | None,
    codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dense weight, the scales, means where none are given, and the block codes."""
    master = weight.dtype
    if not fused(weight, stages):
        dense, blocks = _outputs(weight, stages, None, False)
        settings: Any = {"granularity": granularity, "tile": tile}
        found, used = phase_quantize(_rotated(weight, rotation), stages=stages, scales=scales, **settings)
        if dtype is not None:
            dense = _dequantize(found, used, granularity, tile, rotation, master, dtype)
        return dense, used, to_blocks(found) if codes else blocks
    from .triton.quantize import quantize

    apart, width = _widths(weight.shape[1] // 2, rotation, granularity, tile, weight)
    made = torch.float32 if apart > 1 and dtype is not None else dtype
    with on_device(weight):
        weight = _turned(weight, apart) if apart > 1 else weight
        if mean := scales is None:
            dense, used, blocks = _fake_mean(weight, stages, granularity, tile, rotation, made, codes)
        else:
            dense, blocks = _outputs(weight, stages, made, codes)
            used = scales.contiguous()
        given = (None if dtype is None else dense, blocks if codes else None)
        how: Any = {"stages": stages, "granularity": granularity, "tile": tile, "width": width}
        quantize(weight, used, *given, **how, mean=mean)
        if apart > 1 and dtype is not None:
            dense = _turned(dense, apart, master, dtype)
    return dense if dtype is not None else dense.to(master), used, blocks


def _rotated(matrix: Tensor, rotation: int) -> Tensor:
    return rotate(matrix.float(), rotation) if rotation else matrix


def _dequantize(
    codes: Tensor,
    scales: Tensor,
    granularity: Granularity,
    tile: int,
    rotation: int,
    master: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Return the dense weight of phase codes, by PyTorch."""
    dense = rotate(phase_dequantize(codes, scales, granularity=granularity, tile=tile), rotation)
    return dense.to(master).to(dtype).contiguous()


def _quantize_mean(
    weight: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
    dtype: torch.dtype | None,
    codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _quantize(weight, None, stages, granularity, tile, rotation, dtype, codes)


def _fake_mean(
    weight: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
    dtype: torch.dtype | None,
    codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = group_shape(weight.shape[0] // 2, weight.shape[1] // 2, granularity, tile)
    dense, blocks = _outputs(weight, stages, dtype, codes)
    return dense, weight.new_empty((stages, 2, 2, *groups), dtype=torch.float32), blocks


def _quantize_given(
    weight: Tensor,
    scales: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
    dtype: torch.dtype | None,
    codes: bool,
    after: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dense, _, blocks = _quantize(weight, scales, stages, granularity, tile, rotation, dtype, codes)
    return dense, blocks


def _fake_given(
    weight: Tensor,
    scales: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
    dtype: torch.dtype | None,
    codes: bool,
    after: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _outputs(weight, stages, dtype, codes)


def _dequantize_blocks(
    blocks: Tensor,
    scales: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
    master: torch.dtype,
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    if not fused(blocks, stages, master):
        return _dequantize(from_blocks(blocks, stages), scales, granularity, tile, rotation, master, dtype)
    from .triton.quantize import dequantize

    apart, width = _widths(blocks.shape[-1], rotation, granularity, tile)
    first, last = (torch.float32, torch.float32) if apart > 1 else (master, dtype)
    dense = _fake_blocks(blocks, scales, stages, granularity, tile, rotation, first, last, after)
    how: Any = {"stages": stages, "granularity": granularity, "tile": tile, "width": width}
    with on_device(blocks):
        dequantize(blocks, scales, dense, **how, master=first)
        return _turned(dense, apart, master, dtype) if apart > 1 else dense


def _fake_blocks(
    blocks: Tensor,
    scales: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
    master: torch.dtype,
    dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    _, n, m = blocks.shape
    return blocks.new_empty((2 * n, 2 * m), dtype=dtype)


def _scale_gradient(
    grad: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scales: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
) -> Tensor:
    if not fused(weight, stages):
        settings: Any = {"granularity": granularity, "tile": tile}
        if blocks is None:
            codes, _ = phase_quantize(_rotated(weight, rotation), stages=stages, scales=scales, **settings)
        else:
            codes = from_blocks(blocks, stages)
        return phase_scale_gradient(_rotated(grad, rotation), codes, **settings)
    from .triton.quantize import scale_gradient

    apart, width = _widths(weight.shape[1] // 2, rotation, granularity, tile, grad, weight)
    how: Any = {"stages": stages, "granularity": granularity, "tile": tile, "width": width}
    with on_device(weight):
        if apart > 1:
            grad = _turned(grad, apart)
            weight = _turned(weight, apart) if blocks is None else grad  # only its shape counts beside codes
        return scale_gradient(grad, weight, blocks, scales.contiguous(), **how)


def _fake_scale_gradient(
    grad: Tensor,
    weight: Tensor,
    blocks: Tensor | None,
    scales: Tensor,
    stages: int,
    granularity: Granularity,
    tile: int,
    rotation: int,
) -> Tensor:
    return torch.empty_like(scales, dtype=torch.float32, memory_format=torch.contiguous_format)


# `after` is not used: a backward gives its gradient there, so that a compiler neither moves the op into the forward nor
# takes it for the same call in the forward, and would keep a dense weight from one to the other.
# What is not asked for (dtype None: the dense weight; codes False: the block codes) is returned with no elements.
_OPS: dict[str, tuple[str, Any, Any]] = {
    "phase_quantize_mean": (
        "(Tensor weight, int stages, str granularity, int tile, int rotation, ScalarType? dtype, bool codes) "
        "-> (Tensor dense, Tensor scales, Tensor blocks)",
        _quantize_mean,
        _fake_mean,
    ),
    "phase_quantize_given": (
        "(Tensor weight, Tensor scales, int stages, str granularity, int tile, int rotation, ScalarType? dtype, "
        "bool codes, Tensor? after) -> (Tensor dense, Tensor blocks)",
        _quantize_given,
        _fake_given,
    ),
    "phase_dequantize_blocks": (
        "(Tensor blocks, Tensor scales, int stages, str granularity, int tile, int rotation, ScalarType master, "
        "ScalarType dtype, Tensor? after) -> Tensor",
        _dequantize_blocks,
        _fake_blocks,
    ),
    "phase_scale_gradient": (
        "(Tensor grad, Tensor weight, Tensor? blocks, Tensor scales, int stages, str granularity, int tile, "
        "int rotation) -> Tensor",
        _scale_gradient,
        _fake_scale_gradient,
    ),
}
_library = torch.library.Library("fairy2i", "FRAGMENT")
for _name, (_schema, _run, _fake) in _OPS.items():
    _library.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fairy2i::{_name}", _fake, lib=_library)
