"""The widely-linear form of a real matrix, and back.

A real matrix R of shape (2n, 2m) acts on a real vector of 2m features. Pair the first half of the features with
the second half, x = x_first + i x_second, and R becomes a *widely-linear* map on complex vectors,

    y = U x + W conj(x),                              U, W complex of shape (n, m).

With the quarters R = [[A11, A12], [A21, A22]] (arXiv 2512.02901, section 3):

    Re U = (A11 + A22)/2   Im U = (A21 - A12)/2   Re W = (A11 - A22)/2   Im W = (A12 + A21)/2
    A11 = Re U + Re W      A12 = Im W - Im U      A21 = Im U + Im W      A22 = Re U - Re W

The map is linear, unique and lossless: it is an orthogonal change of basis up to a factor sqrt(2). Nothing here
quantizes. Quantizers use the *parts* form, two real tensors (re, im) of shape (2, n, m) whose first index is U then W,
because real arithmetic is faster than complex, needs no float32 upcast of the master weight in memory, and compiles.
"""

import torch
from torch import Tensor


def _check_even(shape: torch.Size) -> None:
    if len(shape) != 2 or shape[0] % 2 or shape[1] % 2 or 0 in shape:
        raise ValueError(f"the widely-linear form needs a matrix with even, nonzero sides, got shape {tuple(shape)}")


def to_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split a real matrix into the real and imaginary parts of U and W.

    Args:
        weight: (2n, 2m), any floating dtype.

    Returns:
        (re, im), each (2, n, m) with index 0 for U and 1 for W, in the dtype of ``weight``.

    Raises:
        ValueError: a side of ``weight`` is odd or zero.
    """
    _check_even(weight.shape)
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    a11, a12, a21, a22 = weight[:n, :m], weight[:n, m:], weight[n:, :m], weight[n:, m:]
    re = torch.stack((a11 + a22, a11 - a22)).div_(2)
    im = torch.stack((a21 - a12, a12 + a21)).div_(2)
    return re, im


def from_parts(re: Tensor, im: Tensor) -> Tensor:
    """Rebuild the real matrix: the inverse of :func:`to_parts`.

    Args:
        re, im: (2, n, m) each, index 0 for U and 1 for W.

    Returns:
        (2n, 2m) in the dtype of the parts.
    """
    top = torch.cat((re[0] + re[1], im[1] - im[0]), dim=1)
    bottom = torch.cat((im[0] + im[1], re[0] - re[1]), dim=1)
    return torch.cat((top, bottom), dim=0)


def parts_gradient(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Carry a gradient on the real matrix over to the parts: the adjoint of :func:`from_parts`.

    Args:
        grad: (2n, 2m).

    Returns:
        (d re, d im), each (2, n, m).
    """
    re, im = to_parts(grad)
    return re * 2, im * 2


def to_widely_linear(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a real matrix as the pair (U, W) of y = U x + W conj(x).

    Args:
        weight: (2n, 2m), real. bfloat16 and float16 are promoted to float32.

    Returns:
        (U, W), complex, each (n, m): complex128 for float64 input, complex64 otherwise.

    Raises:
        ValueError: a side of ``weight`` is odd or zero.
        TypeError: ``weight`` is not a floating-point tensor.

    Source: arXiv 2512.02901, section 3.
    """
    if not weight.is_floating_point():
        raise TypeError(f"expected a real floating-point matrix, got {weight.dtype}")
    re, im = to_parts(weight if weight.dtype == torch.float64 else weight.float())
    u, w = torch.complex(re, im)
    return u, w


def from_widely_linear(u: Tensor, w: Tensor) -> Tensor:
    """Rebuild the real matrix from (U, W): the inverse of :func:`to_widely_linear`.

    Args:
        u, w: complex, each (n, m).

    Returns:
        (2n, 2m), real: float64 for complex128 input, float32 for complex64.

    Raises:
        ValueError: the shapes differ or are not matrices.
        TypeError: the inputs are not complex.
    """
    if not (u.is_complex() and w.is_complex()):
        raise TypeError(f"expected complex matrices U and W, got {u.dtype} and {w.dtype}")
    if u.shape != w.shape or u.dim() != 2:
        raise ValueError(f"U and W must be matrices of one shape, got {tuple(u.shape)} and {tuple(w.shape)}")
    both = torch.stack((u, w))
    return from_parts(both.real, both.imag)


def apply_widely_linear(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Compute y = U x + W conj(x) on real features: the readable reference of what a layer does.

    Args:
        x: (..., 2m), real; the first m features are the real parts, the last m the imaginary parts.
        u, w: complex, each (n, m).

    Returns:
        (..., 2n), real, in the same pairing; equal to ``x @ from_widely_linear(u, w).T`` up to rounding.

    Raises:
        ValueError: the last dimension of ``x`` is not 2m.
    """
    m = u.shape[1]
    if x.shape[-1] != 2 * m:
        raise ValueError(f"expected {2 * m} input features for U of shape {tuple(u.shape)}, got {x.shape[-1]}")
    z = torch.complex(x[..., :m], x[..., m:])
    y = z @ u.mT + z.conj() @ w.mT
    return torch.cat((y.real, y.imag), dim=-1)
