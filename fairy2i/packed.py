"""PackedLinear: a linear layer that keeps its weight as packed codes and scales, for inference.

This is the reference: each forward unpacks the codes and rebuilds the dense weight for itself, in pure PyTorch, and
lets it go again. The result is that of the QATLinear it came from, bit for bit in the dtype of its master weight,
because both go through the same `Scheme.dequantize`. The input's gradient is there (for adapters trained on top), the
weight's is not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .packing import pack_codes, unpack_codes
from .qat import QATLinear, autocast_dtype, keep_float32
from .schemes import Scheme, method_name


class _PackedMultiply(torch.autograd.Function):
    """y = x w^T + bias; w is rebuilt in forward and again in backward, and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: "PackedLinear") -> Tensor:
        ctx.layer = layer
        ctx.dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, layer.dense_weight_as(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad @ ctx.layer.dense_weight_as(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None


class PackedLinear(nn.Module):
    """A linear layer with packed weights. State: ``codes``, ``scales`` (buffers) and ``bias`` (a frozen parameter).

    Args:
        in_features, out_features, bias, device: as for nn.Linear. The weight starts as zeros of codes and scales.
        scheme: what the codes and scales mean.
        dtype: dtype of the bias.

    Attributes:
        codes: uint8, shape ``scheme.packed_shape(out_features, in_features)``, laid out as :mod:`fairy2i.packing` says.
        scales: float32, shape ``scheme.scale_shape(out_features, in_features)``; stays float32 when the module is cast.

    Raises:
        ValueError: the scheme cannot quantize this shape.
    """

    codes: Tensor
    scales: Tensor
    keep_dense = False  # see keep_dense_weights
    _kept: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reason := scheme.unsupported(out_features, in_features):
            raise ValueError(f"{method_name(scheme)} cannot pack a {out_features}x{in_features} layer: {reason}")
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        codes = torch.zeros(scheme.packed_shape(out_features, in_features), dtype=torch.uint8, device=device)
        scales = torch.zeros(scheme.scale_shape(out_features, in_features), dtype=torch.float32, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    @classmethod
    def from_qat(cls, layer: QATLinear) -> "PackedLinear":
        """Pack what a QATLinear used in its last forward; its parameters are not changed. "meta" stays "meta"."""
        new = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            scheme=layer.scheme,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        if not layer.weight.is_meta:
            codes, scales = layer.codes_and_scales()
            new.codes.copy_(pack_codes(codes, layer.scheme.code_width))
            new.scales.copy_(scales)
            if new.bias is not None and layer.bias is not None:
                new.bias.data.copy_(layer.bias.data)
        return new.train(layer.training)

    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """Return (codes uint8, scales float32), unpacked, as QATLinear.codes_and_scales does."""
        columns = self.scheme.code_shape(self.out_features, self.in_features)[-1]
        return unpack_codes(self.codes, columns, self.scheme.code_width), self.scales

    def dense_weight(self) -> Tensor:
        """Return the dense weight, float32 (out_features, in_features); made anew at each call."""
        return self.scheme.dequantize(*self.codes_and_scales())

    def dense_weight_as(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight in a dtype: anew at each call, or the one that is kept (keep_dense_weights)."""
        if not self.keep_dense:
            return self.dense_weight().to(dtype)
        if self._kept is None or self._kept.dtype != dtype:
            self._kept = self.dense_weight().to(dtype)
        return self._kept

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that looks at a layer's (GPT-2's initialization does); writing into it is lost."""
        return self.dense_weight()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return a plain nn.Linear with the dense weight, not trainable."""
        with torch.device("meta"):
            new = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        new.weight = nn.Parameter(self.dense_weight().to(dtype), requires_grad=False)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) in the dtype of ``x`` (or of autocast)."""
        return _PackedMultiply.apply(x.to(autocast_dtype(x) or x.dtype), self.bias, self)

    def extra_repr(self) -> str:
        """Show sizes and method as QATLinear does."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, method={method_name(self.scheme)}"

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        exact = self.scales
        super()._apply(fn, recurse)
        self.scales = keep_float32(self.scales, exact)
        self._kept = None
        return self


def keep_dense_weights(model: nn.Module, keep: bool = True) -> nn.Module:
    """Have the packed layers of a model keep their dense weight after the first call, or let it go: speed for memory.

    Without it the reference rebuilds every weight in every call, which is most of the time of generating token by
    token. The weights are kept in the dtype of the input; outputs do not change by a bit, nor does what is saved.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.keep_dense, module._kept = keep, None
    return model
