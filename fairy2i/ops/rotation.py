"""The op that rotates master weights and their gradients in training, in one kernel where there is a GPU.

:func:`fairy2i.rotation.rotate` is the reference, and what runs elsewhere; the bits are the same.
"""

import torch
from torch import Tensor

from ..rotation import block_width, rotate
from .training import has_kernels


def _rotate(
    x: Tensor, rotation: int, master: torch.dtype | None, dtype: torch.dtype | None, after: Tensor | None
) -> Tensor:
    width = block_width(x.shape[-1], rotation)
    first, last = master or torch.float32, dtype or torch.float32
    if width > 1 and has_kernels(x.device, x.dtype):
        from .triton.rotate import rotate as run

        return run(x, width, first, last)
    turned = rotate(x.float(), rotation).to(first).to(last)
    # an op returns no tensor that it was given
    return turned.clone(memory_format=torch.contiguous_format) if width == 1 else turned.contiguous()


def _fake(
    x: Tensor, rotation: int, master: torch.dtype | None, dtype: torch.dtype | None, after: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or torch.float32)


_library = torch.library.Library("fairy2i", "FRAGMENT")
# sums are float32, rounded to `master` and then to `dtype`, float32 where they are None; `after`: fairy2i.ops.training
_library.define(
    "rotate(Tensor x, int rotation, ScalarType? master, ScalarType? dtype, Tensor? after) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("fairy2i::rotate", _fake, lib=_library)
