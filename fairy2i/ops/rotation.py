"""The op that rotates master weights and their gradients in training, in one kernel where there is a GPU.

:func:`fairy2i.rotation.rotate` is the reference, and what runs elsewhere; the bits are the same.
"""

import torch
from torch import Tensor

from ..rotation import block_width, rotate
from .training import has_kernels


def _rotate(x: Tensor, rotation: int, after: Tensor | None) -> Tensor:
    width = block_width(x.shape[-1], rotation)
    if width == 1:  # an op returns no tensor that it was given
        return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not has_kernels(x.device, x.dtype):
        return rotate(x.float(), rotation).contiguous()
    from .triton.rotate import rotate as run

    return run(x, width)


def _fake(x: Tensor, rotation: int, after: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


_library = torch.library.Library("fairy2i", "FRAGMENT")
# `after`: see fairy2i.ops.training
_library.define("rotate(Tensor x, int rotation, Tensor? after) -> Tensor", tags=(torch.Tag.needs_fixed_stride_order,))
_library.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("fairy2i::rotate", _fake, lib=_library)
