"""Launches of the kernel in decode.cu, for few tokens: configurations, what it can multiply, and its arguments."""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..gpu import written_in_cuda
from . import KINDS, Kernel, kernel

SOURCE = Path(__file__).with_name("decode.cu")
SUMS = 16 << 10  # bytes of parts of sums that wait for each other, for each token or 4 of halves at most
MOST = 16  # tokens
Layout = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a GPU has: multiprocessors, bytes of shared memory that a block may have, and whether it has clusters."""

    processors: int
    memory: int
    clusters: bool


H100 = Chip(132, 227 << 10, True)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is launched.

    Attributes:
        warps: of a block.
        words: int32 of a lane, sign and unit: 2, or 4 for chunks that are wide enough.
        depth: units that a warp fetches ahead.
        blocks: of a multiprocessor.
        parts: warps that share a row, or 0 for what balances best.
        ranges: blocks of a cluster, which share the columns of their rows.
        halves: whether activations are halves, for 4 tokens a product, not digits.
    """

    warps: int = 16
    words: int = 2
    depth: int = 4
    blocks: int = 1
    parts: int = 0
    ranges: int = 1
    halves: bool = False


# (rows of codes, chunks, stages, tokens that the kernel is compiled for), for bf16: from `bench_inference.py --tune`
TUNED: dict[tuple[int, int, int, int], Config] = {}


class Arguments(ctypes.Structure):
    """The struct of the same name in decode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "words", "scales", "bias", "places", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "chunk_stride", "pass_stride")),
        *((name, ctypes.c_int) for name in ("tokens", "n", "m", "chunks", "bias_kind", "scale_width", "scale_step")),
        *((name, ctypes.c_int) for name in ("log_parts", "batch")),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration, with what follows from it for a layer."""

    config: Config
    tokens: int  # that the kernel is compiled for
    grid: int
    parts: int
    jobs: int  # of a warp: 16 activations of a lane each
    batch: int  # tiles between two barriers
    memory: int  # bytes


def compiled_tokens(tokens: int) -> int:
    """Return for how many tokens a kernel is compiled that takes so many; those of halves for 4 at least."""
    return 1 if tokens == 1 else 2 if tokens == 2 else -(-tokens // 4) * 4


def plan(shape: Sequence[int], stages: int, tokens: int, dtype: torch.dtype, chip: Chip, config: Config) -> Plan | None:
    """Return how words of a shape are multiplied with so many tokens, or None where a configuration does not fit."""
    chunks, _, n, _, width = shape
    words = min(config.words, width // 8)
    slices, tiles = chunks * width // (8 * words), -(-n // 8)
    ranges = min(config.ranges, slices) if chip.clusters else 1
    blocks = config.blocks if config.warps <= 8 else 1
    config = dataclasses.replace(config, words=words, blocks=blocks, ranges=ranges)
    tokens = max(compiled_tokens(tokens), 4 if config.halves else 1)
    if dtype == torch.float32 if config.halves else tokens > 4:
        return None
    products = tokens // 4 if config.halves else tokens * (2 if dtype == torch.float32 else 1)
    # a cluster does not go over what multiprocessors have in common: not all of them are of use to large ones
    clusters = min(max(chip.processors * blocks * (16 if ranges <= 2 else 15) // 16 // ranges, 1), tiles)
    most, slices = -(-tiles // clusters), -(-slices // ranges)  # of a block

    def cost(parts: int) -> float:  # units of a warp, the end of a tile as a third of one
        if not config.halves:
            return -(-most * parts // config.warps) * (-(-slices // parts) + 0.3)
        alone = [
            len(range(warp // parts, most, config.warps // parts)) * (len(range(warp % parts, slices, parts)) + 0.1)
            for warp in range(config.warps)
        ]  # the warps of a tensor core wait for it together, and a little for themselves
        return max(sum(alone[core::4]) for core in range(4)) + 0.1 * max(alone)

    least = chunks * width // (8 * words) // ranges  # slices of a block
    choices = [parts for parts in (1, 2, 4, 8, 16) if parts <= min(config.warps, least)]
    parts = config.parts if config.parts in choices else min(reversed(choices), key=cost)
    groups = config.warps // parts
    unit = 4 * stages * 128 * words
    fragments = slices * (4 if config.halves else 2) * words * products * 512
    jobs = -(-slices * (words // 2) * tokens // config.warps)
    if jobs * dtype.itemsize * 4 * config.warps * (blocks if config.halves else 1) > 1024:
        return None  # registers

    def fitted(sums: int) -> Plan:
        batch = sums // ((parts * tokens + 1) * 64)
        batch = most if batch >= most else max(batch // groups, 1) * groups
        fixed = fragments + batch * (parts * tokens + 1) * 64 + tokens * 4 + slices * 2 * products * 32
        room = chip.memory // blocks - 1024 * (blocks > 1) - fixed
        depth = min(config.depth, room // (config.warps * unit))
        memory = fixed + depth * config.warps * unit
        return Plan(dataclasses.replace(config, depth=depth), tokens, clusters * ranges, parts, jobs, batch, memory)

    found = [fitted(sums) for sums in ((4 * SUMS, 2 * SUMS, SUMS) if config.halves else (SUMS,))]
    if found[-1].config.depth < 2:
        return None
    return next((one for one in found if one.config.depth >= min(config.depth, 4)), found[-1])


def configured(shape: Sequence[int], stages: int, tokens: int, dtype: torch.dtype) -> Config:
    """Return the measured configuration for such words, or a guess: more warps where their registers suffice."""
    tokens = compiled_tokens(tokens)
    few = Config(warps=16 if stages * tokens * (2 if dtype == torch.float32 else 1) <= 4 else 8)
    if dtype == torch.float32:
        return few
    several = Config(warps=16 if stages * tokens <= 8 else 8, depth=6, ranges=1 if tokens == 4 else 2, halves=True)
    return TUNED.get((shape[2], shape[0], stages, tokens), few if tokens <= 2 else several)


SPARE = (  # where the memory of a block is too small for others
    Config(warps=8, depth=3),
    *(Config(warps=8, depth=6, ranges=ranges, halves=True) for ranges in (2, 4, 1, 8)),
)


@functools.cache
def _planned(
    shape: tuple[int, ...], stages: int, tokens: int, dtype: torch.dtype, chip: Chip, config: Config | None
) -> Plan | None:
    for one in [config] if config else [configured(shape, stages, tokens, dtype), *SPARE]:
        if found := plan(shape, stages, tokens, dtype, chip, one):
            return found
    return None


@functools.cache
def chip(device: torch.device) -> Chip:
    """Return what a GPU has; for the processor, which tests have in place of one, something small."""
    if device.type != "cuda":
        return Chip(4, H100.memory, True)
    capability = torch.cuda.get_device_capability(device)
    memory = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}.get(capability, 99) << 10
    return Chip(torch.cuda.get_device_properties(device).multi_processor_count, memory, capability >= (9, 0))


def takes(layout: Layout, words: Tensor, tokens: int, dtype: torch.dtype, config: Config | None = None) -> bool:
    """Return whether the kernel multiplies such words: phase codes, scales of the tensor or of rows, few tokens."""
    most = 2 if dtype == torch.float32 else MOST
    if not written_in_cuda(layout) or not 0 < tokens <= most:
        return False
    return _planned(tuple(words.shape), layout[1], tokens, dtype, chip(words.device), config) is not None


def source(shape: Sequence[int], stages: int, dtype: torch.dtype, aligned: bool, found: Plan) -> str:
    """Return the source with what it is compiled for."""
    config = found.config
    constants = {
        "STAGES": stages,
        "G": shape[3],
        "BK": shape[4],
        "HALVES": int(config.halves),
        "TOKENS": found.tokens,
        "KIND": KINDS[dtype],
        "ALIGNED": int(aligned),
        "J": config.words,
        "WARPS": config.warps,
        "DEPTH": config.depth,
        "BLOCKS": config.blocks,
        "RANGES": config.ranges,
        "JOBS": found.jobs,
    }
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + _text()


@functools.cache
def _text() -> str:
    return SOURCE.read_text(encoding="utf-8")


def reads_four(x: Tensor) -> bool:
    """Return whether 4 activations can be read at once."""
    bytes_of_four = 4 * x.element_size()
    return x.data_ptr() % bytes_of_four == 0 and x.shape[1] % 8 == 0 and (x.shape[0] == 1 or x.stride(0) % 4 == 0)


def arguments(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
    found: Plan,
) -> Arguments:
    """Return what the kernel is given. The bias has a dtype of activations."""
    chunks, _, n, _, _ = words.shape
    rows = layout[2] == 1
    return Arguments(
        x.data_ptr(), words.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr(),
        None if places is None else places.data_ptr(), y.data_ptr(),
        x.stride(0), y.stride(0), words.stride(0), words.stride(1),
        x.shape[0], n, x.shape[1] // 2, chunks, 0 if bias is None else KINDS[bias.dtype], n if rows else 1, int(rows),
        found.parts.bit_length() - 1, found.batch,
    )  # fmt: skip


@functools.cache
def _ready(
    shape: tuple[int, ...],
    stages: int,
    tokens: int,
    dtype: torch.dtype,
    aligned: bool,
    device: torch.device,
    config: Config | None,
) -> tuple[Kernel, Plan]:
    found = _planned(shape, stages, tokens, dtype, chip(device), config)
    if found is None:
        raise ValueError(f"words of {shape} and {tokens} tokens of {dtype} are too much for the memory of a block")
    return kernel(source(shape, stages, dtype, aligned, found), "multiply_few", device.index), found


def prepare(words: Tensor, layout: Layout, dtype: torch.dtype, features: int) -> None:
    """Compile the kernel that multiplies such words with one token, and load it."""
    _ready(tuple(words.shape), layout[1], 1, dtype, features % 8 == 0, words.device, None)


def multiply(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: Layout,
    places: Tensor | None,
    config: Config | None = None,
) -> None:
    """Multiply (tokens, in_features), rows contiguous, into y; scales of the tensor or of rows."""
    tokens = compiled_tokens(x.shape[0])
    made, found = _ready(tuple(words.shape), layout[1], tokens, x.dtype, reads_four(x), x.device, config)
    given = arguments(x, words, scales, bias, y, layout, places, found)
    made((found.grid, 1, 1), 32 * found.config.warps, (given,), found.memory)
