"""Schemes: what decides how a weight becomes codes and scales, as plain data.

A scheme is a frozen, validated, JSON-able dataclass. It travels with a layer from training to the packed checkpoint and
knows nothing of modules. METHODS names the schemes of the paper, and of this library's own recipes (docs/results.md). A
method is a name or a scheme; a new variant is a new value here, not a new class.
"""

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .baselines import real_dequantize, real_quantize, real_scale_gradient
from .granularity import GRANULARITIES, Granularity, group_shape
from .packing import packed_columns
from .phase_quant import phase_dequantize, phase_quantize, phase_scale_gradient
from .rotation import ROTATIONS, rotate

ScaleKind = Literal["mean", "joint", "learned"]


def _check_choice(field: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{field} must be a whole number from {low} to {high}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """What all schemes share: the groups that have a scale of their own, and where scales come from.

    Attributes:
        granularity: "tensor", "row" or "tile".
        tile: side of a tile in entries; used by "tile" only.
        scales: "mean" (recomputed from the weight), "joint" (least squares over the stages, recomputed) or "learned"
            (a trained parameter that starts from the fit).
        rotation: width of the blocks of input features that are mixed before the weight is quantized
            (:mod:`fairy2i.rotation`), 0 for none. Codes and scales are those of the rotated weight; what goes in and
            comes out as a dense weight or its gradient is in the basis of the model.
    """

    kind: ClassVar[str]
    granularity: Granularity = "tensor"
    tile: int = 64
    scales: ScaleKind = "mean"
    rotation: int = 0

    def __post_init__(self) -> None:
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_int("tile", self.tile, 1, 1 << 20)
        _check_choice("rotation", self.rotation, ROTATIONS)

    @property
    def learned(self) -> bool:
        """Whether the scales are parameters."""
        return self.scales == "learned"

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        """Return why a matrix of this shape cannot be quantized, or None if it can."""
        return "has no entries" if out_features == 0 or in_features == 0 else None

    @abstractmethod
    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of the scales of a (out_features, in_features) matrix."""

    @abstractmethod
    def code_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of the unpacked codes of a (out_features, in_features) matrix."""

    @property
    @abstractmethod
    def code_width(self) -> int:
        """Bits of a stored code."""

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of the packed codes, in bytes."""
        *rows, columns = self.code_shape(out_features, in_features)
        return (*rows, packed_columns(columns, self.code_width))

    @abstractmethod
    def quantize(self, weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (codes uint8, scales float32) of a (out, in) matrix; with ``scales`` given only the codes are new."""

    @abstractmethod
    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the dense float32 (out, in) weight of codes and scales."""

    @abstractmethod
    def scale_gradient(self, grad: Tensor, codes: Tensor) -> Tensor:
        """Return the gradient of the scales from the (out, in) gradient of the dense weight."""

    def _rotated(self, weight: Tensor) -> Tensor:
        """Return an (out, in) matrix in the basis of the codes, float32 where that is another one."""
        return rotate(weight.float(), self.rotation) if self.rotation else weight

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Return the true bits per real weight as stored: packed codes, padding included, plus float32 scales."""
        codes = 8 * math.prod(self.packed_shape(out_features, in_features))
        scales = 32 * math.prod(self.scale_shape(out_features, in_features))
        return (codes + scales) / (out_features * in_features)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict that :func:`scheme_from_dict` reads back; a rotation is in it where there is one."""
        fields = {"kind": self.kind, **dataclasses.asdict(self)}
        if not self.rotation:  # as checkpoints were written before there were rotations
            del fields["rotation"]
        return fields


@dataclass(frozen=True, kw_only=True)
class PhaseScheme(Scheme):
    """Complex phase codes in residual stages: T stages are T bits per real weight (:mod:`fairy2i.phase_quant`).

    Attributes:
        stages: number of residual stages, 1 to 8.
        refits: rounds of the joint fit ("joint" scales, and the start of "learned" ones).

    Raises:
        ValueError: a field has an unknown or impossible value.
    """

    kind: ClassVar[str] = "phase"
    stages: int = 2
    refits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("scales", self.scales, ("mean", "joint", "learned"))
        _check_int("stages", self.stages, 1, 8)
        _check_int("refits", self.refits, 1, 1000)

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if out_features % 2 or in_features % 2:
            return f"odd size {out_features}x{in_features}: features cannot be paired into complex numbers"
        return super().unsupported(out_features, in_features)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        group = group_shape(out_features // 2, in_features // 2, self.granularity, self.tile)
        return (self.stages, 2, 2, *group)

    def code_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return (self.stages, 2, out_features // 2, in_features // 2)

    @property
    def code_width(self) -> int:
        return 2

    def quantize(self, weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return phase_quantize(
            self._rotated(weight),
            stages=self.stages,
            granularity=self.granularity,
            tile=self.tile,
            refits=0 if self.scales == "mean" else self.refits,
            scales=scales,
        )

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        return rotate(phase_dequantize(codes, scales, granularity=self.granularity, tile=self.tile), self.rotation)

    def scale_gradient(self, grad: Tensor, codes: Tensor) -> Tensor:
        return phase_scale_gradient(self._rotated(grad), codes, granularity=self.granularity, tile=self.tile)


@dataclass(frozen=True, kw_only=True)
class RealScheme(Scheme):
    """Real binary or ternary codes, the paper's baselines (:mod:`fairy2i.baselines`).

    Attributes:
        levels: 2 (binary, 1 bit) or 3 (ternary, stored in 2 bits).

    Raises:
        ValueError: a field has an unknown or impossible value.
    """

    kind: ClassVar[str] = "real"
    levels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("scales", self.scales, ("mean", "learned"))
        _check_choice("levels", self.levels, (2, 3))

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return group_shape(out_features, in_features, self.granularity, self.tile)

    def code_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return (out_features, in_features)

    @property
    def code_width(self) -> int:
        return 1 if self.levels == 2 else 2

    def quantize(self, weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rotated = self._rotated(weight)
        return real_quantize(rotated, levels=self.levels, granularity=self.granularity, tile=self.tile, scales=scales)

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        dense = real_dequantize(codes, scales, levels=self.levels, granularity=self.granularity, tile=self.tile)
        return rotate(dense, self.rotation)

    def scale_gradient(self, grad: Tensor, codes: Tensor) -> Tensor:
        rotated = self._rotated(grad)
        return real_scale_gradient(rotated, codes, levels=self.levels, granularity=self.granularity, tile=self.tile)


def mean_bits_per_weight(layers: Iterable[tuple[Scheme, tuple[int, int]]]) -> float:
    """Return the true bits per weight over layers given as (scheme, (out, in)); 0 without layers."""
    bits = weights = 0.0
    for scheme, shape in layers:
        bits += scheme.bits_per_weight(*shape) * math.prod(shape)
        weights += math.prod(shape)
    return bits / max(weights, 1)


METHODS: dict[str, Scheme] = {
    "bitnet": RealScheme(levels=2),
    "bitnet_1_58": RealScheme(levels=3),
    "complex_phase_v1": PhaseScheme(stages=1),
    "complex_phase_v2": PhaseScheme(stages=2),
    "complex_phase_v3": PhaseScheme(stages=3),
    "complex_phase_v4": PhaseScheme(stages=4),
    **{f"fairy2i_w{t}": PhaseScheme(stages=t, granularity="row", scales="learned", rotation=64) for t in (1, 2, 3)},
}

_KINDS: dict[str, type[Scheme]] = {cls.kind: cls for cls in (PhaseScheme, RealScheme)}


def resolve_method(method: "str | Scheme") -> Scheme:
    """Return the scheme of a method name, or the scheme itself.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
        TypeError: ``method`` is neither a name nor a scheme.
    """
    if isinstance(method, Scheme):
        return method
    if not isinstance(method, str):
        raise TypeError(f"a method is a name or a scheme, got {type(method).__name__}")
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown method {method!r}.{hint} Known methods: {', '.join(METHODS)}")
    return METHODS[method]


def method_name(scheme: Scheme) -> str:
    """Return the name of a scheme in METHODS, or its repr if it has none."""
    return next((name for name, known in METHODS.items() if known == scheme), repr(scheme))


def scheme_from_dict(data: dict[str, Any]) -> Scheme:
    """Read back what :meth:`Scheme.to_dict` wrote.

    Raises:
        ValueError: the kind or a field is unknown, or a value is impossible.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown scheme kind {kind!r}. Known kinds: {', '.join(_KINDS)}")
    known = {field.name for field in dataclasses.fields(_KINDS[kind])}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"a {kind} scheme has no field {', '.join(unknown)}. Known fields: {', '.join(sorted(known))}")
    return _KINDS[kind](**fields)
