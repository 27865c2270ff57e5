"""Launches of the kernels for few tokens: configurations, what they can multiply, and their arguments.

decode.cu adds integers, up to 2 tokens; several.cu halves (fp16 numbers), 3 to 16 tokens. prelude.cu comes before both.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..gpu import processors, written_in_cuda
from . import KINDS, Kernel, defined, kernel, text

SUMS = 16 << 10  # bytes of parts of sums that wait for each other; halves have up to four times as much
MOST = 16  # tokens
Layout = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a GPU has: multiprocessors, bytes of shared memory of a block, and whether it is a Hopper or younger."""

    processors: int
    memory: int
    hopper: bool  # clusters, copies of its own, launches before the end of what precedes them


H100 = Chip(132, 227 << 10, True)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is launched.

    Attributes:
        warps: of a block.
        depth: units that a warp fetches ahead.
        blocks: of a multiprocessor.
        parts: warps that share a row, or 0 for what balances best.
        ranges: blocks of a cluster, which share the columns of their rows.
        halves: whether activations become halves, for 4 tokens a product, not digits of integers.
        early: whether it begins before the kernel before it has ended, where a GPU can do that.
    """

    warps: int = 8
    depth: int = 4
    blocks: int = 1
    parts: int = 0
    ranges: int = 1
    halves: bool = False
    early: bool = True


# (rows of codes, chunks, stages, tokens that the kernel is compiled for), for bf16: what was measured to be 5 % faster
# than the default; `bench_inference.py --tune` prints such lines
TUNED: dict[tuple[int, int, int, int], Config] = {
    (2048, 4, 2, 4): Config(ranges=1, halves=True),  # 4096x4096
    (2048, 4, 1, 4): Config(ranges=1, halves=True),
}


class Arguments(ctypes.Structure):
    """The struct of the same name in prelude.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "words", "scales", "bias", "places", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "chunk_stride", "pass_stride")),
        *((name, ctypes.c_int) for name in ("tokens", "n", "m", "chunks", "tiles", "more")),
        *((name, ctypes.c_int) for name in ("bias_kind", "scale_width", "scale_step", "log_parts", "batch")),
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
    tiles = -(-n // 8)
    ranges = min(config.ranges, chunks) if chip.hopper else 1
    blocks = config.blocks if config.warps <= 8 else 1
    config = dataclasses.replace(config, blocks=blocks, ranges=ranges, early=config.early and chip.hopper)
    tokens = max(compiled_tokens(tokens), 4 if config.halves else 1)
    if dtype == torch.float32 if config.halves else tokens > 2:
        return None
    products = tokens // 4 if config.halves else tokens * (2 if dtype == torch.float32 else 1)
    # a cluster does not go over what multiprocessors have in common: not all of them are of use to large ones
    clusters = min(max(chip.processors * blocks * (16 if ranges <= 2 else 15) // 16 // ranges, 1), tiles)
    most, least, chunks = -(-tiles // clusters), chunks // ranges, -(-chunks // ranges)  # of a block

    def cost(parts: int) -> float:  # units of a warp, the end of a tile as a third of one
        if not config.halves:
            return -(-most // (config.warps // parts)) * (-(-chunks // parts) + 0.3)
        alone = [
            len(range(warp // parts, most, config.warps // parts)) * (len(range(warp % parts, chunks, parts)) + 0.1)
            for warp in range(config.warps)
        ]  # the warps of a tensor core wait for it together, and a little for themselves
        return max(sum(alone[core::4]) for core in range(4)) + 0.1 * max(alone)

    choices = [parts for parts in (1, 2, 4, 8, 16) if parts <= min(config.warps, least)]
    parts = config.parts if config.parts in choices else min(reversed(choices), key=cost)
    groups = config.warps // parts
    units = -(-most // groups) * -(-chunks // parts)  # of a warp
    unit = 2 * stages * 4 * 8 * width + (0 if config.halves else 8)  # with a barrier
    of_chunk = width * products * 256 if config.halves else width // 4 * products * 512
    others = tokens * 4 + chunks * products * 64 if config.halves else 20 * config.warps
    of_tile = (parts * tokens + 1) * 16 * (8 if dtype == torch.float32 else 4)  # of its sums
    jobs = -(-chunks * (width // 16) * tokens // config.warps)
    if jobs * dtype.itemsize * 4 * config.warps * (blocks if config.halves else 1) > 1024:
        return None  # registers

    def fitted(sums: int) -> Plan:
        batch = sums // of_tile
        batch = most if batch >= most else max(batch // groups, 1) * groups
        fixed = chunks * of_chunk + batch * of_tile + others
        room = chip.memory // blocks - 1024 * (blocks > 1) - fixed
        depth = min(config.depth, units, room // (config.warps * unit))
        memory = fixed + depth * config.warps * unit
        return Plan(dataclasses.replace(config, depth=depth), tokens, clusters * ranges, parts, jobs, batch, memory)

    found = [fitted(sums) for sums in ((4 * SUMS, 2 * SUMS, SUMS) if config.halves else (SUMS,))]
    if found[-1].config.depth < min(2, units):
        return None
    return next((one for one in found if one.config.depth == found[-1].config.depth), found[-1])


def configured(shape: Sequence[int], stages: int, tokens: int, dtype: torch.dtype) -> Config:
    """Return the measured configuration for such words, or what was best for words like them."""
    tokens = compiled_tokens(tokens)
    # two places leave room for a block of the next kernel, which begins early
    found = Config(depth=2, ranges=2, halves=True) if tokens > 2 and dtype != torch.float32 else Config(depth=2)
    return found if dtype == torch.float32 else TUNED.get((shape[2], shape[0], stages, tokens), found)


SPARE = (  # where the memory of a block is too small for others
    Config(depth=3),
    *(Config(depth=4, ranges=ranges, halves=True) for ranges in (2, 4, 1, 8)),
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
        return Chip(processors(device), H100.memory, True)
    capability = torch.cuda.get_device_capability(device)
    memory = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}.get(capability, 99) << 10
    return Chip(processors(device), memory, capability >= (9, 0))


def takes(layout: Layout, words: Tensor, tokens: int, dtype: torch.dtype, config: Config | None = None) -> bool:
    """Return whether the kernel multiplies such words: phase codes, scales of the tensor or of rows, few tokens."""
    most = 2 if dtype == torch.float32 else MOST
    if not written_in_cuda(layout) or not 0 < tokens <= most:
        return False
    return _planned(tuple(words.shape), layout[1], tokens, dtype, chip(words.device), config) is not None


def source(shape: Sequence[int], stages: int, dtype: torch.dtype, aligned: bool, hopper: bool, found: Plan) -> str:
    """Return the source with what it is compiled for."""
    config = found.config
    constants = {
        "STAGES": stages,
        "G": shape[3],
        "BK": shape[4],
        "TOKENS": found.tokens,
        "KIND": KINDS[dtype],
        "ALIGNED": int(aligned),
        "HOPPER": int(hopper),
        "EARLY": int(config.early),
        "WARPS": config.warps,
        "DEPTH": config.depth,
        "BLOCKS": config.blocks,
        "RANGES": config.ranges,
        "JOBS": found.jobs,
    }
    return defined(constants) + text("prelude.cu", "several.cu" if config.halves else "decode.cu")


def reads_eight(x: Tensor) -> bool:
    """Return whether 8 activations can be read at once."""
    return x.data_ptr() % 16 == 0 and x.shape[1] % 16 == 0 and (x.shape[0] == 1 or x.stride(0) % 8 == 0)


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
        x.shape[0], n, x.shape[1] // 2, chunks, *divmod(-(-n // 8), found.grid // found.config.ranges),
        0 if bias is None else KINDS[bias.dtype], n if rows else 1, int(rows),
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
    code = source(shape, stages, dtype, aligned, chip(device).hopper, found)
    return kernel(code, "multiply_few", device.index, early=found.config.early), found


def prepare(words: Tensor, layout: Layout, dtype: torch.dtype, features: int) -> None:
    """Compile the kernel that multiplies such words with one token, and load it."""
    _ready(tuple(words.shape), layout[1], 1, dtype, features % 16 == 0, words.device, None)


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
    made, found = _ready(tuple(words.shape), layout[1], tokens, x.dtype, reads_eight(x), x.device, config)
    given = arguments(x, words, scales, bias, y, layout, places, found)
    made((found.grid, 1, 1), 32 * found.config.warps, (given,), found.memory)
