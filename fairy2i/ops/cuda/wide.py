"""Launches of the kernels in wide.cu, for many tokens: configurations, tensor maps, and what they can multiply."""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..gpu import written_in_cuda
from . import KINDS, Kernel, driver, kernel

SOURCE = Path(__file__).with_name("wide.cu")
ROWS = 64  # of the codes in a block
STEP = 64  # columns of the codes
THREADS = 384
MEMORY = 233472  # bytes of shared memory of a processor; of each block the driver takes 1024
Layout = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel for many tokens is launched.

    Attributes:
        tokens: of a block: 16, 32, 64, 128 or 256.
        split: blocks that share the columns, and add their sums at the end.
        pair: blocks of other rows that share activations, 1 or 2; ``pair * split`` is at most 8.
        even: without ``split``, whether all blocks get as many steps, and share tiles, or only whole tiles.
        ahead: steps of 16 columns whose weights are in registers, 2 or 4.
        blocks: of a processor, 1 or, with at most 64 tokens, 2.
    """

    tokens: int = 256
    split: int = 1
    pair: int = 2
    even: bool = False
    ahead: int = 2
    blocks: int = 1


def takes(layout: Layout, dtype: torch.dtype, features: int) -> bool:
    """Return whether the kernel multiplies such layers: phase codes, scales of the tensor or of rows, bf16."""
    return written_in_cuda(layout) and dtype == torch.bfloat16 and features % 16 == 0


# Microseconds of a step on an H100, for each number of tokens and blocks of a processor: measured with 64, 128 and 256
# tokens where weights took twice the instructions, less what they do not take any more.
STEP_TIMES = {(16, 2): 0.75, (32, 2): 0.75, (64, 1): 0.55, (64, 2): 0.8, (128, 1): 0.7, (256, 1): 1.25}
FIXED = 6.5  # microseconds of a launch, its first loads and its last results
TOGETHER = {1: 132, 2: 66, 3: 39, 4: 30}  # clusters of so many blocks that an H100 has at once


def expected_time(rows: int, columns: int, tokens: int, config: Config, processors: int) -> float:
    """Return about how many microseconds a product takes."""
    steps = -(-columns // STEP)
    (blocks, _, _), shared = grid(rows, columns, tokens, config, processors)
    clusters, sums = blocks // config.pair, config.tokens / 256  # of 128 KB
    step = STEP_TIMES[config.tokens, config.blocks]
    if config.split > 1:
        together = TOGETHER[config.split * config.pair] * processors // 132
        return FIXED + -(-clusters // together) * (-(-steps // config.split) * step + config.split * (0.6 + 0.6 * sums))
    tiles = -(-rows // (ROWS * config.pair)) * -(-tokens // config.tokens)
    if shared:
        return (
            FIXED + tiles * steps / clusters * step + 1 + 1.2 * sums * (tiles // clusters + 1 + -(-clusters // tiles))
        )
    return FIXED + -(-tiles // clusters) * (steps * step + 1.2 * sums)


@functools.cache
def wide_config(rows: int, columns: int, tokens: int, processors: int) -> Config:
    """Return the configuration for so many rows and columns of the codes that should take the least time."""
    most = next((t for t in (16, 32, 64, 128) if tokens <= t), 256)
    pair = 2 if tokens > 256 and rows > ROWS else 1
    found = [
        Config(t, split, pair if split == 1 else 1, even, blocks=b)
        for t, b in STEP_TIMES
        if t == most or (t == 128 and 128 < tokens <= 1024)
        for split, even in ((1, False), (2, False), (3, False), (1, True))
        if b == 1 or split == 1
    ]
    return min(found, key=lambda config: expected_time(rows, columns, tokens, config, processors))


def slots(config: Config, signs: int, passes: int, width: int) -> tuple[int, int]:
    """Return how many steps of activations fit into the memory of a block, and the bytes that they all take."""
    words = passes * ROWS * (signs * width * 2 + 16)
    rest = 1024 + words + 16 + 256  # alignment and barriers
    slot = config.tokens * 256
    count = min((MEMORY // config.blocks - 1024 - rest) // slot, 8)
    return count, count * slot + rest


def defines(words: Tensor, layout: Layout, config: Config) -> dict[str, int]:
    """Return the constants of the kernel."""
    _, passes, _, signs, width = words.shape
    return {
        "STAGES": layout[1],
        "PASSES": passes,
        "G": signs,
        "BK": width,
        "ROWS": int(layout[2] == 1),
        "TOKENS": config.tokens,
        "SPLIT": config.split,
        "PAIR": config.pair,
        "SLOTS": slots(config, signs, passes, width)[0],
        "AHEAD": config.ahead,
        "BLOCKS": config.blocks,
    }


def multiplication(tokens: int) -> str:
    """Return the C++ function that multiplies A in registers with B in shared memory, for so many tokens."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void mma(float (&d)[{count}], const unsigned *a, unsigned long long b) {{\n"
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16 {{{sums}}}, '
        f'{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, 1, 1, 1, 0;"\n'
        f': {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); }}\n'
    )


def source(constants: dict[str, int]) -> str:
    """Return the whole source for some constants."""
    lines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return lines + multiplication(constants["TOKENS"]) + SOURCE.read_text()


def tensor_map(x: Tensor, tokens: int) -> ctypes.Array[ctypes.c_uint64]:
    """Return what describes (tokens, 2 m) bf16 activations as (half, token, column) to the copy engine.

    A copy has 64 columns of so many tokens, rows of 128 bytes, swizzled; what lies outside is 0.

    Raises:
        RuntimeError: the driver does not take it: the rows do not begin at multiples of 16 bytes.
    """
    m = x.shape[1] // 2
    memory = (ctypes.c_uint64 * 24)()
    start = -ctypes.addressof(memory) % 64 // 8
    found = (ctypes.c_uint64 * 16).from_buffer(memory, start * 8)
    error = driver().cuTensorMapEncodeTiled(
        found, 9, 3, ctypes.c_void_p(x.data_ptr()),  # bfloat16, three dimensions
        (ctypes.c_uint64 * 3)(m, x.shape[0], 2), (ctypes.c_uint64 * 2)(2 * x.stride(0), 2 * m),
        (ctypes.c_uint32 * 3)(64, tokens, 1), (ctypes.c_uint32 * 3)(1, 1, 1),
        0, 3, 2, 0,  # not interleaved, swizzle of 128 bytes, 128 bytes at once into the L2 cache, zeros outside
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for {tuple(x.shape)}, strides {x.stride()}")
    return found


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def grid(n: int, m: int, tokens: int, config: Config, processors: int) -> tuple[tuple[int, int, int], int]:
    """Return the blocks for so many rows and columns of the codes, and tokens, and how many tiles they share."""
    tiles = -(-n // (ROWS * config.pair)) * -(-tokens // config.tokens)
    if config.split > 1:
        return (tiles * config.pair, config.split, 1), 0
    clusters = min(tiles * -(-m // STEP) if config.even else tiles, processors * config.blocks // config.pair)
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
    """Return the arguments of multiply_wide after the tensor map.

    Args:
        shared: how many tiles blocks share.
        sums: float32, of such tiles, 128 x tokens for each block.
        flags: zeros for each block.
    """
    chunks, _, n, _, _ = words.shape
    return [
        _pointer(words), _pointer(scales), _pointer(bias),
        ctypes.c_int(0 if bias is None else KINDS[bias.dtype]), _pointer(places), _pointer(y),
        ctypes.c_int(x.shape[0]), ctypes.c_int(y.shape[1]), ctypes.c_int(n),
        ctypes.c_int(x.shape[1] // 2), ctypes.c_int(chunks), ctypes.c_longlong(words.stride(0)),
        ctypes.c_longlong(words.stride(1)), ctypes.c_int(shared),
        _pointer(sums), _pointer(flags),
    ]  # fmt: skip


@functools.cache
def _loaded(constants: tuple[tuple[str, int], ...], device: int) -> Kernel:
    return kernel(source(dict(constants)), "multiply_wide", device)


def kernel_for(words: Tensor, layout: Layout, config: Config) -> Kernel:
    """Return the kernel for such words, compiled at the first use: not while a CUDA graph is captured."""
    return _loaded(tuple(defines(words, layout, config).items()), words.device.index)


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
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    config = config or wide_config(words.shape[2], x.shape[1] // 2, x.shape[0], processors)
    memory = slots(config, *(words.shape[i] for i in (3, 1, 4)))[1]
    launch = kernel_for(words, layout, config)
    blocks, shared = grid(words.shape[2], x.shape[1] // 2, x.shape[0], config, processors)
    sums = flags = None
    if shared:
        sums = torch.empty(blocks[0], 2 * ROWS, config.tokens, dtype=torch.float32, device=x.device)
        flags = torch.zeros(blocks[0], dtype=torch.int32, device=x.device)  # of this launch: streams and graphs differ
    given = [tensor_map(x, config.tokens), *arguments(x, words, scales, bias, y, places, shared, sums, flags)]
    launch(blocks, THREADS, given, memory)
