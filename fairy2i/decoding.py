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


def _free_layers(layer: nn.Module) -> tuple[PackedLinear, ...] | None:
    """Return the packed layers of a decoder layer, or None where somebody wants a part of it to be called."""
    found = _packed_layers(layer)
    if found is None:
        return None
    parts = (*found, *(layer._modules[name] for name in _PARTS))
    for module in parts:
        own: Any = module.__dict__  # "forward" in it: accelerate's, say, which moves inputs and weights
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["training"] or "forward" in own:
            return None
    return found


class _Plan:
    """The pointers that the library is given for a layer, as long as the layer is what it was."""

    def __init__(self, layer: nn.Module, linears: tuple[PackedLinear, ...], backend: str) -> None:
        ready = [linear._ready(backend) for linear in linears]
        self.kernels = tuple(kernel for kernel, _ in ready)
        self.linears, self.biases = linears, [bias for _, bias in ready]
        self.inner = cpu.pointers(self.kernels[:3]), cpu.pointers(self.biases[:3])
        self.outer = cpu.pointers(self.kernels[3:]), cpu.pointers(self.biases[3:])
        norms: list[Any] = [layer._modules[name] for name in _NORMS]
        self.norms = tuple(norm.weight.detach().float().contiguous() for norm in norms)
        owners = [(norm, "weight") for norm in norms] + [(linear, "bias") for linear in linears]
        self.copied = [  # parameters that float32 copies were made of
            (module._parameters, name, module._parameters[name], getattr(module._parameters[name], "_version", 0))
            for module, name in owners
        ]
        self.eps = tuple(float(norm.variance_epsilon) for norm in norms)
        attention: Any = layer._modules["self_attn"]
        self.attention, self.head = attention, int(attention.head_dim)
        self.sizes = tuple(linear.out_features for linear in linears[:3])
        self.grouped = self.sizes[0] != self.sizes[1]

    def is_of(self, linears: tuple[PackedLinear, ...], backend: str) -> bool:
        """Return whether nothing has changed since."""
        return (
            linears == self.linears
            and all(
                linear._kernel is kernel
                and kernel.mode_name == backend
                and kernel.scales == linear._buffers["scales"].data_ptr()  # type: ignore[union-attr]
                for linear, kernel in zip(linears, self.kernels, strict=True)
            )
            and all(
                parameters[name] is value and (value is None or value._version == version)
                for parameters, name, value, version in self.copied
            )
        )


def _plan_for(layer: nn.Module, x: Tensor) -> _Plan | None:
    linears = _free_layers(layer)
    if linears is None:
        return None
    backends = {linear.backend_for(x) for linear in linears}
    backend = backends.pop()
    if backends or backend not in cpu.MODES:
        return None
    plan = _plans.get(layer)
    if plan is None or not plan.is_of(linears, backend):
        if not _fit(linears, x.shape[-1]):
            return None
        plan = _plans[layer] = _Plan(layer, linears, backend)
    return plan


def _fit(linears: tuple[PackedLinear, ...], features: int) -> bool:
    """Return whether the sizes are those of a decoder layer, and layers of one input rotate it alike."""
    q, k, v, o, gate, up, down = linears
    into = (q.in_features, k.in_features, v.in_features, gate.in_features, up.in_features)
    return (
        {*into, o.out_features, down.out_features} == {features}
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
        and position_embeddings[0].shape[-1] == self._modules["self_attn"].head_dim  # type: ignore[union-attr]
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not watched(x)
        and not _has_any_global_hook()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and self._modules["self_attn"].config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    ):
        plan = _plan_for(self, x)
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
