"""What is in a quantized model: method, true bits, use of the codes, and error of each layer.

An error needs a weight to compare with. With an original model it is the original's: quantization and training together
have moved it that far. Without one a QAT layer is compared with its own master weight, which training has moved along:
that is what quantization alone leaves out. A packed layer has no master weight any more, and so no error.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .packed import PackedLinear
from .qat import QATLinear
from .schemes import Scheme, mean_bits_per_weight, method_name

# called with each layer's scheme, its weight before quantization (None if nobody has it) and the dense quantized weight
Look: TypeAlias = Callable[[Scheme, Tensor | None, Tensor], None]


@dataclass(frozen=True)
class LayerInfo:
    """One quantized layer.

    Attributes:
        name, method, shape: name of the module, of its method, and (out, in).
        bits_per_weight: stored bits, padding and scales counted.
        code_use: share of each code, in the order of the codes; complex: -1, +1, -i, +i.
        error: ||w - q|| / ||w||, q the quantized weight and w the one it is compared with; None without w.
        error_against: what w is: "original", "master weight" or None.
        norm: ||w||, or None.
    """

    name: str
    method: str
    shape: tuple[int, int]
    bits_per_weight: float
    code_use: list[float]
    error: float | None
    error_against: str | None
    norm: float | None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


def code_count(scheme: Scheme) -> int:
    """Return how many codes a scheme has: 4 complex phases, or its real levels."""
    return int(getattr(scheme, "levels", 4))


def quantized_layers(model: nn.Module) -> dict[str, QATLinear | PackedLinear]:
    """Return the quantized layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QATLinear | PackedLinear)}


def model_bits_per_weight(model: nn.Module) -> float:
    """Return the true bits per weight over the quantized layers; 0 without any. Quantizes nothing."""
    layers = quantized_layers(model).values()
    return mean_bits_per_weight((layer.scheme, (layer.out_features, layer.in_features)) for layer in layers)


@torch.no_grad()
def inspect_layers(
    model: nn.Module, original: nn.Module | None = None, *, look: Look | None = None, progress: bool = False
) -> list[LayerInfo]:
    """Look into each quantized layer of a model, one at a time; nothing dense is kept.

    Args:
        model: has QATLinear or PackedLinear layers; one without gives an empty list.
        original: an unquantized model with layers of the same names, to measure errors against. Without one the error
            of a QATLinear is that against its own master weight.
        look: called with each layer's scheme and weights, float32 (out, in), before and after quantization.
        progress: show a progress bar, if standard error is a terminal.

    Raises:
        ValueError: the original lacks a layer, or has it in another shape.
    """
    infos = []
    layers = quantized_layers(model)
    for name, layer in tqdm(layers.items(), desc="Layers", disable=None if progress else True, leave=False):
        scheme, shape = layer.scheme, (layer.out_features, layer.in_features)
        codes, scales = layer.codes_and_scales()
        counts = torch.bincount(codes.flatten().long(), minlength=code_count(scheme)).double()
        quantized = scheme.dequantize(codes, scales)
        weight = against = error = norm = None
        if original is not None:
            weight, against = _original_weight(original, name, shape), "original"
        elif isinstance(layer, QATLinear):
            weight, against = layer.matrix, "master weight"
        if weight is not None:
            weight = weight.float().to(quantized.device)
            norm = float(weight.norm())
            error = float((weight - quantized).norm()) / max(norm, 1e-12)
        if look is not None:
            look(scheme, weight, quantized)
        infos.append(
            LayerInfo(
                name=name,
                method=method_name(scheme),
                shape=shape,
                bits_per_weight=scheme.bits_per_weight(*shape),
                code_use=(counts / counts.sum()).tolist(),
                error=error,
                error_against=against,
                norm=norm,
            )
        )
    return infos


def summarize(layers: Sequence[LayerInfo]) -> dict[str, Any]:
    """Return the totals over layers, JSON-able; ``error`` is that of all their weights taken as one long vector."""
    weights = sum(layer.numel for layer in layers)
    known = [(layer.norm**2, layer.error) for layer in layers if layer.norm is not None and layer.error is not None]
    whole = sum(square for square, _ in known)
    return {
        "layers": len(layers),
        "weights": weights,
        "methods": dict(Counter(layer.method for layer in layers)),
        "bits_per_weight": sum(layer.bits_per_weight * layer.numel for layer in layers) / max(weights, 1),
        "error": math.sqrt(sum(square * error**2 for square, error in known) / max(whole, 1e-24)) if known else None,
        "error_against": next((layer.error_against for layer in layers if layer.error_against), None),
    }


def _original_weight(original: nn.Module, name: str, shape: tuple[int, int]) -> Tensor:
    try:
        module = original.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the original has no layer {name}") from None
    weight = module.get_parameter("weight")
    if type(module).__name__ == "Conv1D":
        weight = weight.T  # type: ignore[assignment]
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} is {tuple(weight.shape)} in the original and {shape} here")
    return weight
