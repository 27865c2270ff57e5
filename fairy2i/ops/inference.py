"""The ops of packed inference: schemas, fakes and what runs on which device.

    fairy2i::packed_linear(
        Tensor x, Tensor words, Tensor scales, Tensor? bias, int out_features, int[] layout, Tensor? places=None
    ) -> Tensor
    fairy2i::packed_linears(
        Tensor x, Tensor[] words, Tensor[] scales, Tensor?[] biases, int[] out_features, int[] layout
    ) -> Tensor[]

``words`` are the codes in the layout of the kernels (:func:`fairy2i.ops.cpu.repack`, :func:`fairy2i.ops.gpu.repack`),
``layout`` says what they mean: kind, stages, granularity, tile, mode, and the rotation, which the op does. Several
layers of one input are one call of the second op on the CPU; on a GPU their words are joined, and ``places``
(:func:`fairy2i.ops.gpu.group_places`) tells them apart. What a scheme is, kernels need not know: see :func:`layout_of`.
The ops have no gradient; :class:`fairy2i.PackedLinear` has, through its reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..granularity import GRANULARITIES
from ..schemes import PhaseScheme, RealScheme, Scheme
from . import cpu, gpu

_SCHEMA = (
    "(Tensor x, Tensor words, Tensor scales, Tensor? bias, int out_features, int[] layout, Tensor? places=None)"
    " -> Tensor"
)
_library = torch.library.Library("fairy2i", "FRAGMENT")
_SCHEMAS = "(Tensor x, Tensor[] words, Tensor[] scales, Tensor?[] biases, int[] out_features, int[] layout) -> Tensor[]"
_library.define(f"packed_linear{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"packed_linears{_SCHEMAS}", tags=(torch.Tag.pt2_compliant_tag,))


def layout_of(scheme: Scheme, mode: str) -> tuple[int, ...]:
    """Return what kernels are told of a scheme and a mode.

    Raises:
        TypeError: no kernel knows the scheme.
    """
    where = GRANULARITIES.index(scheme.granularity)
    how = ({**cpu.MODES, **gpu.MODES}[mode], scheme.rotation)
    if isinstance(scheme, PhaseScheme):
        return (0, scheme.stages, where, scheme.tile, *how)
    if isinstance(scheme, RealScheme):  # ternary is two planes of signs
        return (1, scheme.levels - 1, where, scheme.tile, *how)
    raise TypeError(f"no kernel knows the scheme {scheme!r}")


def code_rows_and_columns(out_features: int, in_features: int, kind: int) -> tuple[int, int]:
    """Return the rows and columns of the codes of a layer."""
    return (out_features // 2, in_features // 2) if kind == 0 else (out_features, in_features)


@torch.library.register_fake("fairy2i::packed_linear", lib=_library)
def _fake(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: list[int],
    places: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: list[int],
    places: Tensor | None = None,
) -> Tensor:
    if layout[4] in gpu.MODES.values():  # Triton's interpreter
        return gpu.linear(x, words, scales, bias, out_features, layout, places)
    return _packed_linears(x, [words], [scales], [bias], [out_features], layout)[0]


@torch.library.register_fake("fairy2i::packed_linears", lib=_library)
def _fakes(
    x: Tensor,
    words: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_features: Sequence[int],
    layout: list[int],
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], size)) for size in out_features]


def _packed_linears(
    x: Tensor,
    words: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_features: Sequence[int],
    layout: list[int],
) -> list[Tensor]:
    if x.dtype not in cpu.DTYPES:
        raise TypeError(f"packed_linear takes float32, bfloat16 or float16 activations, got {x.dtype}")
    layers, kept = [], []  # what a description points at
    for word, scale, size in zip(words, scales, out_features, strict=True):
        if scale.dtype != torch.float32 or word.dtype != torch.int32:
            raise TypeError(f"packed_linear needs int32 words and float32 scales, got {word.dtype} and {scale.dtype}")
        word, scale = word.contiguous(), scale.contiguous()
        kept += [word, scale]
        layer = cpu.describe(code_rows_and_columns(size, x.shape[-1], layout[0]), layout, scale)
        if (need := cpu.library().fairy2i_words(layer)) != word.numel():
            raise ValueError(f"a {size}x{x.shape[-1]} layer needs {need} words of codes, got {word.numel()}")
        layer.codes = word.data_ptr()
        layers.append(layer)
    exact = [None if bias is None else bias.float().contiguous() for bias in biases]
    return cpu.run(layers, x.contiguous(), exact, list(out_features))


_library.impl("packed_linear", _packed_linear, "CPU")
_library.impl("packed_linears", _packed_linears, "CPU")
_library.impl("packed_linear", gpu.linear, "CUDA")


def packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: "tuple[int, ...]",
    places: Tensor | None = None,
) -> Tensor:
    """Multiply (..., in_features) activations with repacked codes: (..., out_features) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: dtypes or sizes that do not belong together.
    """
    return torch.ops.fairy2i.packed_linear(x, words, scales, bias, out_features, layout, places)


def packed_linears(
    x: Tensor,
    words: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_features: Sequence[int],
    layout: "tuple[int, ...]",
) -> list[Tensor]:
    """Multiply as :func:`packed_linear` with several layers, at most 8, of one input and one layout, on the CPU."""
    return torch.ops.fairy2i.packed_linears(x, words, scales, biases, out_features, layout)
