"""Launches of the kernels in wide.cu, for many tokens: configurations, tensor maps, and what they can multiply."""

import ctypes
import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..gpu import processors, written_in_cuda
from . import KINDS, Kernel, defined, driver, kernel, text

ROWS = 64  # of the codes in a block
STEP = 64  # columns of the codes
THREADS = 384
MEMORY = 233472  # bytes of shared memory of a processor; of each block the driver takes 1024
Layout = Sequence[int]
LAUNCHES = 8192  # that CUDA graphs keep, for which flags are set aside on each GPU
_stores: dict[torch.device, tuple[Tensor, Iterator[int]]] = {}  # (launch, block), and numbers of launches
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel for many tokens is launched.

    Attributes:
        tokens: of a block: 16, 32, 64, 128 or 256.
        split: blocks that share the columns, and add their sums at the end.
        pair: blocks of other rows that share activations, 1 or 2; ``pair * split`` is at most 8.
        even: without ``split``, whether all blocks get as many steps, and share tiles, or only whole tiles.
    """

    tokens: int = 256
    split: int = 1
    pair: int = 2
    even: bool = False


def takes(layout: Layout, dtype: torch.dtype, features: int) -> bool:
    """Return whether the kernel multiplies such layers: phase codes, scales of the tensor or of rows, bf16."""
    return written_in_cuda(layout) and dtype == torch.bfloat16 and features % 16 == 0


# Microseconds on an H100, fitted to what 130 launches took (within 10 % up to 512 tokens)
STEP_TIMES = {16: 0.39, 32: 0.46, 64: 0.6, 128: 0.76, 256: 1.27}  # of a step of so many tokens of a block
BEGIN, TILE = 1.5, 2.8  # of a launch, and of each tile that a block takes steps of
SHARED = 1.0, 9.0  # what tiles that are shared take more: at all, and for each 256 tokens of a block
SPLIT = 2.4  # what each further block of a split takes, for each 256 tokens
TOGETHER = {2: 66, 3: 39}  # clusters of so many blocks that an H100 has at once


def expected_time(rows: int, columns: int, tokens: int, config: Config, processors: int) -> float:
    """Return about how many microseconds a product takes."""
    steps = -(-columns // STEP)
    (blocks, _, _), shared = grid(rows, columns, tokens, config, processors)
    clusters, sums, step = blocks // config.pair, config.tokens / 256, STEP_TIMES[config.tokens]
    if config.split > 1:
        rounds = -(-clusters // (TOGETHER[config.split * config.pair] * processors // 132))
        return BEGIN + rounds * (-(-steps // config.split) * step + (config.split - 1) * SPLIT * sums + TILE)
    tiles = -(-rows // (ROWS * config.pair)) * -(-tokens // config.tokens)
    if not shared:
        return BEGIN + -(-tiles // clusters) * (steps * step + TILE)
    each = tiles / clusters  # of which it has a part of one, and whole ones and a part of another, or only parts
    return BEGIN + each * (steps * step + TILE) + TILE + SHARED[0] + SHARED[1] * sums


@functools.cache
def wide_config(rows: int, columns: int, tokens: int, processors: int) -> Config:
    """Return the configuration for so many rows and columns of the codes that should take the least time."""
    most = next((t for t in (16, 32, 64, 128) if tokens <= t), 256)
    pair = 2 if tokens > 256 and rows > ROWS else 1
    found = [
        Config(t, split, pair if split == 1 else 1, even)
        for t in STEP_TIMES
        if t == most or (t == 128 and 128 < tokens <= 512)
        for split, even in ((1, False), (2, False), (3, False), (1, True))
    ]
    return min(found, key=lambda config: expected_time(rows, columns, tokens, config, processors))


def slots(config: Config, signs: int, passes: int, width: int) -> tuple[int, int, int]:
    """Return how many steps of activations and chunks of words a block keeps in memory, and the bytes of it all."""
    words, slot = passes * ROWS * signs * width * 2, config.tokens * 256
    rest = 1024 + 256  # alignment and barriers
    memory = MEMORY - 1024 - rest
    chunks = 2 if memory - 2 * words >= 5 * slot else 1  # more at once would only be in the way of activations
    count = min((memory - chunks * words) // slot, 8)
    return count, chunks, count * slot + chunks * words + rest


def defines(shape: Sequence[int], layout: Layout, config: Config) -> dict[str, int]:
    """Return the constants of the kernel for words of a shape."""
    _, passes, _, signs, width = shape
    steps, chunks, _ = slots(config, signs, passes, width)
    return {
        "STAGES": layout[1],
        "PASSES": passes,
        "G": signs,
        "BK": width,
        "ROWS": int(layout[2] == 1),
        "TOKENS": config.tokens,
        "SPLIT": config.split,
        "PAIR": config.pair,
        "SLOTS": steps,
        "WORD_SLOTS": chunks,
    }


def multiplication(tokens: int) -> str:
    """Return the C++ function that multiplies A in registers with B in shared memory, for so many tokens of a block."""
    columns = 32 if tokens == 16 else tokens  # of B: both halves of the activations, or one
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void mma(float (&d)[{count}], const unsigned *a, unsigned long long b) {{\n"
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{sums}}}, '
        f'{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, 1, 1, 1, 0;"\n'
        f': {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); }}\n'
    )


def source(constants: dict[str, int]) -> str:
    """Return the whole source for some constants."""
    return defined(constants) + multiplication(constants["TOKENS"]) + text("wide.cu")


@functools.lru_cache(maxsize=4096)  # what is known of an address stays right, whatever lies there
def _tensor_map(
    address: int, kind: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> ctypes.Array[ctypes.c_uint64]:
    """Return what describes a tensor to the copy engine: rows of 128 bytes of a copy are swizzled, zeros lie outside.

    Args:
        address: of the tensor.
        kind: CU_TENSOR_MAP_DATA_TYPE_... of its numbers of 16 bits.
        sizes: the innermost first.
        strides: bytes, of all but the innermost.
        box: sizes of a copy.

    Raises:
        RuntimeError: the driver does not take it: addresses and strides are no multiples of 16 bytes.
    """
    memory = (ctypes.c_uint64 * 24)()
    start = -ctypes.addressof(memory) % 64 // 8
    found = (ctypes.c_uint64 * 16).from_buffer(memory, start * 8)
    rank = len(sizes)
    error = driver().cuTensorMapEncodeTiled(
        found, kind, rank, ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        0, 3, 2, 0,  # not interleaved, swizzle of 128 bytes, 128 bytes at once into the L2 cache, zeros outside
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for {sizes} numbers, {strides} bytes apart")
    return found


def tensor_maps(x: Tensor, words: Tensor, tokens: int) -> list[ctypes.Array[ctypes.c_uint64]]:
    """Return maps of bf16 activations, (half, token, column), and of words, (chunk, pass, row, column).

    A copy of activations has 64 columns of so many tokens, one of words 128 bytes of the rows of a block.
    """
    m, (chunks, passes, n, signs, width) = x.shape[1] // 2, words.shape
    row = signs * width * 2
    strides = (row, *(2 * words.stride(i) if words.shape[i] > 1 else row for i in (1, 0)))
    return [
        _tensor_map(x.data_ptr(), 9, (m, x.shape[0], 2), (2 * x.stride(0), 2 * m), (64, tokens, 1)),  # bfloat16
        _tensor_map(words.data_ptr(), 1, (signs * width, n, passes, chunks), strides, (64, ROWS, 1, 1)),
    ]


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def grid(n: int, m: int, tokens: int, config: Config, processors: int) -> tuple[tuple[int, int, int], int]:
    """Return the blocks for so many rows and columns of the codes, and tokens, and how many tiles they share."""
    tiles = -(-n // (ROWS * config.pair)) * -(-tokens // config.tokens)
    if config.split > 1:
        return (tiles * config.pair, config.split, 1), 0
    clusters = min(tiles * -(-m // STEP) if config.even else tiles, processors // config.pair)
    # one tile and a part of another for each: then they all begin the next tile at once, with the same columns
    shared = (tiles if tiles < 2 * clusters else tiles % clusters + clusters) if config.even and tiles % clusters else 0
    return (clusters * config.pair, 1, 1), shared


def arguments(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    places: Tensor | None,
    shared: int,
    sums: Tensor | None,
    flags: Tensor | None,
) -> list[object]:
    """Return the arguments of multiply_wide after the tensor maps.

    Args:
        shared: how many tiles blocks share.
        sums: float32, of such tiles, 128 x tokens for each block.
        flags: zeros for each block, which the kernel leaves as zeros.
    """
    return [
        _pointer(scales), _pointer(bias),
        ctypes.c_int(0 if bias is None else KINDS[bias.dtype]), _pointer(places), _pointer(y),
        ctypes.c_int(x.shape[0]), ctypes.c_int(y.shape[1]), ctypes.c_int(words.shape[2]),
        ctypes.c_int(x.shape[1] // 2), ctypes.c_int(words.shape[0]), ctypes.c_int(shared),
        _pointer(sums), _pointer(flags),
    ]  # fmt: skip


def set_flags_aside(device: torch.device) -> None:
    """Make zeros for the launches that CUDA graphs will keep, once: not in the memory of such a graph."""
    with _lock:
        if device.type == "cuda" and device not in _stores and not torch.cuda.is_current_stream_capturing():
            zeros = torch.zeros(LAUNCHES, processors(device), dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)
            _stores[device] = zeros, itertools.count()


def launch_flags(blocks: int, device: torch.device) -> Tensor:
    """Return zeros for the blocks of a launch, its own: others may run at the same time, on streams or in graphs.

    While a CUDA graph is captured they come from what was set aside when a layer was prepared, so that the graph need
    not make zeros each time.
    """
    if device in _stores and torch.cuda.is_current_stream_capturing():
        zeros, numbers = _stores[device]
        number = next(numbers)
        if number < LAUNCHES:
            return zeros[number, :blocks]
    return torch.zeros(blocks, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=4096)
def _ready(
    shape: tuple[int, ...],
    layout: tuple[int, ...],
    features: int,
    tokens: int,
    device: torch.device,
    config: Config | None,
) -> tuple[Config, Kernel, tuple[int, int, int], int, int]:
    """Return configuration, kernel, compiled at the first use, blocks, shared tiles, and bytes of a block."""
    config = config or wide_config(shape[2], features // 2, tokens, processors(device))
    loaded = kernel(source(defines(shape, layout, config)), "multiply_wide", device.index, early=True)
    memory = slots(config, shape[3], shape[1], shape[4])[2]
    return config, loaded, *grid(shape[2], features // 2, tokens, config, processors(device)), memory


def prepare(words: Tensor, layout: Layout, features: int, tokens: Sequence[int]) -> None:
    """Compile what multiplies such words with each of some numbers of tokens; layers that :func:`takes` takes."""
    for count in tokens:
        _ready(tuple(words.shape), tuple(layout), features, count, words.device, None)


def wide(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
    config: Config | None = None,
) -> None:
    """Multiply bf16 (tokens, in_features) into y; layers that :func:`takes` takes."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    tokens, features = x.shape
    ready = _ready(tuple(words.shape), tuple(layout), features, tokens, x.device, config)
    config, launch, blocks, shared, memory = ready
    sums = flags = None
    if shared:
        sums = torch.empty(blocks[0], 2 * ROWS, config.tokens, dtype=torch.float32, device=x.device)
        flags = launch_flags(blocks[0], x.device)
    given = [*tensor_maps(x, words, config.tokens), *arguments(x, words, scales, bias, y, places, shared, sums, flags)]
    launch(blocks, THREADS, given, memory)
