"""QATLinear: a linear layer that trains its real master weight through a quantized copy.

The forward multiplies with the quantized weight q exactly (not `w + (q - w).detach()`, which rounds to something else
in bfloat16). The backward is straight-through: the gradient of q is handed to the master weight as it is, because the
widely-linear transform is linear and invertible. q is not kept for the backward; it is made again there, so a layer
holds no dense copy while its activations wait. Learned scales get the true gradient with the codes held constant,
times LSQ's 1/sqrt(codes per scale) (arXiv 1902.08153).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .schemes import Scheme, method_name


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast has F.linear use for an input, or None where it leaves the input alone."""
    device_type = x.device.type
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on and x.dtype != torch.float64 else None


def keep_float32(cast: Tensor, exact: Tensor) -> Tensor:
    """Undo the cast of scales, keep the move: rounding them would move every weight of a group at once."""
    return cast if cast.dtype == torch.float32 else exact.to(cast.device)


def _scale_gradient(scheme: Scheme, grad_dense: Tensor, codes: Tensor, count: int) -> Tensor:
    """Return the gradient of ``count`` scales; a complex code uses one of its two scales."""
    return scheme.scale_gradient(grad_dense, codes) / math.sqrt(codes.numel() / count)


class _QuantizedLinear(torch.autograd.Function):
    """y = x q(weight)^T + bias, with identity gradient from q to weight and no q kept in between.

    Where ``exact`` is given it is what the scales are, and ``scales``, a rounded copy, only takes the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        exact: Tensor | None,
        bias: Tensor | None,
        scheme: Scheme,
    ) -> Tensor:
        used = scales if exact is None else exact
        ctx.save_for_backward(x, weight, used)
        ctx.scheme = scheme
        ctx.scale_dtype = None if scales is None else scales.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        dense = scheme.dequantize(*scheme.quantize(weight, used)).to(weight.dtype).to(x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        need_x, need_weight, need_scales, _, need_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_scales = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        codes, used = scheme.quantize(weight, scales)  # made again, not kept: codes depend on nothing else
        if need_x:
            grad_x = grad @ scheme.dequantize(codes, used).to(weight.dtype).to(x.dtype)
        if need_weight or need_scales:
            grad_dense = rows.mT @ x.reshape(-1, x.shape[-1])
            if need_weight:
                grad_weight = grad_dense.to(weight.dtype)
            if need_scales:
                grad_scales = _scale_gradient(scheme, grad_dense, codes, scales.numel()).to(ctx.scale_dtype)
        if need_bias:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_scales, None, grad_bias, None


class _QuantizedWeight(torch.autograd.Function):
    """The dense q(weight) itself, with the gradients of :class:`_QuantizedLinear`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor | None, exact: Tensor | None, scheme: Scheme) -> Tensor:
        used = scales if exact is None else exact
        ctx.save_for_backward(weight, used)
        ctx.scheme = scheme
        ctx.scale_dtype = None if scales is None else scales.dtype
        return scheme.dequantize(*scheme.quantize(weight, used)).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        grad_scales = None
        if ctx.needs_input_grad[1]:
            codes, _ = ctx.scheme.quantize(weight, scales)
            grad_scales = _scale_gradient(ctx.scheme, grad, codes, scales.numel()).to(ctx.scale_dtype)
        return grad, grad_scales, None, None


class QATLinear(nn.Linear):
    """A drop-in nn.Linear whose forward uses the quantized weight.

    The state dict has the keys of the layer it replaces, plus ``scales`` where the scheme learns them.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        scheme: how the weight becomes codes and scales.
        fan_in_fan_out: the parameter is stored (in, out), as GPT-2's Conv1D does.

    Raises:
        ValueError: the scheme cannot quantize this shape.
    """

    scales: nn.Parameter | None
    exact_scales: Tensor | None = None  # float32, where sharding rounds `scales`: see keep_scales_exact

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme,
        fan_in_fan_out: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if reason := scheme.unsupported(out_features, in_features):
            raise ValueError(f"{method_name(scheme)} cannot quantize a {out_features}x{in_features} layer: {reason}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.scheme = scheme
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight = nn.Parameter(self.weight.detach().T.contiguous())
        if scheme.learned:
            shape = scheme.scale_shape(out_features, in_features) or (1,)  # FSDP2 shards no scalar parameters
            self.scales = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=self.weight.device))
            self.init_scales()
        else:
            self.register_parameter("scales", None)

    @classmethod
    def from_linear(cls, module: nn.Module, scheme: Scheme, fan_in_fan_out: bool = False) -> "QATLinear":
        """Wrap an existing layer, sharing its Parameters and its training mode; no weight is copied.

        Args:
            module: an nn.Linear, or with ``fan_in_fan_out`` a Conv1D of transformers, on any device, "meta" too.

        Raises:
            ValueError: the scheme cannot quantize this shape.
        """
        weight = module.get_parameter("weight")
        bias = None if module.bias is None else module.get_parameter("bias")
        out_features, in_features = weight.shape[::-1] if fan_in_fan_out else weight.shape
        with torch.device("meta"):
            new = cls(in_features, out_features, bias is not None, scheme=scheme, fan_in_fan_out=fan_in_fan_out)
        new.weight, new.bias = weight, bias
        if new.scales is not None:
            scales = torch.empty_like(new.scales, device=weight.device)
            new.scales = nn.Parameter(scales, requires_grad=weight.requires_grad)
            new.init_scales()
        return new.train(module.training)

    @property
    def matrix(self) -> Tensor:
        """The master weight as (out_features, in_features), whatever way it is stored: a view.

        Raises:
            RuntimeError: the weight is a DTensor, a part of which would be quantized as if it were the whole.
        """
        if hasattr(self.weight, "placements"):
            raise RuntimeError(
                f"QATLinear got a sharded DTensor weight ({self.weight.placements}). Tensor parallelism splits the "
                "paired halves of the features, and the statistics are those of the whole matrix; use DDP or FSDP2, "
                "which gathers the weight before the forward (outside of it, gather it with full_tensor())."
            )
        return self.weight.T if self.fan_in_fan_out else self.weight

    @property
    def group_scales(self) -> Tensor | None:
        """The learned scales in the shape that the scheme says (a single one is stored as (1,)), or None: a view."""
        return self._grouped(self.scales if self._exact is None else self._exact)

    @property
    def _exact(self) -> Tensor | None:
        """The float32 values of scales that sharding has rounded just now; None where they are not rounded."""
        return None if self.scales is None or self.scales.dtype == torch.float32 else self.exact_scales

    def _grouped(self, scales: Tensor | None) -> Tensor | None:
        return None if scales is None else scales.view(self.scheme.scale_shape(self.out_features, self.in_features))

    def trained_weight(self) -> Tensor:
        """Return the dense quantized weight (out_features, in_features) with straight-through gradients.

        For a caller that multiplies with it more than once in a forward: :meth:`forward` quantizes at each call.
        """
        return _QuantizedWeight.apply(self.matrix, self._grouped(self.scales), self._grouped(self._exact), self.scheme)

    @torch.no_grad()
    def init_scales(self) -> None:
        """Set learned scales to the fit of the present weight; nothing to do without learned scales or on "meta".

        Call it after putting other weights into a layer whose scales should start afresh.
        """
        if self.scales is not None and not self.weight.is_meta:
            self.scales.copy_(self.scheme.quantize(self.matrix)[1])

    @torch.no_grad()
    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """Return what the forward uses: (codes uint8, scales float32), shaped as the scheme says."""
        return self.scheme.quantize(self.matrix, self.group_scales)

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """Return the dense quantized weight, (out_features, in_features) in the dtype of the master weight."""
        return self.scheme.dequantize(*self.codes_and_scales()).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) with the quantized weight.

        Raises:
            RuntimeError: the weight is a sharded DTensor (tensor parallelism would split the pairs of features).
        """
        matrix = self.matrix
        dtype = autocast_dtype(x)
        if dtype is None and x.dtype != self.weight.dtype:
            raise RuntimeError(f"input is {x.dtype} but the weight is {self.weight.dtype}; cast one or use autocast")
        scales, exact = self._grouped(self.scales), self._grouped(self._exact)
        return _QuantizedLinear.apply(x.to(dtype or x.dtype), matrix, scales, exact, self.bias, self.scheme)

    def extra_repr(self) -> str:
        """Show the method beside the sizes."""
        return f"{super().extra_repr()}, method={method_name(self.scheme)}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QATLinear":
        exact = None if self.scales is None else self.scales.data
        grad = None if self.scales is None or self.scales.grad is None else self.scales.grad.data
        super()._apply(fn, recurse)
        if exact is not None and self.scales is not None:
            self.scales.data = keep_float32(self.scales.data, exact)
            if grad is not None and self.scales.grad is not None:
                self.scales.grad.data = keep_float32(self.scales.grad.data, grad)
        return self
