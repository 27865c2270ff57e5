"""Swap the linear layers of a model: into QATLinear to train, out of it to use.

Both directions first plan, then act: all that can go wrong is found before the first module changes, so an error leaves
the model as it was. Modules are chosen by name: a pattern is a full module name, or a shell-style glob that is matched
against the full name and against its last part ("q_proj", "*.layers.0.*", "lm_head").
"""

import fnmatch
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from .packed import PackedLinear, use_backend
from .qat import QATLinear
from .schemes import Scheme, mean_bits_per_weight, method_name, resolve_method

logger = logging.getLogger(__name__)

T = TypeVar("T")

Method = str | Scheme | Mapping[str, "str | Scheme | None"]

DEQUANTIZED_KEY = "fairy2i_dequantized"  # marks, in a model's config, weights that are dequantized values


@dataclass(frozen=True)
class ReplacedLayer:
    """One quantized layer: its name, (out, in) shape, and scheme."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass
class ConversionReport:
    """What :func:`replace_modules_for_qat` did; its repr is meant to be read.

    Attributes:
        replaced: the layers that are quantized now, those of an earlier call included.
        skipped: (name, (out, in), reason) of the linear layers that are not.
        unreachable: names and shapes of fused expert weights that a swap of linear layers cannot reach.
        total_parameters: parameters of the whole model, shared ones counted once, learned scales not.
    """

    replaced: list[ReplacedLayer] = field(default_factory=list)
    skipped: list[tuple[str, tuple[int, int], str]] = field(default_factory=list)
    unreachable: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    total_parameters: int = 0

    @property
    def quantized_weights(self) -> int:
        """Number of weights in quantized layers."""
        return sum(layer.numel for layer in self.replaced)

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits per weight of the quantized layers, codes and float32 scales counted."""
        return mean_bits_per_weight((layer.scheme, layer.shape) for layer in self.replaced)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for layer in self.replaced:
            name = method_name(layer.scheme)
            counts[name] = counts.get(name, 0) + 1
        methods = ", ".join(f"{count} x {name}" if len(counts) > 1 else name for name, count in counts.items())
        linear = len(self.replaced) + len(self.skipped)
        share = self.quantized_weights / max(self.total_parameters, 1)
        lines = [
            f"Fairy2i: {len(self.replaced)} of {linear} linear layers quantized: {methods}",
            f"  weights  {self.quantized_weights:,} at {self.bits_per_weight:.4g} bits each, scales counted"
            f" ({share:.1%} of {self.total_parameters:,} parameters)",
        ]
        reasons: dict[str, list[str]] = {}
        for name, shape, reason in self.skipped:
            reasons.setdefault(reason, []).append(f"{name} ({shape[0]}x{shape[1]})")
        lines += [f"  skipped  {_some(names)}: {reason}" for reason, names in reasons.items()]
        if self.unreachable:
            names = [f"{name} {'x'.join(map(str, shape))}" for name, shape in self.unreachable]
            lines.append(f"  not reached  {_some(names)}: fused expert weights stay in full precision")
        return "\n".join(lines)

    __repr__ = __str__


def _some(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _matches(name: str, pattern: str, exact: bool) -> bool:
    if exact:
        return name == pattern
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[2], pattern)


def _first_match(name: str, patterns: Iterable[str], names: set[str]) -> str | None:
    """Return the first pattern that matches; one that is the full name of a module stands for that module alone."""
    return next((pattern for pattern in patterns if _matches(name, pattern, pattern in names)), None)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is the Conv1D of transformers (GPT-2): a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    """Yield (name, module, (out, in)) of every linear layer, a shared module once."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | PackedLinear):
            yield name, module, (module.out_features, module.in_features)
        elif is_conv1d(module):
            yield name, module, (module.nf, module.nx)


def _output_head(model: nn.Module) -> nn.Module | None:
    if callable(getattr(model, "get_output_embeddings", None)):
        return model.get_output_embeddings()  # type: ignore[operator]
    return next((module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"), None)


def _embedding_ids(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _is_tied(model: nn.Module, head: nn.Module, embeddings: set[int]) -> bool:
    if id(head.weight) in embeddings:
        return True
    # transformers ties after loading: on "meta" the config alone knows
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    return head.get_parameter("weight").is_meta and bool(getattr(text_config, "tie_word_embeddings", False))


def _fused_experts(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or isinstance(module, QATLinear):
            continue  # convolutions have 3-D weights of their own, and learned scales may be 3-D
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() == 3 and parameter.is_floating_point():
                found.append((name, tuple(parameter.shape)))
    return found


def _set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _replace_everywhere(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one is registered, under every name, with the hook of accelerate."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in swaps:
            _set_module(model, name, swaps[module])
            if hasattr(module, "_hf_hook") and not hasattr(swaps[module], "_hf_hook"):
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(swaps[module], module._hf_hook)  # it brings inputs, or the weight, to the device


def check_in_memory(name: str, layer: nn.Module) -> None:
    """Check that the weight of a layer is there to be quantized: not that of a model on "meta", which may come later.

    Raises:
        ValueError: accelerate offloaded the weight.
    """
    if hasattr(layer, "_hf_hook") and layer.get_parameter("weight").is_meta:
        raise ValueError(
            f"the weight of {name} is offloaded and cannot be quantized now; load the model without offloading, or "
            "load a checkpoint that is quantized already"
        )


def _check_not_quantized(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if done := getattr(config, DEQUANTIZED_KEY, None) or getattr(model, DEQUANTIZED_KEY, None):
        raise ValueError(
            f"the weights of this model are already quantized values ({done}), written by convert_to_inference_mode. "
            "Quantizing them again would move them. Load the QAT checkpoint instead and go on from its master weights."
        )
    theirs = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    if getattr(model, "is_quantized", False) and theirs not in (None, "fairy2i", "gguf"):
        raise ValueError(f"this model is already quantized by {theirs}; load it in full precision (bfloat16) first")


def plan_replacement(
    model: nn.Module,
    method: Method,
    skip_lm_head: bool | None = None,
    skip_modules: Iterable[str] = (),
) -> tuple[ConversionReport, list[tuple[nn.Module, Scheme]]]:
    """Return what :func:`replace_modules_for_qat` would report and the layers it would replace; nothing changes.

    Args:
        model, method, skip_lm_head, skip_modules: as for replace_modules_for_qat.

    Returns:
        The report, without ``unreachable``; and each layer that is not a QATLinear yet with its scheme, in the order
        in which the report has them.

    Raises:
        ValueError: as replace_modules_for_qat.
    """
    rules = dict(method) if isinstance(method, Mapping) else {"*": method}
    schemes = {pattern: None if value is None else resolve_method(value) for pattern, value in rules.items()}
    skip_modules = [skip_modules] if isinstance(skip_modules, str) else list(skip_modules)
    _check_not_quantized(model)

    layers = list(linear_layers(model))
    names = {name for name, _, _ in layers}
    head = _output_head(model)
    embeddings = _embedding_ids(model)
    scales = {id(module.scales) for module in model.modules() if isinstance(module, QATLinear)}
    report = ConversionReport(total_parameters=sum(p.numel() for p in model.parameters() if id(p) not in scales))
    plan: list[tuple[nn.Module, Scheme]] = []
    used: set[str] = set()
    for name, module, shape in layers:
        skip = _first_match(name, skip_modules, names)
        pattern = _first_match(name, schemes, names)
        used |= {p for p in (skip, pattern) if p is not None}
        scheme = schemes[pattern] if pattern is not None else None
        if isinstance(module, PackedLinear):
            raise ValueError(f"{name} is packed already; train from the QAT checkpoint, which has the master weights")
        if isinstance(module, QATLinear):
            if scheme is not None and scheme != module.scheme:
                logger.warning("%s stays %s as it already is", name, method_name(module.scheme))
            report.replaced.append(ReplacedLayer(name, shape, module.scheme))
            continue
        if not name:
            reason: str | None = "is the model itself; pass a module that contains it"
        elif skip is not None:
            reason = f"skip_modules has {skip!r}"
        elif module is head and skip_lm_head:
            reason = "skip_lm_head"
        elif module is head and skip_lm_head is None and _is_tied(model, module, embeddings):
            reason = "tied to the embedding (skip_lm_head=False quantizes it)"
        elif type(module) is not nn.Linear and not is_conv1d(module):
            reason = f"{type(module).__name__} is its own kind of linear layer"
        elif scheme is None:
            reason = "no pattern of the method asks for it"
        else:
            reason = scheme.unsupported(*shape)
        if reason is not None:
            report.skipped.append((name, shape, reason))
            continue
        assert scheme is not None
        weight = module.get_parameter("weight")
        if scheme.learned:
            check_in_memory(name, module)
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f"the weight of {name} has NaN or infinite entries; nothing was replaced")
        plan.append((module, scheme))
        report.replaced.append(ReplacedLayer(name, shape, scheme))

    if unmatched := [p for p in schemes if p not in used and isinstance(method, Mapping)]:
        raise ValueError(f"no linear layer matches {_some(list(map(repr, unmatched)))}. {_seen(model, layers)}")
    if unmatched := [p for p in skip_modules if p not in used]:
        logger.warning("skip_modules: no linear layer matches %s", _some(list(map(repr, unmatched))))
    if not report.replaced:
        raise ValueError(f"nothing to replace.{_because(report)} {_seen(model, layers)}")
    return report, plan


def replace_modules_for_qat(
    model: nn.Module,
    method: Method,
    skip_lm_head: bool | None = None,
    skip_modules: Iterable[str] = (),
) -> ConversionReport:
    """Replace the linear layers of a model by QATLinear, in place, for quantization-aware training.

    Parameters are shared, not copied: the state dict keeps its keys (plus ``scales`` where a scheme learns them) and an
    optimizer made before still holds the same weights. nn.Linear and the Conv1D of transformers (GPT-2) are replaced;
    embeddings and norms never. Layers a scheme cannot take (odd sizes) are skipped and reported. Calling it again is
    harmless: layers that are QATLinear already stay as they are.

    Args:
        model: any module, on any device ("meta" too), in any floating dtype.
        method: a name from METHODS, a scheme, or a mapping {pattern: name, scheme or None}; the first pattern that
            matches a layer counts, None and no match leave it in full precision.
        skip_lm_head: None quantizes an output head with a weight of its own and leaves one that is tied to the
            embedding; True leaves it, False quantizes it. A tied head goes on sharing the embedding's Parameter.
        skip_modules: patterns of layers to leave alone.

    Returns:
        The report: what was replaced, what was skipped and why, true bits per weight.

    Raises:
        ValueError: unknown method; a pattern of the mapping matches no layer; NaN or infinite weights (names the
            module); the model is already quantized; nothing to replace (names the modules seen); learned scales of a
            weight that accelerate offloaded.

    Source: arXiv 2512.02901, section 4.
    """
    report, plan = plan_replacement(model, method, skip_lm_head, skip_modules)
    _replace_everywhere(
        model,
        {
            module: QATLinear.from_linear(module, scheme, is_conv1d(module))
            for module, scheme in _progress(plan, "Quantizing")
        },
    )
    report.unreachable = _fused_experts(model)
    if report.unreachable:
        shown = _some([f"{name} {'x'.join(map(str, shape))}" for name, shape in report.unreachable])
        warnings.warn(f"fused expert weights are not nn.Linear and stay in full precision: {shown}", stacklevel=2)
    _record(model, report, mode="qat")
    return report


def _progress(layers: Sequence[T], what: str) -> Iterable[T]:
    """Show a progress bar on a terminal once it takes more than two seconds, as scales of large layers do."""
    return tqdm(layers, desc=what, unit="layer", delay=2, disable=None)


def _because(report: ConversionReport) -> str:
    return "".join(f" {name} ({reason})." for name, _, reason in report.skipped[:3])


def _seen(model: nn.Module, layers: list[tuple[str, nn.Module, tuple[int, int]]]) -> str:
    if layers:
        return f"Linear layers of the model: {_some([name or '(the model itself)' for name, _, _ in layers], 8)}"
    first = [f"{name or '(root)'}: {type(module).__name__}" for name, module in model.named_modules()]
    return f"The model has no linear layers; its first modules are {_some(first, 8)}"


def _record(model: nn.Module, report: ConversionReport | None = None, mode: str | None = None) -> None:
    """Tell a transformers model what it is now, so that save_pretrained writes it down; no mode: not quantized."""
    if callable(getattr(model, "save_pretrained", None)) and hasattr(model, "config"):
        from .integrations.transformers import record_conversion  # the one import against the grain, and only here

        record_conversion(model, report, mode)


def dequantized_linear(layer: QATLinear) -> nn.Module:
    """Return a plain nn.Linear (or Conv1D, as the layer was) that holds the dequantized weight, not trainable."""
    with torch.device("meta"):
        if layer.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            new: nn.Module = Conv1D(layer.out_features, layer.in_features)
        else:
            new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    dense = layer.quantized_weight()
    new.weight = nn.Parameter(dense.T.contiguous() if layer.fan_in_fan_out else dense, requires_grad=False)
    new.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
    return new.train(layer.training)


def convert_to_inference_mode(model: nn.Module, packed: bool = True) -> nn.Module:
    """Replace each QATLinear by a PackedLinear or a plain layer, in place, once and for all.

    The outputs stay what they were, bit for bit in the dtype of the master weights. Master weights are let go, layer by
    layer. A second call finds nothing to do. An output head that was tied gets a weight of its own, and a
    transformers model then says ``tie_word_embeddings: false``.

    Args:
        model: a model that :func:`replace_modules_for_qat` converted, on any device ("meta" too, if ``packed``).
        packed: True keeps codes and scales, at the true bits per weight; False writes the dequantized weight into plain
            nn.Linear (or Conv1D) layers, for tools that know nothing of quantization.

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: the model was never converted, or accelerate offloaded a part of it.
    """
    config = getattr(model, "config", None)
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, QATLinear):
            check_in_memory(name, module)
            layers.append(module)
    if not layers:
        done = getattr(model, DEQUANTIZED_KEY, False) or getattr(config, DEQUANTIZED_KEY, None)
        if done or any(isinstance(module, PackedLinear) for module in model.modules()):
            return model.eval()
        raise ValueError("the model has no QATLinear layers; call replace_modules_for_qat and train it first")
    if packed and callable(getattr(model, "save_pretrained", None)) and not hasattr(config, "quantization_config"):
        replace_modules_for_qat(model, {})  # converted as a part of a larger module: record the layers as they are
    embeddings = _embedding_ids(model)
    methods = sorted({method_name(layer.scheme) for layer in layers})
    for _ in _progress(range(len(layers)), "Packing" if packed else "Dequantizing"):
        layer = layers.pop()
        if id(layer.weight) in embeddings and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        _replace_everywhere(model, {layer: PackedLinear.from_qat(layer) if packed else dequantized_linear(layer)})
    if packed:
        _record(model, mode="packed")
        return use_backend(model.eval(), "auto")
    _record(model)
    setattr(model if config is None else config, DEQUANTIZED_KEY, ", ".join(methods))
    return model.eval()
