"""A token at a time through decoder layers of LLaMA's form, on the CPU: two calls of the kernels a layer.

What lies between the packed layers, norms, rotary positions, the gated unit and the sums, is little work, but in small
operations it takes as long as reading the codes of two bits. So where a layer is what :func:`fuse_decoder_layers`
knows, and gets one token of at most a few sequences, it goes through csrc/decoder.cpp: in float32 whatever the dtype of
the model, with the cache and the attention of PyTorch in between. Everything else goes the way that transformers made.
"""

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import packed
from .ops import cpu
from .packed import FEW, PackedLinear, watched

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_LINEARS = (
    ("self_attn", "q_proj"),
    ("self_attn", "k_proj"),
    ("self_attn", "v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj"),
    ("mlp", "up_proj"),
    ("mlp", "down_proj"),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = (*_NORMS, "self_attn", "mlp")
_plans: "weakref.WeakKeyDictionary[nn.Module, _Plan]" = weakref.WeakKeyDictionary()


def fuse_decoder_layers(model: nn.Module, on: bool = True) -> int:
    """Let decoder layers whose linear layers are packed take single tokens through the fused kernels, or no more.

    Args:
        model: any module; what is not a decoder layer of a known form stays as it is.
        on: False takes it back.

    Returns:
        How many layers are fused.
    """
    count = 0
    for layer in model.modules():
        ours = getattr(layer.__dict__.get("forward"), "func", None) is _forward
        if on and not ours and _is_known(layer) and _packed_layers(layer) is not None:
            layer.forward = functools.partial(_forward, layer)  # which copies and pickles with the layer
            ours = True
        elif ours and not on:
            del layer.__dict__["forward"]
            _plans.pop(layer, None)
            ours = False
        count += ours
    return count


def _is_known(layer: nn.Module) -> bool:
    kind = type(layer)
    if kind.__name__ not in LAYERS or not kind.__module__.startswith("transformers.models."):
        return False
    if "forward" in layer.__dict__ or hasattr(layer, "_hf_hook"):  # something else has its hand in
        return False
    activation: Any = getattr(getattr(layer, "mlp", None), "act_fn", None)
    norms = [getattr(layer, name, None) for name in _NORMS]
    return type(activation).__name__ in ("SiLU", "SiLUActivation") and all(
        type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon") for norm in norms
    )


def _packed_layers(layer: nn.Module) -> tuple[PackedLinear, ...] | None:
    """Return the packed layers of a decoder layer, or None where one is something else."""
    found = [layer._modules[part]._modules.get(name) for part, name in _LINEARS]  # type: ignore[union-attr]
    return tuple(found) if all(type(module) is PackedLinear for module in found) else None  # type: ignore[arg-type]


def _is_free(module: nn.Module) -> bool:
    """Return whether nobody needs a module to be called."""
    own: Any = module.__dict__  # "forward" in it: accelerate's, say, which moves inputs and weights
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["training"] or "forward" in own)


class _Plan:
    """The pointers that the library is given for a layer, as long as the layer is what it was."""

    def __init__(self, layer: nn.Module, linears: tuple[PackedLinear, ...], backend: str) -> None:
        ready = [linear._ready(backend) for linear in linears]
        self.kernels, self.biases = [kernel for kernel, _ in ready], [bias for _, bias in ready]
        self.inner = cpu.pointers(self.kernels[:3]), cpu.pointers(self.biases[:3])
        self.outer = cpu.pointers(self.kernels[3:]), cpu.pointers(self.biases[3:])
        norms: list[Any] = [layer._modules[name] for name in _NORMS]
        self.norms = tuple(norm.weight.detach().float().contiguous() for norm in norms)
        self.eps = tuple(float(norm.variance_epsilon) for norm in norms)
        attention: Any = layer._modules["self_attn"]
        self.attention, self.head = attention, int(attention.head_dim)
        self.sizes = tuple(linear.out_features for linear in linears[:3])
        self.grouped, self.features = self.sizes[0] != self.sizes[1], linears[0].in_features
        # what all this was made of, for holds()
        self.asked = packed.DEFAULT, [linear.backend for linear in linears]
        self.linears = linears
        parents: list[Any] = [layer, layer, layer, layer, *(layer._modules[part] for part, _ in _LINEARS)]
        names = [*_PARTS, *(name for _, name in _LINEARS)]
        self.modules = [
            (parent._modules, name, parent._modules[name]) for parent, name in zip(parents, names, strict=True)
        ]
        owners = [*((norm._parameters, "weight") for norm in norms), *((one._parameters, "bias") for one in linears)]
        self.copied = [(owner, name, owner[name], getattr(owner[name], "_version", 0)) for owner, name in owners]

    def holds(self) -> bool:
        """Return whether nothing has changed since, and nobody needs a part of the layer to be called."""
        for parent, name, module in self.modules:
            if parent[name] is not module or not _is_free(module):
                return False
        default, backends = self.asked
        if packed.DEFAULT != default:
            return False
        for linear, kernel, backend in zip(self.linears, self.kernels, backends, strict=True):
            if linear._kernel is not kernel or linear.backend != backend or linear.keep_dense:
                return False
            if linear._buffers["scales"].data_ptr() != kernel.scales:  # type: ignore[union-attr]
                return False
        for parameters, name, value, version in self.copied:
            if parameters[name] is not value or (value is not None and value._version != version):
                return False
        return True


def _plan_for(layer: nn.Module, x: Tensor, cosine: Tensor, sine: Tensor) -> _Plan | None:
    """Return the plan for such a call, or None where it is not one that the library can make."""
    plan = _plans.get(layer)
    if plan is None or not plan.holds():
        plan = _make_plan(layer, x)
    if plan is None or x.shape[-1] != plan.features or cosine.shape != sine.shape:
        return None
    return plan if tuple(cosine.shape) in ((1, 1, plan.head), (x.shape[0], 1, plan.head)) else None


def _make_plan(layer: nn.Module, x: Tensor) -> _Plan | None:
    linears = _packed_layers(layer)
    if linears is None or not all(map(_is_free, (*linears, *(layer._modules[name] for name in _PARTS)))):  # type: ignore[arg-type]
        return None
    backends = {linear.backend_for(x) for linear in linears}
    backend = backends.pop()
    if backends or backend not in cpu.MODES or not _fit(linears):
        return None
    plan = _plans[layer] = _Plan(layer, linears, backend)
    return plan


def _fit(linears: tuple[PackedLinear, ...]) -> bool:
    """Return whether the sizes are those of a decoder layer, and layers of one input rotate it alike."""
    q, k, v, o, gate, up, down = linears
    into = (q.in_features, k.in_features, v.in_features, gate.in_features, up.in_features)
    return (
        len({*into, o.out_features, down.out_features}) == 1
        and (o.in_features, k.out_features, up.out_features) == (q.out_features, v.out_features, gate.out_features)
        and down.in_features == gate.out_features
        and len({layer.scheme.rotation for layer in (q, k, v)}) == len({gate.scheme.rotation, up.scheme.rotation}) == 1
    )


def _forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Do as the layer's class does; where it is one token and nobody watches, by the fused kernels."""
    x = hidden_states
    plan = None
    if (
        x.dim() == 3
        and x.shape[1] == 1
        and x.shape[0] <= FEW
        and attention_mask is None
        and position_embeddings is not None
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not watched(x)
        and not _has_any_global_hook()
        and x.device.type == "cpu"
        and x.dtype in cpu.DTYPES
        and not torch.is_autocast_enabled("cpu")
        and self._modules["self_attn"].config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    ):
        plan = _plan_for(self, x, *position_embeddings)
    if plan is None:
        return type(self).forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    assert position_embeddings is not None
    tokens, dtype = x.shape[0], x.dtype
    hidden = x.float().contiguous()
    if hidden is x:
        hidden = x.clone()
    cosine, sine = (part.float().contiguous() for part in position_embeddings)
    heads = [torch.empty(tokens, size // plan.head, 1, plan.head) for size in plan.sizes]
    cpu.decoder_in(plan.inner, hidden, plan.norms[0], plan.eps[0], cosine, sine, plan.head, heads)
    query, key, value = heads if dtype == torch.float32 else [part.to(dtype) for part in heads]
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, plan.attention.layer_idx)
    attended = F.scaled_dot_product_attention(query, key, value, scale=plan.attention.scaling, enable_gqa=plan.grouped)
    cpu.decoder_out(plan.outer, attended.float().contiguous(), plan.norms[1], plan.eps[1], hidden)
    return hidden.to(dtype)
