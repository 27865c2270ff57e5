"""Triton back-ends, and what their launches share. Triton is not imported before a kernel is used."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def power(size: int) -> int:
    """Return the least power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


_HERE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> Any:
    """Return a context in which kernels are launched where the tensor is: nothing, if that is the current device."""
    here = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(tensor.device)
