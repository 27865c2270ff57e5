"""The op of packed inference, ``fairy2i::packed_linear``: schema, fake and what runs on which device.

    packed_linear(
        Tensor x, Tensor words, Tensor scales, Tensor? bias, int out_features, int[] layout, Tensor? places=None
    ) -> Tensor

``words`` are the codes in the layout of the kernels (:func:`fairy2i.ops.cpu.repack`, :func:`fairy2i.ops.gpu.repack`),
``layout`` says what they mean: kind, stages, granularity, tile, mode, and on a GPU the rotation, which the op does.
``places`` is for words of several layers (:func:`fairy2i.ops.gpu.group_places`), on a GPU. What a scheme is, kernels
need not know: see :func:`layout_of`. The op has no gradient; :class:`fairy2i.PackedLinear` has, through its reference.
"""

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
_library.define(f"packed_linear{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))


def layout_of(scheme: Scheme, mode: str) -> tuple[int, ...]:
    """Return what kernels are told of a scheme and a mode.

    Raises:
        TypeError: no kernel knows the scheme.
    """
    where = GRANULARITIES.index(scheme.granularity)
    how = (gpu.MODES[mode], scheme.rotation) if mode in gpu.MODES else (cpu.MODES[mode],)
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
    if x.dtype not in cpu.DTYPES:
        raise TypeError(f"packed_linear takes float32, bfloat16 or float16 activations, got {x.dtype}")
    if scales.dtype != torch.float32 or words.dtype != torch.int32:
        raise TypeError(f"packed_linear needs int32 words and float32 scales, got {words.dtype} and {scales.dtype}")
    scales, words = scales.contiguous(), words.contiguous()
    layer = cpu.describe(code_rows_and_columns(out_features, x.shape[-1], layout[0]), layout, scales)
    if (need := cpu.library().fairy2i_words(layer)) != words.numel():
        raise ValueError(f"a {out_features}x{x.shape[-1]} layer needs {need} words of codes, got {words.numel()}")
    layer.codes = words.data_ptr()
    bias = None if bias is None else bias.float().contiguous()
    return cpu.run([layer], x.contiguous(), [bias], [out_features])[0]


_library.impl("packed_linear", _packed_linear, "CPU")
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
