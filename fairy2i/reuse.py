"""Keep quantized weights while the weights that they are of stay: quantize once for each step of the optimizer.

Between two steps of the optimizer each forward, recomputation and backward quantizes the same weight to the same
values. Inside :func:`reuse_quantized` that happens once, and what it gave is kept,

    codes    1 byte for 4 weights at one or two stages, 2 bytes at three or four. The dense weight is made from them at
             each use: less to read than the weight, and no scales to find.
    dense    the dense quantized weight itself, as large as the weight in the dtype of the activations. Nothing to make.
             The codes are beside it where scales are learned, for their gradient.

A value is kept for one tensor at one address at one version, and every use looks at the three: a copy, a loaded state
dict or another tensor in its place make it anew. The step of any torch optimizer lets go of everything (fused AdamW
leaves the version as it is). What else writes past the version counter (through `.data`, or FSDP2's gathering, which
sets it back) cannot be seen, so there the scope itself is what is safe: open it where nothing writes weights, and close
it before something does. :class:`fairy2i.training.trainer.QATTrainer` has it open from the first to the last
micro-batch of a step, and during an evaluation. ``verify`` quantizes again at each use and compares.

``graph`` records on a GPU what quantizes all layers as a CUDA graph, and launches it as one: a small model has so many
small layers that calling the kernels takes longer than running them. It holds while all weights stay where they are in
memory, as an optimizer leaves them; elsewhere layers are quantized one by one, and recorded anew.

``defer`` leaves the gradients of learned scales out of each backward: they are linear in those of the weights, so
:meth:`Reuse.scale_gradients` makes them once, of all micro-batches together, and as one CUDA graph too.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_post_hook

from .qat import QATLinear, _dense, _dense_of_kept, gradient_of_scales, quantize_to_keep

logger = logging.getLogger(__name__)

Kept = Literal["codes", "dense"]
KEPT = ("codes", "dense")


class Reuse:
    """What :func:`reuse_quantized` gives: the state of an open scope.

    Args:
        model, what, dtype, verify: as for :func:`reuse_quantized`.
        graph: record a CUDA graph; it outlives the scope, for the next one of the same object.
        defer: make gradients of learned scales in :meth:`scale_gradients`, which must be called behind the last
            backward of the scope. Not where gradients are summed over processes in the backward.
    """

    def __init__(
        self,
        model: nn.Module,
        what: Kept = "codes",
        dtype: torch.dtype | None = None,
        verify: bool = False,
        graph: bool = False,
        defer: bool = False,
    ) -> None:
        if what not in KEPT:
            raise ValueError(f"what is kept is one of {', '.join(KEPT)}, not {what!r}")
        self.what = what
        self.dtype = dtype
        self.verify = verify
        self.sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        self.layers = [module for module in model.modules() if isinstance(module, QATLinear)]
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._hook: Any = None
        shared = _shared(model)  # the gradient of a tied embedding is not that of the head alone
        alone = [layer for layer in self.layers if id(layer.weight) not in shared]
        self._deferring = alone if defer else []
        self._graph = _Graph() if graph and not self.sharded else None
        self._gradients = _Graph()
        self._staged: list[Tensor] = []  # gradients of the weights, at places that stay

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a layer, or a saved one, is in no scope

    def begin(self) -> None:
        """Open the scope; weights that are whole now are quantized now, as a compiled forward cannot fill the place."""
        self.let_go()
        for layer in self.layers:
            vars(layer)["reuse"] = self  # as QATLinear.keep does it
        for layer in self._deferring:
            trained = layer.weight.requires_grad and layer.scales is not None and layer.scales.requires_grad
            vars(layer)["scales_later"] = trained
        self._hook = register_optimizer_step_post_hook(self.let_go)
        self.refresh_all()

    def end(self) -> None:
        """Close the scope and let go of what was kept; harmless where none is open."""
        self.let_go()
        for layer in self.layers:
            vars(layer)["reuse"] = None
        for layer in self._deferring:
            vars(layer)["scales_later"] = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def let_go(self, *_: Any) -> None:
        """Forget what is kept, and go on keeping."""
        for layer in self.layers:
            layer.let_go()
        self._seen.clear()

    def refresh_all(self) -> None:
        """Quantize what has changed since; the first use of a layer does it too, if its forward is not compiled."""
        if self.sharded:  # FSDP2 gathers weights for their use, and that is when they can be quantized
            return
        if self._graph is not None and not self._seen and self._launch(self._graph):
            return
        for layer in self.layers:
            self.refresh(layer, self.dtype or layer.weight.dtype)

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Give learned scales the gradients that were left out, from the summed ones of their weights."""
        layers = [layer for layer in self.layers if layer.scales_later and layer.weight.grad is not None]
        given: list[Any] = [layer.weight.grad for layer in layers]
        kept: list[Any] = [layer.kept if layer.kept_codes is None else layer.kept_codes for layer in layers]

        def gradients(of: list[Tensor]) -> list[Tensor]:
            triples = zip(layers, of, kept, strict=True)
            turned = ((one, grad.T if one.fan_in_fan_out else grad, codes) for one, grad, codes in triples)
            return [gradient_of_scales(one.scheme, grad, _scales_of(one), kept=codes) for one, grad, codes in turned]

        found = None
        if self._graph is not None and _on_gpu(layers):
            if [g.shape for g in self._staged] != [g.shape for g in given]:
                self._staged = [torch.empty_like(g) for g in given]
            torch._foreach_copy_(self._staged, given)
            tensors = [*self._staged, *kept, *(layer.scales for layer in layers)]
            found = self._gradients([t.data_ptr() for t in tensors], lambda: gradients(self._staged))
        for layer, grad in zip(layers, gradients(given) if found is None else found, strict=True):
            scales: Any = layer.scales
            grad = grad.view_as(scales)
            scales.grad = grad if scales.grad is None else scales.grad + grad

    @torch.no_grad()
    def _launch(self, graph: "_Graph") -> bool:
        """Quantize all layers by the graph; False where they must be quantized one by one."""
        stamps = [self._stamp(layer) for layer in self.layers]
        if not _on_gpu(self.layers):
            return False
        places = [value for stamp in stamps for value in stamp[2::3]]  # data_ptr()
        found = graph(
            places, lambda: [self._quantize(layer, self.dtype or layer.weight.dtype) for layer in self.layers]
        )
        if found is None:
            return False
        for layer, stamp, values in zip(self.layers, stamps, found, strict=True):
            layer.keep(*values)
            self._seen[id(layer)] = stamp
        return True

    def _stamp(self, layer: QATLinear) -> tuple[Any, ...]:
        if self.sharded:  # a gathered weight has a new address each time, and scales are gathered anew into one place
            return (layer.weight, layer.weight._version)
        tensors = [t for t in (layer.weight, layer.scales, layer.exact_scales) if t is not None]
        return tuple(value for t in tensors for value in (t, t._version, t.data_ptr()))

    @torch.no_grad()
    def refresh(self, layer: QATLinear, dtype: torch.dtype) -> None:
        """Quantize a layer's weight unless what is kept is of this weight, and of this dtype where it is dense."""
        if layer.weight.is_meta or layer.weight.numel() != layer.in_features * layer.out_features:
            layer.let_go()
            return
        stamp, seen = self._stamp(layer), self._seen.get(id(layer))
        same = seen is not None and len(seen) == len(stamp) and all(map(_same, stamp, seen))
        if same and layer.kept is not None and (self.what == "codes" or layer.kept.dtype == dtype):
            if self.verify:
                self._check(layer, dtype)
            return
        layer.keep(*self._quantize(layer, dtype))
        self._seen[id(layer)] = stamp

    def _quantize(self, layer: QATLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what the layer is to keep: kept, kept_scales, kept_codes."""
        matrix, scales, scheme = layer.matrix.detach(), layer.group_scales, layer.scheme
        if self.what == "dense" and not scheme.learned:
            return _dense(scheme, matrix, scales, dtype)[0], None, None
        codes, used = quantize_to_keep(scheme, matrix, scales)
        if self.what == "codes":
            return codes, used, None
        return _dense_of_kept(scheme, codes, used, matrix.dtype, dtype), None, codes

    def _check(self, layer: QATLinear, dtype: torch.dtype) -> None:
        now, kept = self._quantize(layer, dtype), (layer.kept, layer.kept_scales, layer.kept_codes)
        if any(a is not None and not torch.equal(a, b) for a, b in zip(now, kept, strict=True) if b is not None):
            raise RuntimeError(
                f"the kept quantized weight of {layer} is stale: something wrote the weight past its version counter "
                "(through .data?) inside reuse_quantized; close the scope before"
            )


def _scales_of(layer: QATLinear) -> Tensor:
    scales = layer.group_scales
    assert scales is not None
    return scales


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module has, as tied embeddings and heads do."""
    owned = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    return {key for key, count in Counter(owned).items() if count > 1}


def _on_gpu(layers: list[QATLinear]) -> bool:
    return bool(layers) and all(layer.weight.is_cuda for layer in layers)


def _record(call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Return what a call returns, not computed yet, and what computes it: the call's kernels as one CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # data loaders pin memory meanwhile
        found = call()
    return found, graph.replay


class _Graph:
    """One call, recorded when its tensors have been in the same places twice."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._recorded: tuple[Any, Callable[[], None]] | None = None
        self._fails = False

    def __call__(self, places: list[int], call: Callable[[], Any]) -> Any:
        """Return what ``call`` returned when it was recorded, computed anew; None where it must be called as it is."""
        if self._fails or places != self._places:  # and by that call kernels are compiled before the recording
            self._places, self._recorded = places, None
            return None
        if self._recorded is None:
            try:
                self._recorded = _record(call)
            except RuntimeError as error:
                logger.warning("quantizing layer by layer, as it cannot be recorded in a CUDA graph: %s", error)
                self._fails = True
                return None
        found, replay = self._recorded
        replay()
        return found


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


@contextmanager
def reuse_quantized(
    model: nn.Module, what: Kept = "codes", dtype: torch.dtype | None = None, verify: bool = False
) -> Iterator[Reuse]:
    """Quantize each weight once inside this scope, and use the result until the weight changes.

    Results are the same bit for bit. In-place changes of a weight, and another tensor in its place, are noticed; writes
    through ``.data`` are not, see the module. Nested scopes: the inner one counts, and none is open after it.

    Args:
        model: its QATLinear layers; DDP and FSDP2 too. On FSDP2 the kept values are whole on each process, and a layer
            in a compiled block is quantized at each use as without the scope.
        what: "codes" or "dense".
        dtype: of dense values, where autocast computes in another one than that of the weights.
        verify: quantize again at each use, and raise RuntimeError if the result is another than what was kept.

    Raises:
        ValueError: ``what`` is unknown.
    """
    reuse = Reuse(model, what, dtype, verify)
    reuse.begin()
    try:
        yield reuse
    finally:
        reuse.end()
