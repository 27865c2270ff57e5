"""The CPU kernels: the compiled library of ``csrc``, by ctypes, for tensors on the CPU.

Nothing is loaded before the first use. A package that was installed without a compiler has no library, and a file that
is not ours, or broken, is told from ours before it is trusted: :func:`why_off` says what is wrong, :func:`library`
raises it. FAIRY2I_CPU_LIBRARY names another file, or is "off".

The library wants OpenMP's ``GOMP_parallel`` from the runtime that PyTorch has loaded, so that kernels and PyTorch share
one team of threads; as many threads are used as ``torch.get_num_threads()`` says at the call. Where the team has to
wait for a core that another program has, and without such a runtime, it uses threads of its own (csrc/dispatch.cpp).
"""

import ctypes
import functools
import glob
import logging
import os
import re
import struct
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..rotation import block_width

logger = logging.getLogger(__name__)

ABI = 4  # as csrc/dispatch.cpp has it
FILE_NAME = "libfairy2i_cpu.so"
MODES = {"cpu_exact": 0, "cpu_int8": 1}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of activations


class KernelsUnavailable(RuntimeError):
    """There is no usable library of CPU kernels; the message says why and what to do."""


class Layer(ctypes.Structure):
    """``struct Layer`` of csrc/kernels.h, and in Python what keeps its memory alive."""

    mode_name: str
    memory: tuple[Tensor, Tensor]  # words and scales

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("granularity", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("tile", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rotation", ctypes.c_int64),
    )


def library_path() -> str:
    """Return where the library is, or would be if it were built."""
    from .. import __path__ as package

    if named := os.environ.get("FAIRY2I_CPU_LIBRARY"):
        return named
    paths = [os.path.join(folder, "ops", FILE_NAME) for folder in package]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def _openmp_parallel() -> Any:
    """Return GOMP_parallel of the OpenMP runtime in this process, or None."""
    folders = [os.path.join(os.path.dirname(torch.__file__), "lib")]
    folders.append(os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "torch.libs"))
    names = [name for folder in folders for name in sorted(glob.glob(os.path.join(folder, "lib*omp*")))]
    if sys.platform == "linux":  # what is loaded counts, wherever it came from
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            loaded = re.findall(r"(/\S*lib[gi]?omp\S*\.so\S*)", maps.read())
        names = [name for name in loaded if os.path.exists(name)] or names
    for name in names:
        try:
            return ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None


def _is_cut_off(path: str) -> bool:
    """Return whether an ELF file ends before what it says that it holds: loading it would end the process."""
    with open(path, "rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\x02":
            return len(head) < 64
        (start,), (size, count) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
        file.seek(start)
        table = file.read(size * count)
        if len(table) < size * count:
            return True
        ends = [sum(struct.unpack_from("<Q24xQ", table, entry * size + 8)[:2]) for entry in range(count)]
    return os.path.getsize(path) < max(ends, default=0)


def _load() -> ctypes.CDLL:
    path = library_path()
    if path == "off":
        raise KernelsUnavailable("FAIRY2I_CPU_LIBRARY is off")
    if not os.path.exists(path):
        raise KernelsUnavailable(
            f"there is no {path}: the package was installed without a C++ compiler. Install one (g++ or clang) and "
            "reinstall fairy2i"
        )
    if _is_cut_off(path):
        raise KernelsUnavailable(f"{path} cannot be loaded (the file is cut off); reinstall fairy2i")
    try:
        found = ctypes.CDLL(path)
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded ({error}); reinstall fairy2i") from None
    try:
        abi = found.fairy2i_abi()
    except AttributeError:
        raise KernelsUnavailable(f"{path} is not fairy2i's library; reinstall fairy2i") from None
    if abi != ABI:
        raise KernelsUnavailable(f"{path} is of another version (ABI {abi}, not {ABI}); reinstall fairy2i")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    layer = ctypes.POINTER(Layer)
    found.fairy2i_instruction_set.argtypes = (number, ctypes.POINTER(number))
    found.fairy2i_instruction_set.restype = ctypes.c_char_p
    found.fairy2i_chosen.restype = ctypes.c_char_p
    found.fairy2i_choose.argtypes = (ctypes.c_char_p,)
    found.fairy2i_words.argtypes, found.fairy2i_words.restype = (layer,), size
    found.fairy2i_pack.argtypes = found.fairy2i_unpack.argtypes = (layer, pointer, pointer)
    pointers = ctypes.POINTER(pointer)
    found.fairy2i_linear.argtypes = (number, pointers, pointer, pointers, pointers, size, number, number)
    inputs = (pointers, pointers, pointer, pointer, ctypes.c_float)
    found.fairy2i_decoder_in.argtypes = (*inputs, pointer, pointer, number, size, pointers, size, number)
    found.fairy2i_decoder_out.argtypes = (*inputs, pointer, size, number)
    if (parallel := _openmp_parallel()) is not None:
        found.fairy2i_set_parallel(ctypes.cast(parallel, pointer))
    return found


@functools.cache
def _loaded() -> "ctypes.CDLL | KernelsUnavailable":
    try:
        return _load()
    except KernelsUnavailable as error:
        return error


def library() -> ctypes.CDLL:
    """Return the library.

    Raises:
        KernelsUnavailable: there is none that can be used.
    """
    found = _loaded()
    if isinstance(found, KernelsUnavailable):
        raise found
    return found


def why_off() -> str | None:
    """Return None where the kernels can be used, or why they cannot."""
    found = _loaded()
    return str(found) if isinstance(found, KernelsUnavailable) else None


def instruction_sets() -> dict[str, bool]:
    """Return the instruction sets that are built, best first, and whether each runs on this processor."""
    found: dict[str, bool] = {}
    runs = ctypes.c_int32()
    while name := library().fairy2i_instruction_set(len(found), ctypes.byref(runs)):
        found[name.decode()] = bool(runs.value)
    return found


def instruction_set() -> str:
    """Return the name of the instruction set in use."""
    return library().fairy2i_chosen().decode()


def use_instruction_set(name: str) -> str:
    """Use another instruction set from now on, in the whole process; return the one before.

    Raises:
        ValueError: it is not built or does not run here.
    """
    before = instruction_set()
    if library().fairy2i_choose(name.encode()):
        raise ValueError(f"the instruction set {name!r} is not one of {instruction_sets()}")
    return before


def describe(shape: tuple[int, int], layout: "tuple[int, ...] | list[int]", scales: Tensor | None = None) -> Layer:
    """Return the description of a layer, codes not set.

    Args:
        shape: rows and columns of the codes (complex ones for phase codes).
        layout: kind (0 phase, 1 real), stages or planes, granularity (0 tensor, 1 row, 2 tile), tile, mode, rotation.
        scales: contiguous float32; must live as long as the description is used.
    """
    kind, stages, granularity, tile, mode, rotation = layout
    pointer = None if scales is None else scales.data_ptr()
    width = block_width(shape[1] * (2 if kind == 0 else 1), rotation)
    return Layer(kind, stages, *shape, granularity, mode, tile, None, pointer, width)


def repack(codes: Tensor, shape: tuple[int, int], layout: tuple[int, ...]) -> Tensor:
    """Return the codes of a checkpoint, as packed there, in the layout of the kernels: int32, one dimension."""
    layer = describe(shape, layout)
    codes = codes.contiguous()
    words = torch.empty(library().fairy2i_words(layer), dtype=torch.int32)
    if library().fairy2i_pack(layer, codes.data_ptr(), words.data_ptr()):
        raise MemoryError("no memory to repack codes")
    return words


def unpack(words: Tensor, codes_shape: tuple[int, ...], shape: tuple[int, int], layout: tuple[int, ...]) -> Tensor:
    """Return the codes of a checkpoint from those of the kernels: the inverse of :func:`repack`."""
    codes = torch.empty(codes_shape, dtype=torch.uint8)
    if library().fairy2i_unpack(describe(shape, layout), words.data_ptr(), codes.data_ptr()):
        raise MemoryError("no memory to unpack codes")
    return codes


def run(layers: list[Layer], x: Tensor, biases: list[Tensor | None], out_features: list[int]) -> list[Tensor]:
    """Multiply contiguous activations (..., in_features) with layers whose codes are set: a tensor for each.

    Args:
        layers: at most 8, all of as many columns as ``x``, and of one rotation.
        biases: contiguous float32.
    """
    if layers[0].rotation > 1 and x.dtype != torch.float32:  # the library rotates float32
        return [y.to(x.dtype) for y in run(layers, x.float(), biases, out_features)]
    count = len(layers)
    pointers = ctypes.c_void_p * count
    leading, dtype = x.shape[:-1], x.dtype
    outputs = [torch.empty(*leading, size, dtype=dtype) for size in out_features]
    failed = library().fairy2i_linear(
        count,
        pointers(*map(ctypes.addressof, layers)),
        x.data_ptr(),
        pointers(*[y.data_ptr() for y in outputs]),
        pointers(*[None if bias is None else bias.data_ptr() for bias in biases]),
        leading.numel(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the kernel's scratch space")
    return outputs


def pointers(parts: "Sequence[Layer | Tensor | None]") -> "ctypes.Array[ctypes.c_void_p]":
    """Return the addresses of descriptions of layers, or of tensors: what they point at must live as long."""
    found = [
        part.data_ptr() if isinstance(part, Tensor) else None if part is None else ctypes.addressof(part)
        for part in parts
    ]
    return (ctypes.c_void_p * len(found))(*found)


def decoder_in(
    inner: "tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]]",
    hidden: Tensor,
    norm: Tensor,
    eps: float,
    cosine: Tensor,
    sine: Tensor,
    head: int,
    heads: list[Tensor],
) -> None:
    """Write queries, keys and values of a token of a decoder layer, rotary positions included.

    Args:
        inner: :func:`pointers` of the layers q, k, v and of their biases.
        hidden: float32 (tokens, 1, features), contiguous as all tensors here; not changed.
        norm, eps: weight and epsilon of the RMS norm before them, float32.
        cosine, sine: float32 (tokens or 1, 1, head).
        head: numbers in a head.
        heads: float32 (tokens, heads, 1, head) for each of the three, written here.
    """
    failed = library().fairy2i_decoder_in(
        *inner,
        hidden.data_ptr(),
        norm.data_ptr(),
        eps,
        cosine.data_ptr(),
        sine.data_ptr(),
        cosine.shape[0] == 1,
        head,
        (ctypes.c_void_p * 3)(*[part.data_ptr() for part in heads]),
        hidden.shape[0],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the kernel's scratch space")


def decoder_out(
    outer: "tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]]",
    attended: Tensor,
    norm: Tensor,
    eps: float,
    hidden: Tensor,
) -> None:
    """Do what follows the attention in a decoder layer: output layer, norm, gated unit and both sums, into ``hidden``.

    Args:
        outer: :func:`pointers` of the layers o, gate, up, down and of their biases.
        attended: float32 (tokens, heads, 1, head), contiguous.
        norm, eps: of the RMS norm before the gated unit, float32.
        hidden: float32 (tokens, 1, features), contiguous: the layer's input, and then its output.
    """
    failed = library().fairy2i_decoder_out(
        *outer, attended.data_ptr(), norm.data_ptr(), eps, hidden.data_ptr(), hidden.shape[0], torch.get_num_threads()
    )
    if failed:
        raise MemoryError("no memory for the kernel's scratch space")
