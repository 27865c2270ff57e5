"""Packed layers on a GPU: the layout of their codes, what is used for how many tokens, and whether there are kernels.

What multiplies is a *way*: "decode" (few tokens) and "wide" (many) are CUDA C++ (ops/cuda), "planes", "blocks" and
"dense" (cuBLAS, after a kernel has written the weight) are Triton, which does everything where CUDA C++ cannot be used.
Both are imported at the first use of a kernel. float32 activations have "decode", which adds integers, and "dense":
other sums are not as exact as those of PyTorch. *Words* are int16 (chunks, passes, n, G, BK): bit k of word
(c, s, i, g, b) is the sign g of row i and column (16 c + k) BK + b of the codes, 1 for plus (ops/triton/packed.py). A
pass has the signs of 1, 2 or 4 phase stages, (p, q) of U, then of W, of each; a real layer has one pass, of 1 sign
(binary) or 2 (ternary). Columns are padded to whole chunks; the bits of the padding are 0 and nothing reads them.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..packing import pack_codes, unpack_codes
from ..rotation import block_width, rotate
from .triton import on_device

MODES = {"gpu": 2}  # after those of ops.cpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of activations
WIDTHS = (32, 16)  # BK, the preferred one first
AUTO = True  # whether "auto" takes these kernels on a GPU


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The most tokens that a way is used for, by what `benchmarks/bench_inference.py` measures.

    Attributes:
        wide_from: the fewest that "wide" is used for; it is preferred to other ways from there on.
        wide: where weights have one or two stages.
        wide_of_more: where they have three or four, which take longer to make than cuBLAS takes to multiply.
    """

    decode: int = 16
    planes: int = 16
    wide_from: int = 9
    wide: int = sys.maxsize
    wide_of_more: int = 1024
    blocks: int = 128


THRESHOLDS = Thresholds()


@dataclasses.dataclass
class Layer:
    """What a call needs of a layer."""

    mode_name: str
    memory: tuple[Tensor, Tensor]  # words and scales
    scales: int  # where they lie


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the processor."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_off(device: torch.device | None = None) -> str | None:
    """Return None where the kernels can be used, on a GPU or the current one, or why they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "they need an NVIDIA GPU of compute capability 8.0 or more"
    return None


@functools.cache
def why_no_cuda(way: str = "decode", device: torch.device | None = None) -> str | None:
    """Return None where a kernel of CUDA C++, "decode" or "wide", can be used, or why it cannot.

    Args:
        device: with its index; None for the GPU that is the current one when this is first asked.
    """
    if interpreted():
        return "Triton's interpreter runs the kernels"
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    from . import cuda

    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    # warpgroups multiply on GPUs of one generation alone
    return cuda.why_off(index) if way == "decode" else cuda.why_off(index, (9, 0), (10, 0))


@functools.cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; for the processor, which tests have in place of one, something small."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def takes(device: torch.device) -> bool:
    """Return whether the kernels run on tensors of a device."""
    return device.type == ("cpu" if interpreted() else "cuda")


@functools.cache
def _can_use(device: torch.device) -> bool:
    # Triton compiles what launches a kernel
    compilers = (os.environ.get("CC", ""), "gcc", "clang")
    return why_off(device) is None and any(shutil.which(name) for name in compilers)


@torch.compiler.assume_constant_result
def auto_takes(device: torch.device) -> bool:
    """Return whether the backend "auto" is these kernels on a device."""
    return AUTO and device.type == "cuda" and _can_use(device)


# Codes


def signs_and_passes(kind: int, stages: int) -> tuple[int, int]:
    """Return G and the passes of a layer."""
    if kind == 1:
        return stages, 1
    together = stages if stages in (1, 2, 4) else 1
    return 4 * together, stages // together


@functools.cache
def words_shape(rows: int, cols: int, kind: int, stages: int) -> tuple[int, ...]:
    """Return the shape of the words of codes with so many rows and columns."""
    signs, passes = signs_and_passes(kind, stages)
    chunks = {width: -(-cols // (16 * width)) for width in WIDTHS}
    # the preferred width, unless it pads by a twentieth more than another
    width = next(w for w in WIDTHS if all(chunks[w] * w <= 1.05 * chunks[v] * v for v in WIDTHS))
    return (chunks[width], passes, rows, signs, width)


def _pack_signs(signs: Tensor, chunks: int, width: int) -> Tensor:
    """Pack booleans (rows, cols): int16 (chunks, rows, width)."""
    rows, cols = signs.shape
    padded = torch.nn.functional.pad(signs, (0, chunks * 16 * width - cols)).view(rows, chunks, 16, width)
    word = torch.zeros(rows, chunks, width, dtype=torch.int32, device=signs.device)
    for k in range(16):
        word |= padded[:, :, k].int() << k
    return word.to(torch.int16).transpose(0, 1)


def _unpack_signs(words: Tensor, cols: int) -> Tensor:
    """Unpack int16 (chunks, rows, width): bool (rows, cols)."""
    bits = torch.stack([(words >> k) & 1 for k in range(16)], dim=2)  # (chunks, rows, 16, width)
    return bits.movedim(0, 1).flatten(1)[:, :cols] != 0


def _check_not_captured(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "packed layers cannot be repacked for the GPU's kernels while a CUDA graph is captured: "
            "call the model, or fairy2i.packed.use_backend(model, 'gpu'), before"
        )


def _written(words: Tensor) -> Tensor:
    """Wait until words are written: kernels that are launched early read them while those before still run."""
    if words.is_cuda:
        torch.cuda.current_stream(words.device).synchronize()
    return words


def repack(codes: Tensor, shape: tuple[int, int], layout: tuple[int, ...]) -> Tensor:
    """Return the codes of a checkpoint, as packed there, as words.

    Args:
        codes: uint8, on any device.
        shape: rows and columns of the codes.
        layout: kind, stages or planes, and more.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    _check_not_captured(codes.device)
    kind, stages = layout[:2]
    words = torch.empty(words_shape(*shape, kind, stages), dtype=torch.int16, device=codes.device)
    chunks, _, _, signs, width = words.shape
    if kind == 1:
        found = unpack_codes(codes, shape[1], 1 if stages == 1 else 2)
        for g in range(stages):
            words[:, 0, :, g] = _pack_signs(found > g, chunks, width)
        return _written(words)
    for t in range(stages):
        for part in range(2):
            found = unpack_codes(codes[t, part], shape[1], 2)
            place, g = 4 * t // signs, 4 * t % signs + 2 * part
            p = (found & 1) != 0
            words[:, place, :, g] = _pack_signs(p, chunks, width)
            words[:, place, :, g + 1] = _pack_signs(p ^ (found > 1), chunks, width)
    return _written(words)


def unpack(words: Tensor, codes_shape: tuple[int, ...], shape: tuple[int, int], layout: tuple[int, ...]) -> Tensor:
    """Return the codes of a checkpoint from words: the inverse of :func:`repack`."""
    kind, stages = layout[:2]
    signs = words.shape[3]
    if kind == 1:
        found = sum(_unpack_signs(words[:, 0, :, g], shape[1]).to(torch.uint8) for g in range(stages))
        assert isinstance(found, Tensor)
        return pack_codes(found, 1 if stages == 1 else 2)
    codes = torch.empty(codes_shape, dtype=torch.uint8, device=words.device)
    for t in range(stages):
        for part in range(2):
            place, g = 4 * t // signs, 4 * t % signs + 2 * part
            p = _unpack_signs(words[:, place, :, g], shape[1])
            q = _unpack_signs(words[:, place, :, g + 1], shape[1])
            codes[t, part] = pack_codes(p.to(torch.uint8) + 2 * (p != q).to(torch.uint8), 2)
    return codes


def _words_like(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return what stands for words where only shape and device are asked for."""
    return torch.empty((), dtype=torch.int16, device=device).expand(shape)


def languages(layout: Sequence[int], shape: tuple[int, int], device: torch.device) -> str:
    """Return what the kernels are written in that multiply such layers, CUDA C++ where one token of bf16 has it.

    Args:
        layout: kind, stages or planes, granularity and more.
        shape: rows and columns of the codes.
        device: where they are.
    """
    words = _words_like(words_shape(*shape, *layout[:2]), device)
    return "CUDA C++ and Triton" if takes_few(1, layout, torch.bfloat16, words) else "Triton"


def describe(words: Tensor, scales: Tensor) -> Layer:
    """Return what a call needs of a layer."""
    return Layer("gpu", (words, scales), scales.data_ptr())


# Rotation: a product with a Hadamard matrix, whose entries are exact in every dtype


@functools.cache
def _hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return rotate(torch.eye(width), width).to(dtype).to(device)


def prepare_memory(features: int, rotation: int, layout: Sequence[int], device: torch.device) -> None:
    """Make what a layer's calls share and keep: before a CUDA graph is captured, whose memory is not for keeping."""
    for dtype in DTYPES if rotation else ():
        _hadamard(block_width(features, rotation), dtype, device)
    if takes_wide(layout, torch.bfloat16, features, device):
        from .cuda import wide

        wide.set_flags_aside(device)


def rotated(x: Tensor, rotation: int) -> Tensor:
    """Rotate (..., features), summing in float32 and rounding once."""
    width = block_width(x.shape[-1], rotation)
    return x if width == 1 else (x.unflatten(-1, (-1, width)) @ _hadamard(width, x.dtype, x.device)).flatten(-2)


# Multiplying


def way_for(tokens: int, layout: Sequence[int], dtype: torch.dtype, words: Tensor, features: int) -> str:
    """Return which way multiplies so many tokens: "decode", "planes", "wide", "blocks" or "dense"."""
    most = THRESHOLDS.wide if layout[1] <= 2 else THRESHOLDS.wide_of_more
    if THRESHOLDS.wide_from <= tokens <= most and takes_wide(layout, dtype, features, words.device):
        return "wide"
    if tokens <= THRESHOLDS.decode and takes_few(tokens, layout, dtype, words):
        return "decode"
    if dtype == torch.float32:
        return "dense"
    if tokens <= THRESHOLDS.planes and layout[2] != 2:
        return "planes"
    return "blocks" if tokens <= THRESHOLDS.blocks and not writes_bf16(layout, dtype) else "dense"


@functools.lru_cache(maxsize=4096)
def _usual_way(
    tokens: int,
    layout: tuple[int, ...],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    features: int,
    device: torch.device,
    thresholds: Thresholds,
) -> str:
    """Return what :func:`way_for` says of words of a shape."""
    return way_for(tokens, layout, dtype, _words_like(shape, device), features)


def written_in_cuda(layout: Sequence[int]) -> bool:
    """Return whether kernels in CUDA C++ know such layers: phase codes, scales of the tensor or of rows."""
    kind, stages, granularity = layout[:3]
    return kind == 0 and stages <= 4 and granularity != 2


def takes_few(tokens: int, layout: Sequence[int], dtype: torch.dtype, words: Tensor) -> bool:
    """Return whether "decode" multiplies such words."""
    if not written_in_cuda(layout) or why_no_cuda("decode", words.device) is not None:
        return False
    from .cuda import decode

    return decode.takes(layout, words, tokens, dtype)


def takes_wide(layout: Sequence[int], dtype: torch.dtype, features: int, device: torch.device) -> bool:
    """Return whether "wide" multiplies layers of so many input features."""
    if dtype != torch.bfloat16 or why_no_cuda("wide", device) is not None:
        return False
    from .cuda import wide

    return wide.takes(layout, dtype, features)


def writes_bf16(layout: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether "dense" has a faster kernel for such layers, whose weights are more exact than bf16."""
    return layout[0] == 0 and layout[1] <= 8 and layout[2] != 2 and dtype == torch.bfloat16


def prepare(words: Tensor, layout: Sequence[int], dtype: torch.dtype, features: int) -> None:
    """Compile what multiplies single tokens, and some for many, so that the first do not wait for it."""
    if takes_few(1, layout, dtype, words):
        from .cuda import decode

        decode.prepare(words, layout, dtype, features)
    if takes_wide(layout, dtype, features, words.device):
        from .cuda import wide

        wide.prepare(words, layout, features, (16, 256))


def linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: Sequence[int],
    places: Tensor | None = None,
    way: str | None = None,
) -> Tensor:
    """Multiply (..., in_features) activations with words: (..., out_features) in the dtype of ``x``.

    Args:
        scales: contiguous float32.
        layout: kind, stages or planes, granularity, tile, mode, rotation.
        places: int32 (halves, n), which output each row of the codes makes, where the words are of several layers.
        way: "decode", "planes", "wide", "blocks" or "dense", in place of what :func:`way_for` says.

    Raises:
        TypeError, ValueError: dtypes or sizes that do not belong together, or planes or blocks are to take float32.
        RuntimeError: input and words are on two devices.
    """
    rotation, features = layout[5], x.shape[-1]
    if x.dtype not in DTYPES:
        raise TypeError(f"packed_linear takes float32, bfloat16 or float16 activations, got {x.dtype}")
    if x.device != words.device:
        raise RuntimeError(f"the packed layer is on {words.device}, its input on {x.device}")
    if words.dtype != torch.int16 or scales.dtype != torch.float32:
        raise TypeError(f"packed_linear needs int16 words and float32 scales, got {words.dtype} and {scales.dtype}")
    _check_words(words.shape, words.stride(), out_features, features, *layout[:2])
    flat = x if x.dim() == 2 else x.reshape(-1, features)
    if rotation:
        flat = rotated(flat, rotation)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    tokens = flat.shape[0]
    y = x.new_empty(tokens, out_features)
    if tokens:
        way = way or _usual_way(tokens, tuple(layout), x.dtype, words.shape, features, words.device, THRESHOLDS)
        if way in ("planes", "blocks") and x.dtype == torch.float32:
            raise TypeError(f"{way} takes bfloat16 or float16 activations, got {x.dtype}")
        scales = scales.contiguous()
        if bias is not None:
            bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
        if way == "dense":
            from .triton import multiply

            weight = multiply.dense_weight(words, scales, x.dtype, out_features, features, layout, places)
            y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
        else:
            with on_device(flat):
                _runner(way)(flat, words, scales, bias, y, layout, places)
    return y.view(*x.shape[:-1], out_features)


@functools.lru_cache(maxsize=4096)
def _check_words(
    shape: tuple[int, ...], strides: tuple[int, ...], out_features: int, features: int, kind: int, stages: int
) -> None:
    halves = 2 if kind == 0 else 1
    need = words_shape(out_features // halves, features // halves, kind, stages)
    if tuple(shape) != need:
        raise ValueError(f"a {out_features}x{features} layer needs words of {need}, got {tuple(shape)}")
    if strides[2:] != (math.prod(need[3:]), need[4], 1):
        raise ValueError(f"packed_linear needs words whose rows are contiguous, got strides {strides}")


def _runner(way: str) -> Callable[..., None]:
    if way == "decode":
        from .cuda import decode

        return decode.multiply
    if way == "wide":
        from .cuda import wide

        return wide.wide
    from .triton import multiply

    return {"planes": multiply.planes, "blocks": multiply.blocks}[way]


def join_words(words: list[Tensor]) -> Tensor:
    """Return the words of several layers with as many columns as one layer's; not while a CUDA graph is captured."""
    _check_not_captured(words[0].device)
    return _written(torch.cat(words, dim=2))


def group_places(sizes: list[int], kind: int, device: torch.device) -> Tensor:
    """Return int32 (halves, n): where the outputs lie, one layer after the other, that rows of joined codes make."""
    halves = 2 if kind == 0 else 1
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    places = [
        torch.arange(start, start + size, dtype=torch.int32).view(halves, -1)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return torch.cat(places, dim=1).to(device)


def group_scales(scales: list[Tensor], rows: list[int], layout: tuple[int, ...]) -> Tensor:
    """Return scales for each row of joined codes, from those of tensors or rows."""
    if layout[2] == 0:
        scales = [s[..., None].expand(*s.shape, count) for s, count in zip(scales, rows, strict=True)]
    return torch.cat(scales, dim=-1).contiguous()


def words_bytes(rows: int, cols: int, kind: int, stages: int) -> int:
    """Return the bytes of the words of a layer, padding included."""
    return 2 * math.prod(words_shape(rows, cols, kind, stages))
