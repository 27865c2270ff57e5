"""What is in a quantized model: method, true bits, use of the codes, and error against an original, by layer."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .packed import PackedLinear
from .qat import QATLinear
from .schemes import Scheme, mean_bits_per_weight, method_name


@dataclass(frozen=True)
class LayerInfo:
    """One quantized layer.

    Attributes:
        name, method, shape: name of the module, of its method, and (out, in).
        bits_per_weight: stored bits, padding and scales counted.
        code_use: share of each code, in the order of the codes; complex: -1, +1, -i, +i.
        error: ||w - q|| / ||w|| against the original weight, or None without one.
    """

    name: str
    method: str
    shape: tuple[int, int]
    bits_per_weight: float
    code_use: list[float]
    error: float | None

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
def inspect_layers(model: nn.Module, original: nn.Module | None = None) -> list[LayerInfo]:
    """Look into each quantized layer of a model.

    Args:
        model: has QATLinear or PackedLinear layers; one without gives an empty list.
        original: an unquantized model with layers of the same names, to measure errors against.

    Raises:
        ValueError: the original lacks a layer, or has it in another shape.
    """
    infos = []
    for name, layer in quantized_layers(model).items():
        scheme, shape = layer.scheme, (layer.out_features, layer.in_features)
        codes, scales = layer.codes_and_scales()
        counts = torch.bincount(codes.flatten().long(), minlength=code_count(scheme)).double()
        error = None
        if original is not None:
            weight = _original_weight(original, name, shape).float().to(scales.device)
            error = float((weight - scheme.dequantize(codes, scales)).norm() / weight.norm().clamp(min=1e-12))
        infos.append(
            LayerInfo(
                name=name,
                method=method_name(scheme),
                shape=shape,
                bits_per_weight=scheme.bits_per_weight(*shape),
                code_use=(counts / counts.sum()).tolist(),
                error=error,
            )
        )
    return infos


def _original_weight(original: nn.Module, name: str, shape: tuple[int, int]) -> torch.Tensor:
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
