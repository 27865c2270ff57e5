"""QATLinear: a linear layer that trains its real master weight through a quantized copy.

The forward multiplies with the quantized weight q exactly (not `w + (q - w).detach()`, which rounds to something else
in bfloat16). The backward is straight-through: the gradient of q is handed to the master weight as it is, because the
widely-linear transform is linear and invertible. q is not kept for the backward; it is made again there from the same
scales, so a layer holds no dense copy while its activations wait. Learned scales get the true gradient with the codes
held constant, times LSQ's 1/sqrt(codes per scale) (arXiv 1902.08153).

On GPUs the kernels of :mod:`fairy2i.ops.training` make q; elsewhere, and for what they do not cover, PyTorch does.
Inside :func:`fairy2i.reuse.reuse_quantized` q is made once and kept, as codes or as it is, while the weight stays.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ops import training as ops
from .schemes import PhaseScheme, Scheme, method_name

# asked once, here: torch.compile before torch 2.13 breaks the graph at the question
_DEVICES = ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "xla", "xpu")
_AUTOCAST_DEVICES = tuple(name for name in _DEVICES if torch.amp.is_autocast_available(name))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast has F.linear use for an input, or None where it leaves the input alone."""
    device_type = x.device.type
    on = device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on and x.dtype != torch.float64 else None


def keep_float32(cast: Tensor, exact: Tensor) -> Tensor:
    """Undo the cast of scales, keep the move: rounding them would move every weight of a group at once."""
    return cast if cast.dtype == torch.float32 else exact.to(cast.device)


def _settings(scheme: Any) -> tuple[int, str, int, int]:
    return scheme.stages, scheme.granularity, scheme.tile, scheme.rotation


COMPILED = 1 << 21  # weights of a layer up to which a compiler's kernels take less time than calls of ours


def _fused(scheme: Scheme, tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether kernels quantize a weight of this dtype (default: the tensor's) on the device of this tensor."""
    if torch.compiler.is_compiling() and tensor.numel() <= COMPILED:
        return False
    return isinstance(scheme, PhaseScheme) and ops.fused(tensor, scheme.stages, dtype)


def _dense(
    scheme: Scheme,
    weight: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return q(weight), rounded to the weight's dtype and then to ``dtype``, and what makes it again: scales, or None.

    ``after`` is the gradient in a backward: see :mod:`fairy2i.ops.training`.
    """
    if _fused(scheme, weight) and (scales is not None or scheme.scales == "mean"):
        if scales is None:
            dense, scales, _ = torch.ops.fairy2i.phase_quantize_mean(weight, *_settings(scheme), dtype, False)
        else:
            dense, _ = torch.ops.fairy2i.phase_quantize_given(weight, scales, *_settings(scheme), dtype, False, after)
        return dense, scales
    codes, used = scheme.quantize(weight, scales)
    dense = scheme.dequantize(codes, used).to(weight.dtype).to(dtype)
    return dense, used if scales is None and scheme.scales == "mean" else scales  # joint codes are not greedy ones


def quantize_to_keep(scheme: Scheme, weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the codes of a weight, block codes where the scheme is of phases, and the scales used."""
    if not isinstance(scheme, PhaseScheme):
        return scheme.quantize(weight, scales)
    if not _fused(scheme, weight) or (scales is None and scheme.scales != "mean"):
        codes, used = scheme.quantize(weight, scales)
        return ops.to_blocks(codes), used
    if scales is None:
        _, scales, blocks = torch.ops.fairy2i.phase_quantize_mean(weight, *_settings(scheme), None, True)
        return blocks, scales
    _, blocks = torch.ops.fairy2i.phase_quantize_given(weight, scales, *_settings(scheme), None, True, None)
    return blocks, ops.clamped(scales)


def _codes(scheme: Scheme, weight: Tensor | None, scales: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Any]:
    """Return codes and scales by PyTorch, from what :func:`quantize_to_keep` returned where that is given."""
    if kept is None:
        assert weight is not None
        return scheme.quantize(weight, scales)
    return ops.from_blocks(kept, scheme.stages) if isinstance(scheme, PhaseScheme) else kept, scales


def _dense_of_kept(
    scheme: Scheme, kept: Tensor, scales: Tensor, master: torch.dtype, dtype: torch.dtype, after: Tensor | None = None
) -> Tensor:
    if _fused(scheme, kept, master):
        dense: Tensor = torch.ops.fairy2i.phase_dequantize_blocks(
            kept, scales, *_settings(scheme), master, dtype, after
        )
        return dense
    return scheme.dequantize(*_codes(scheme, None, scales, kept)).to(master).to(dtype)


def _lsq_root(scheme: Scheme, shape: torch.Size, scales: Tensor) -> float:
    """Return the root of the codes per scale; a complex code uses one of its two scales."""
    return math.sqrt(math.prod(scheme.code_shape(*shape)) / scales.numel())


def gradient_of_scales(
    scheme: Scheme,
    grad: Tensor,
    scales: Tensor,
    *,
    weight: Tensor | None = None,
    kept: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    """Return the gradient of learned scales, float32 and shaped as they are.

    Args:
        grad: the gradient of the dense quantized weight, (out, in).
        scales: shaped as the scheme says.
        weight: the master weight, (out, in), where neither of the others is given.
        kept: the codes, as :func:`quantize_to_keep` returns them.
        codes: the codes, as :meth:`Scheme.quantize` returns them.
    """
    if codes is None and _fused(scheme, grad):
        some = grad if weight is None else weight  # of codes only the shape is asked
        found = torch.ops.fairy2i.phase_scale_gradient(grad, some, kept, scales, *_settings(scheme))
    else:
        found = scheme.scale_gradient(grad, _codes(scheme, weight, scales, kept)[0] if codes is None else codes)
    return found / _lsq_root(scheme, grad.shape, scales)


class _QuantizedLinear(torch.autograd.Function):
    """y = x q(weight)^T + bias, with identity gradient from q to weight and no q kept in between.

    Where ``exact`` is given it is what the scales are, and ``scales``, a rounded copy, only takes the gradient.
    ``kept`` is q of this weight from before: dense, with the codes beside it if the scales are learned, or codes with
    ``kept_scales``.
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
        kept: Tensor | None,
        kept_scales: Tensor | None,
        kept_codes: Tensor | None,
    ) -> Tensor:
        used = scales if exact is None else exact
        ctx.scheme = scheme
        ctx.fused = _fused(scheme, weight)
        ctx.master = weight.dtype
        ctx.scale_dtype = None if scales is None else scales.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if kept is None:
            dense, again = _dense(scheme, weight, used, x.dtype)
            ctx.save_for_backward(x, weight, again, None, None)
        elif kept.is_floating_point():
            dense = kept
            ctx.save_for_backward(x, None, used, kept, kept_codes)
        else:
            assert kept_scales is not None
            dense = _dense_of_kept(scheme, kept, kept_scales, weight.dtype, x.dtype)
            ctx.save_for_backward(x, None, kept_scales, None, kept)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales, dense, blocks = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        need_x, need_weight, need_scales, _, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_scales = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        codes = None  # made again, not kept: they depend on nothing but weight and scales
        if not ctx.fused and ((need_scales and blocks is None) or (need_x and dense is None)):
            codes, scales = _codes(scheme, weight, scales, blocks)
        if need_x:
            if dense is None and codes is not None:
                dense = scheme.dequantize(codes, scales).to(ctx.master).to(x.dtype)
            elif dense is None and blocks is not None:
                dense = _dense_of_kept(scheme, blocks, scales, ctx.master, x.dtype, after=grad)
            elif dense is None:
                dense, _ = _dense(scheme, weight, scales, x.dtype, after=grad)
            grad_x = grad @ dense
        dense = None
        if need_weight or need_scales:
            grad_dense = rows.mT @ x.reshape(-1, x.shape[-1])
            if need_weight:
                grad_weight = grad_dense.to(ctx.master)
            if need_scales:
                found = gradient_of_scales(scheme, grad_dense, scales, weight=weight, kept=blocks, codes=codes)
                grad_scales = found.to(ctx.scale_dtype)
        if need_bias:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_scales, None, grad_bias, None, None, None, None


class _QuantizedWeight(torch.autograd.Function):
    """The dense q(weight) itself, with the gradients of :class:`_QuantizedLinear`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor | None, exact: Tensor | None, scheme: Scheme) -> Tensor:
        used = scales if exact is None else exact
        ctx.save_for_backward(None if scales is None else weight, used)
        ctx.scheme = scheme
        ctx.scale_dtype = None if scales is None else scales.dtype
        return _dense(scheme, weight, used, weight.dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        grad_scales = None
        if ctx.needs_input_grad[1]:
            grad_scales = gradient_of_scales(ctx.scheme, grad, scales, weight=weight).to(ctx.scale_dtype)
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
    reuse: Any = None  # what keeps the quantized weight now, and how: see fairy2i.reuse
    kept: Tensor | None = None  # the quantized weight, dense or as codes, for as long as the weight stays
    kept_scales: Tensor | None = None
    kept_codes: Tensor | None = None  # beside a dense one, where the scales are learned: for their gradient
    scales_later: bool = False  # whether somebody makes the gradient of the scales from that of the weight

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

    def _trained_scales(self) -> Tensor | None:
        """The learned scales, without their graph where somebody makes their gradient later."""
        scales = self._grouped(self.scales)
        return scales.detach() if self.scales_later and scales is not None else scales

    def trained_weight(self) -> Tensor:
        """Return the dense quantized weight (out_features, in_features) with straight-through gradients.

        For a caller that multiplies with it more than once in a forward: :meth:`forward` quantizes at each call.
        """
        return _QuantizedWeight.apply(self.matrix, self._trained_scales(), self._grouped(self._exact), self.scheme)

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
        matrix, scheme = self.matrix, self.scheme
        if _fused(scheme, matrix):  # what the kernels find, to the last bit
            blocks, scales = quantize_to_keep(scheme, matrix, self.group_scales)
            return ops.from_blocks(blocks, _settings(scheme)[0]), scales
        return scheme.quantize(matrix, self.group_scales)

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """Return the dense quantized weight, (out_features, in_features) in the dtype of the master weight."""
        return _dense(self.scheme, self.matrix, self.group_scales, self.weight.dtype)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) with the quantized weight.

        Raises:
            RuntimeError: the weight is a sharded DTensor (tensor parallelism would split the pairs of features).
        """
        matrix = self.matrix
        dtype = autocast_dtype(x)
        if dtype is None and x.dtype != self.weight.dtype:
            raise RuntimeError(f"input is {x.dtype} but the weight is {self.weight.dtype}; cast one or use autocast")
        x = x.to(dtype or x.dtype)
        kept = None
        if self.reuse is not None:
            if not torch.compiler.is_compiling():  # a compiled forward takes what is there
                self.reuse.refresh(self, x.dtype)
            kept = self.kept
            if kept is not None and kept.is_floating_point() and kept.dtype != x.dtype:
                kept = None
        scales, exact = self._trained_scales(), self._grouped(self._exact)
        values = kept, self.kept_scales, self.kept_codes
        return _QuantizedLinear.apply(x, matrix, scales, exact, self.bias, self.scheme, *values)

    def extra_repr(self) -> str:
        """Show the method beside the sizes."""
        return f"{super().extra_repr()}, method={method_name(self.scheme)}"

    def keep(self, kept: Tensor | None, scales: Tensor | None, codes: Tensor | None) -> None:
        """Keep a quantized weight: see :mod:`fairy2i.reuse`."""
        # nn.Module's way to set an attribute looks for parameters first: 12 ms for the layers of a small model
        vars(self).update(kept=kept, kept_scales=scales, kept_codes=codes)

    def let_go(self) -> None:
        """Forget the kept quantized weight."""
        self.keep(None, None, None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.let_go()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "QATLinear":
        self.let_go()
        exact = None if self.scales is None else self.scales.data
        grad = None if self.scales is None or self.scales.grad is None else self.scales.grad.data
        super()._apply(fn, recurse)
        if exact is not None and self.scales is not None:
            self.scales.data = keep_float32(self.scales.data, exact)
            if grad is not None and self.scales.grad is not None:
                self.scales.grad.data = keep_float32(self.scales.grad.data, grad)
        return self
