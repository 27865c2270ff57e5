"""PackedLinear: a linear layer that keeps its weight as packed codes and scales, for inference.

What multiplies is the *backend*, :func:`use_backend`:

    reference   pure PyTorch: each forward unpacks the codes, rebuilds the dense weight and lets it go again. The result
                is that of the QATLinear it came from, bit for bit in the dtype of its master weight, because both go
                through the same `Scheme.dequantize`. The input's gradient is there (for adapters trained on top), the
                weight's is not.
    cpu_exact   a CPU kernel that adds and subtracts float32 activations and multiplies by scales at the end: the
                reference's result but for the rounding of float32 sums.
    cpu_int8    a CPU kernel that rounds activations to 8 bits, in groups of 256 with a scale each; faster.
    gpu         kernels on an NVIDIA GPU, as exact as the reference: Triton (fairy2i.ops.triton.packed) and, for phase
                codes whose scales are of tensors or rows, CUDA C++ (fairy2i.ops.cuda).
    auto        in eval mode, with no gradient to give, cpu_exact on the CPU and, if `fairy2i.ops.gpu.AUTO` is true, gpu
                on a GPU, where they can be used; else the reference.
                The environment variable FAIRY2I_BACKEND makes it another one, for a whole process.

A kernel wants codes in another order. A layer repacks them at the first call and then holds that form alone, as the
buffer ``words``; reading ``codes``, saving or moving the layer puts them back in the order of the format.
"""

import logging
import os
import threading
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ops import cpu, gpu
from .ops.inference import code_rows_and_columns, layout_of, packed_linear, packed_linears
from .packing import pack_codes, unpack_codes
from .qat import QATLinear, autocast_dtype, keep_float32
from .schemes import Scheme, method_name

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "cpu_exact", "cpu_int8", "gpu"]
BACKENDS: tuple[str, ...] = get_args(Backend)

SIBLINGS = (  # names, in the order of their calls, of layers that usually see the same input
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)

FEW = 4  # tokens: more of them are no faster in one call of several layers

DEFAULT = os.environ.get("FAIRY2I_BACKEND", "auto")
if DEFAULT not in BACKENDS:
    raise ValueError(f"FAIRY2I_BACKEND is one of {', '.join(BACKENDS)}, not {DEFAULT!r}")

_told: set[str] = set()  # lines that were logged: each comes once in a process
_repacking = threading.Lock()


def _tell(level: int, line: str) -> None:
    if line not in _told:
        _told.add(line)
        logger.log(level, line)


@torch.compiler.assume_constant_result
def _kernels_on() -> bool:
    """Return whether there are CPU kernels; say once in a process why there are none."""
    if reason := cpu.why_off():
        _tell(logging.WARNING, f"packed layers are multiplied by PyTorch, slowly: {reason}")
    return reason is None


@torch.compiler.assume_constant_result
def _tell_not_ready() -> None:
    _tell(
        logging.WARNING,
        "packed layers were compiled before a kernel had their codes, so the graph multiplies by PyTorch, slowly; "
        "call the model, or use_backend(model, 'cpu_exact' or 'gpu'), before torch.compile",
    )


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
            A copy, made anew at each access, once a kernel has repacked them.
        scales: float32, shape ``scheme.scale_shape(out_features, in_features)``; stays float32 when the module is cast.

    Raises:
        ValueError: the scheme cannot quantize this shape.
    """

    scales: Tensor
    bias: nn.Parameter | None
    keep_dense = False  # see keep_dense_weights
    backend: str = "auto"  # see use_backend
    _kept: Tensor | None = None
    _layout: tuple[int, ...] | None = None  # what ``words`` is
    _siblings: "list[PackedLinear]" = []  # noqa: RUF012 - never changed in place; see use_backend
    _ahead: tuple[Tensor, int, Any, Tensor] | None = None  # an input and the output made with a sibling's
    _kernel: cpu.Layer | gpu.Layer | None = None  # the same for the library; points at the memory of words and scales
    _group: "_Group | None" = None  # layers of one input whose words are joined, on a GPU

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
        self._buffers["codes"] = codes  # a persistent buffer; register_buffer would take the property for a clash
        self.register_buffer("scales", scales)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))

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
            new._buffers["codes"] = pack_codes(codes, layer.scheme.code_width)
            new.scales.copy_(scales)
            if new.bias is not None and layer.bias is not None:
                new.bias.data.copy_(layer.bias.data)
        return new.train(layer.training)

    @property
    def words(self) -> Tensor | None:
        """The codes as a kernel wants them, or None while the layer holds them in the order of the format."""
        return self._buffers.get("words")

    def _hold(self, codes: Tensor | None, words: Tensor | None) -> None:
        self._buffers["codes"] = codes
        if words is None:
            self._buffers.pop("words", None)
            self._non_persistent_buffers_set.discard("words")
        else:
            self._buffers["words"] = words
            self._non_persistent_buffers_set.add("words")

    @property
    def codes(self) -> Tensor:
        """The packed codes, in the order of the format."""
        codes = self._buffers["codes"]
        if codes is None and self.words is not None:
            assert self._layout is not None
            shape = code_rows_and_columns(self.out_features, self.in_features, self._layout[0])
            unpack = gpu.unpack if self._layout[4] in gpu.MODES.values() else cpu.unpack
            return unpack(
                self.words, self.scheme.packed_shape(self.out_features, self.in_features), shape, self._layout
            )
        assert codes is not None
        return codes

    def _repack(self, mode: str | None) -> "cpu.Layer | gpu.Layer | None":
        """Hold the codes as the kernel of a mode wants them, or with None in the order of the format."""
        with _repacking:  # threads may share a model
            now = self._kernel
            if self._group is not None and (
                mode is None or now is None or mode != now.mode_name or now.scales != self.scales.data_ptr()
            ):
                self._group.dissolve()
            if mode is None:
                if self._layout is not None:
                    self._hold(self.codes, None)
                    self._layout = self._kernel = None
                return None
            layout = layout_of(self.scheme, mode)
            shape = code_rows_and_columns(self.out_features, self.in_features, layout[0])
            words = self.words
            if words is None or layout != self._layout:
                words = (gpu if mode in gpu.MODES else cpu).repack(self.codes, shape, layout)
            if not self.scales.is_contiguous():
                self.scales = self.scales.contiguous()
            if mode in gpu.MODES:
                gpu.prepare_memory(self.in_features, self.scheme.rotation, layout, self.scales.device)
                self._hold(None, words)
                self._layout, self._kernel = layout, gpu.describe(words, self.scales)
                return self._kernel
            kernel = cpu.describe(shape, layout, self.scales)
            kernel.codes = words.data_ptr()
            kernel.mode_name, kernel.memory = mode, (words, self.scales)  # theirs while a call runs, whatever comes
            self._hold(None, words)
            self._layout, self._kernel = layout, kernel
            return kernel

    def backend_for(self, x: Tensor | None = None) -> str:
        """Return the backend that multiplies such an input: "reference", "cpu_exact", "cpu_int8" or "gpu".

        Raises:
            RuntimeError: a kernel was asked for by name and cannot be used, or not on this input.
        """
        backend = DEFAULT if self.backend == "auto" else self.backend
        if backend == "reference":
            return backend
        problem = None
        kernel = self._kernel
        if kernel is not None and (x is None or x.dtype in cpu.DTYPES):  # a move of the layer lets its kernel go
            if kernel.mode_name == backend:
                return backend
            automatic = backend == "auto" and gpu.AUTO and kernel.memory[1].is_cuda
            if automatic and not (self.training or self.keep_dense or self._offloaded()):
                return kernel.mode_name
        on_gpu = backend in gpu.MODES or (backend == "auto" and gpu.auto_takes(self.scales.device))
        if on_gpu and not gpu.takes(self.scales.device):
            problem = gpu.why_off() or f"the layer is on {self.scales.device}"
        elif not on_gpu and self.scales.device.type != "cpu":
            problem = f"the layer is on {self.scales.device}"
        elif x is not None and x.dtype not in cpu.DTYPES:
            problem = f"it does not take {x.dtype} activations"
        elif self._offloaded():
            problem = "accelerate has offloaded the layer, and brings its codes for each call anew"
        if backend == "auto":
            usable = problem is None and not (self.training or self.keep_dense)
            if on_gpu:
                return "gpu" if usable else "reference"
            return "cpu_exact" if usable and _kernels_on() else "reference"
        if problem is not None:
            raise RuntimeError(f"the backend {backend} cannot be used: {problem}")
        return backend

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
        if (dtype := autocast_dtype(x)) is not None:
            x = x.to(dtype)
        bias = self._parameters["bias"]
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _PackedMultiply.apply(x, bias, self)
        if (backend := self.backend_for(x)) == "reference":
            return F.linear(x, self.dense_weight_as(x.dtype), None if bias is None else bias.to(x.dtype))
        return self._multiply(x, backend)

    def _multiply(self, x: Tensor, backend: str) -> Tensor:
        if backend in gpu.MODES:
            return self._multiply_on_gpu(x, backend)
        if torch.compiler.is_compiling():
            return self._multiply_in_graph(x, backend)
        if (ahead := self._ahead) is not None:
            self._set_ahead(None)
            if ahead[0] is x and ahead[1] == x._version and ahead[2] is self._kernel:
                return ahead[3]
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"the layer has {self.in_features} input features, got an input of {tuple(x.shape)}")
        kernel, bias = self._ready(backend)
        if watched(x):
            return packed_linear(x, *kernel.memory, bias, self.out_features, layout_of(self.scheme, backend))
        layers = [self]
        if self._siblings and x.numel() <= FEW * self.in_features and not x.is_inference():
            layers = self._with_siblings()
        ready = [(kernel, bias), *(layer._ready(backend) for layer in layers[1:])]
        outputs = cpu.run(
            [kernel for kernel, _ in ready],
            x.contiguous(),
            [bias for _, bias in ready],
            [layer.out_features for layer in layers],
        )
        for layer, y in zip(layers[1:], outputs[1:], strict=True):
            layer._set_ahead((x, x._version, layer._kernel, y))
        return outputs[0]

    def _multiply_in_graph(self, x: Tensor, backend: str) -> Tensor:
        if (ahead := self._ahead) is not None:
            self._set_ahead(None)
            if ahead[0] is x:
                return ahead[3]
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"the layer has {self.in_features} input features, got an input of {tuple(x.shape)}")
        layout = layout_of(self.scheme, backend)
        if self._layout != layout or self.words is None:  # codes cannot be repacked while a graph is made
            _tell_not_ready()
            return F.linear(x, self.dense_weight_as(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        layers = [self]
        if self._siblings and x.numel() <= FEW * self.in_features:
            layers += [layer for layer in self._with_siblings()[1:] if layer._layout == layout]
        biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]
        if len(layers) == 1:
            return packed_linear(x, self.words, self.scales, biases[0], self.out_features, layout)
        words: list[Any] = [layer.words for layer in layers]
        scales = [layer.scales for layer in layers]
        outputs = packed_linears(x, words, scales, biases, [layer.out_features for layer in layers], layout)
        for layer, y in zip(layers[1:], outputs[1:], strict=True):
            layer._set_ahead((x, 0, None, y))
        return outputs[0]

    def _multiply_on_gpu(self, x: Tensor, backend: str) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if (ahead := self._ahead) is not None:
            self._set_ahead(None)
            if ahead[0] is x and (compiling or x.is_inference() or ahead[1] == x._version):
                return ahead[3]
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"the layer has {self.in_features} input features, got an input of {tuple(x.shape)}")
        scales = self.scales
        if compiling and (self._layout != layout_of(self.scheme, backend) or self.words is None):
            _tell_not_ready()
            return F.linear(x, self.dense_weight_as(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        kernel = self._kernel
        if not compiling and (kernel is None or kernel.mode_name != backend or kernel.scales != scales.data_ptr()):
            self._repacked(backend)
            _join([self, *self._siblings])  # after a move, which parted them
        multiply = packed_linear if compiling or watched(x) else gpu.linear
        group = self._group
        if group is not None and any(layer._ahead is not None for layer in group.layers):
            group.dissolve()  # one was not asked about the same input, the time before
            group = None
        if group is None or group.layers[0] is not self:
            bias, words, layout = None if self.bias is None else self.bias.detach(), self.words, self._layout
            assert words is not None and layout is not None
            return multiply(x, words, scales, bias, self.out_features, layout)
        sizes = group.sizes
        y = multiply(x, group.words, group.scales, group.bias, sum(sizes), group.layout, group.places)
        outputs = y.split(sizes, dim=-1)
        version = 0 if compiling or x.is_inference() else x._version
        for layer, output in zip(group.layers[1:], outputs[1:], strict=True):
            layer._set_ahead((x, version, None, output))
        return outputs[0]

    def _set_ahead(self, ahead: tuple[Tensor, int, Any, Tensor] | None) -> None:
        if torch.compiler.is_compiling():
            self._ahead = ahead
        else:
            self.__dict__["_ahead"] = ahead  # past nn.Module's search for parameters

    def _offloaded(self) -> bool:
        """Return whether accelerate keeps the codes elsewhere between calls."""
        return "_hf_hook" in self.__dict__ and getattr(self._hf_hook, "offload", False)

    def _on_gpu(self) -> bool:
        """Return whether kernels on a GPU multiply, from the first call on if not yet."""
        backend = DEFAULT if self.backend == "auto" else self.backend
        if backend == "auto":
            return gpu.auto_takes(self.scales.device) and self.backend_for() in gpu.MODES
        return backend in gpu.MODES and gpu.takes(self.scales.device) and not self._offloaded()

    def _compile(self, dtype: torch.dtype) -> None:
        """Compile now what multiplies single tokens of a dtype on a GPU, for the layer or its group."""
        group, words, layout = self._group, self.words, self._layout
        if group is not None:
            words, layout = group.words, group.layout
        if words is not None and layout is not None and (group is None or group.layers[0] is self):
            gpu.prepare(words, layout, dtype, self.in_features)

    def _ready(self, backend: str) -> tuple[cpu.Layer, Tensor | None]:
        """Return what the library is given of this layer: its description, and its bias in float32."""
        kernel = self._kernel
        scales, bias = self._buffers["scales"], self._parameters["bias"]
        assert scales is not None
        if kernel is None or kernel.mode_name != backend or kernel.scales != scales.data_ptr():
            kernel = self._repacked(backend)
        assert isinstance(kernel, cpu.Layer)
        return kernel, None if bias is None else bias.detach().float().contiguous()

    def _with_siblings(self) -> "list[PackedLinear]":
        """Return this layer and those that will be asked about the same input next; none if they were not, before."""
        if any(layer._ahead is not None for layer in self._siblings):
            for layer in self._siblings:
                layer._ahead = None
            self._siblings = []
        return [self, *(layer for layer in self._siblings if layer.backend == self.backend and not layer.training)]

    def _repacked(self, backend: str) -> "cpu.Layer | gpu.Layer":
        kernel = self._repack(backend)
        if backend in gpu.MODES:
            _tell(logging.INFO, f"packed layers: {backend}, {self._languages()} kernels on {self.scales.device.type}")
            assert kernel is not None
            return kernel
        _tell(logging.INFO, f"packed layers: {backend}, {cpu.instruction_set()}, {torch.get_num_threads()} threads")
        assert kernel is not None
        return kernel

    def extra_repr(self) -> str:
        """Show sizes and method as QATLinear does, and the backend."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, method={method_name(self.scheme)}, backend={self._backend_shown()}"

    def _backend_shown(self) -> str:
        try:
            used = self.backend_for()
            if used in gpu.MODES:
                return f"{used} ({self._languages()})"
            if used != "reference":
                cpu.library()
        except RuntimeError as error:
            return f"off ({error})"
        return used if used == "reference" else f"{used} ({cpu.instruction_set()})"

    def _languages(self) -> str:
        layout = layout_of(self.scheme, "gpu")
        shape = code_rows_and_columns(self.out_features, self.in_features, layout[0])
        return gpu.languages(layout, shape, self.scales.device)

    def train(self, mode: bool = True) -> "PackedLinear":
        """Set training mode, in which the layer holds its codes in the order of the format: that is what is read."""
        if mode:
            self._repack(None)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        self._repack(None)
        exact = self.scales
        super()._apply(fn, recurse)
        self.scales = keep_float32(self.scales, exact)
        self._kept = None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._buffers["codes"] is None:
            destination[prefix + "codes"] = self.codes

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._repack(None)
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_ahead": None, "_group": None}
        if self._layout is None:
            return state
        buffers = {name: buffer for name, buffer in self._buffers.items() if name != "words"}
        buffers["codes"] = self.codes  # a copy holds them in the order of the format
        return {
            **state,
            "_buffers": buffers,
            "_non_persistent_buffers_set": self._non_persistent_buffers_set - {"words"},
            "_layout": None,
            "_kernel": None,
        }


class _Group:
    """Layers of one input whose words are joined, so that one call multiplies with all of them.

    The words of each layer become a part of the joined ones; scales and biases are copied.
    """

    def __init__(self, layers: "list[PackedLinear]") -> None:
        self.layers = layers
        layout = layers[0]._layout
        assert layout is not None
        words = [layer.words for layer in layers]
        rows = [part.shape[2] for part in words if part is not None]
        self.words = gpu.join_words([part for part in words if part is not None])
        self.scales = gpu.group_scales([layer.scales for layer in layers], rows, layout)
        self.layout = (*layout[:2], 1, *layout[3:])  # a scale for each row
        self.sizes = sizes = [layer.out_features for layer in layers]
        self.places = gpu.group_places(sizes, layout[0], self.scales.device)
        biases = [layer.bias for layer in layers]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            zeros = [self.scales.new_zeros(size) for size in sizes]
            parts = [zero if bias is None else bias.detach().float() for zero, bias in zip(zeros, biases, strict=True)]
            self.bias = torch.cat(parts)
        for layer, part in zip(layers, self.words.split(rows, dim=2), strict=True):
            layer._hold(None, part)
            layer._kernel = gpu.describe(part, layer.scales)
            layer._group = self

    def dissolve(self) -> None:
        """Let each layer multiply alone again; its words stay where they are."""
        for layer in self.layers:
            layer._group = layer._ahead = None


def _join(layers: "list[PackedLinear]") -> None:
    """Join the words of layers of one input, where kernels on a GPU multiply and take several layers in one call."""
    if len(layers) == 1 or layers[0].scheme.granularity == "tile" or any(layer._group is not None for layer in layers):
        return
    if all(layer._on_gpu() for layer in layers) and len({layer.scales.device for layer in layers}) == 1:
        for layer in layers:
            if layer._kernel is None or layer._kernel.mode_name not in gpu.MODES:
                layer._repacked("gpu")
        _Group(layers)


def watched(x: Tensor) -> bool:
    """Return whether something looks at ops as they run, or at tensors, so that the dispatcher has to be asked."""
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or x.is_neg()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
    )


def use_backend(model: nn.Module, backend: Backend) -> nn.Module:
    """Choose what multiplies in the packed layers of a model; nothing that is saved depends on it.

    With a kernel the codes are repacked now, else at the first call: do it before torch.compile. Kernels of CUDA C++
    are compiled for single tokens of the dtype that the model's parameters have, and for 16 and 256 tokens in bfloat16;
    for others when they come. And layers that see the same input (q, k and v; gate and up) are computed in one call
    from now on, where there are few tokens: when the first is called, the others' outputs wait for the same tensor to
    come. On the CPU, decoder layers of LLaMA's form take single tokens as a whole (:mod:`fairy2i.decoding`).

    Args:
        model: any module.
        backend: "auto", "reference", "cpu_exact", "cpu_int8" or "gpu", as the head of :mod:`fairy2i.packed` tells.

    Returns:
        The same model.

    Raises:
        ValueError: the name is unknown.
        fairy2i.ops.cpu.KernelsUnavailable: a CPU kernel is asked for and there is no library.
        RuntimeError: the GPU's kernels are asked for and cannot be used.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}. Known backends: {', '.join(BACKENDS)}")
    if backend in cpu.MODES:
        cpu.library()
    if backend in gpu.MODES and (reason := gpu.why_off()):
        raise RuntimeError(f"the backend {backend} cannot be used: {reason}")
    ours = []
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.backend = backend
            if backend in cpu.MODES and module.scales.device.type == "cpu" and not module._offloaded():
                module._repacked(backend)
            if module._on_gpu():
                module._repacked("gpu")
                ours.append(module)
    for module in model.modules():
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            same = [layer for layer in layers if isinstance(layer, PackedLinear)]
            if len(same) > 1 and len({(layer.in_features, layer.scheme) for layer in same}) == 1:
                same[0]._siblings = same[1:] if backend != "reference" else []
                _join(same)
    floats = (parameter.dtype for parameter in model.parameters() if parameter.dtype in gpu.DTYPES)
    dtype = next(floats, torch.get_default_dtype())
    for module in ours:
        module._compile(dtype)
    from .decoding import fuse_decoder_layers

    fuse_decoder_layers(model, on=backend != "reference" and backend not in gpu.MODES and not ours)
    return model


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
