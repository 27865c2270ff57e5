"""Launches of the kernels in :mod:`fairy2i.ops.triton.phase`: shapes of blocks and grids, and the buffers between.

What a launch needs beside its tensors is worked out once for each kind of call, and so is the compiled kernel.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import phase, power

INTERPRETED = triton.knobs.runtime.interpret  # it cuts bits off where a GPU rounds to nearest even
MASTERS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
LARGE = 1 << 20  # 2x2 blocks of a weight that keeps all of a GPU busy with large chunks


class Plan(NamedTuple):
    """How a kernel is launched; the same on every device, so that results are.

    Attributes:
        rows, cols: of a chunk.
        warps: of a program.
        programs: at most, where one scale is of all entries.
        depth: chunks that are on their way from memory; 1: one is loaded when it is needed.
        registers: of a thread, at most; None: the compiler's choice.
    """

    rows: int
    cols: int
    warps: int
    programs: int = 512
    depth: int = 1
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What a launch is told."""
        options: dict[str, Any] = {"num_warps": self.warps, "enable_fp_fusion": False}
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options


def turns(width: int) -> int:
    """Return the steps of a rotation of blocks of this width, a power of two."""
    return width.bit_length() - 1


def rotates(m: int, width: int, granularity: str, tile: int, *matrices: Tensor) -> bool:
    """Return whether the kernels rotate such matrices on their way: no block is in two quarters or rectangles."""
    whole = m % width == 0 and (granularity != "tile" or tile % width == 0)
    return whole and all(matrix.stride(1) == 1 for matrix in matrices)


def _plan(n: int, m: int, granularity: str, tile: int, what: str, stages: int, turned: bool, width: int) -> Plan:
    """Return how to launch a kernel. Whole chunks, where that is possible, need no masks.

    Args:
        what: "sums" of a stage, "write" with given or found scales, "both" in one kernel, write from "codes", or sum a
            gradient, "grad".
        turned: columns are contiguous, not rows.
        width: of the blocks to rotate, 1 where none are; chunks are of whole blocks.
    """
    if width > 1:  # 256 entries a warp: see `phase.turn`
        most = 1024 if granularity == "tensor" else 256
        cols = min(power(min(tile, m) if granularity == "tile" else m), most)
        depth = 2 if what == "write" and granularity == "row" and m > cols else 1
        return Plan(min(power(n), most // cols), cols, most // 256, depth=depth)
    if granularity == "tile" or turned or what == "grad":
        most, rows, cols = 512 if what == "grad" else 2048, 1, 1
        if granularity == "tile":
            cols = min(power(min(tile, m)), 64)
            rows = min(power(min(tile, n)), most // cols)
        elif turned:
            rows = min(power(n), 16 if granularity == "row" else 64)
            cols = min(power(m), most // rows)
        else:
            cols = min(power(m), most)
            rows = 1 if granularity == "row" else min(power(n), most // cols)
        return Plan(rows, cols, min(max(rows * cols // 256, 1), 8))
    if granularity == "row":
        cols = math.gcd(m, 1024)
        cols = cols if cols >= 256 else min(power(m), 1024)
        return Plan(1, cols, max(cols // 256, 1), depth=2 if what == "write" and m > cols else 1)
    # of one scale for all entries: what a sweep on an H100 found best
    large = what == "write" and stages <= 2 and n * m >= LARGE
    most = 2048 if large else 1024
    cols = math.gcd(m, most)
    rows = math.gcd(n, most // cols)
    if cols < 32 or rows * cols < 256:
        cols = min(power(m), 1024)
        return Plan(min(power(n), 1024 // cols), cols, 4)
    warps = min(rows * cols // 256, 4)
    if what == "sums":
        return Plan(rows, cols, warps, 512, 3, 80)
    if what == "write":
        return Plan(rows, cols, warps, 2048, 2) if large else Plan(rows, cols, warps, 264, 3)
    return Plan(rows, cols, warps)


class Launch:
    """A kernel with all that it is given beside tensors.

    Triton looks at every argument of every call to find the kernel that it has compiled for such: longer than a launch.
    With ``same``, calls differ in nothing that it looks at, and only the first one goes that way.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[int, ...], constants: dict[str, Any], plan: Plan, same: bool
    ) -> None:
        self.kernel, self.grid, self.same = kernel, (programs, 1, 1), same
        self.numbers, self.constants, self.plan = numbers, constants, plan
        self._rest: tuple[Any, ...] = ()
        self._run: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch it on the current device and stream."""
        if self._run is not None:
            self._run(*tensors, *self._rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.plan.options)
        if self.same and compiled is not None:  # the interpreter has none
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            self._rest = (*self.numbers, *(self.constants[name] for name in names))
            self._run = compiled[self.grid]


def _aligned(*tensors: Tensor | None) -> bool:
    """Return whether all begin where Triton, which has other kernels for other addresses, finds none to be special."""
    address = 0
    for tensor in tensors:
        if tensor is not None:
            address |= tensor.data_ptr()
    return address % 16 == 0


def _kinds(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return what a compiled kernel depends on beside shapes: devices, dtypes, and how addresses are aligned."""
    first = next(tensor for tensor in tensors if tensor is not None)
    return (first.get_device(), _aligned(*tensors), *(None if t is None else t.dtype for t in tensors))


def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return n, m and what the kernels address 2x2 blocks by: strides, and how far A21 and A12 are from A11."""
    n, m = shape[0] // 2, shape[1] // 2
    row, col = strides
    return n, m, row, col, n * row, m * col


def _rectangles(n: int, m: int, granularity: str, tile: int, plan: Plan) -> tuple[int, int, int]:
    """Return height and width of a program's rectangle, and how many programs there are."""
    if granularity == "tile":
        return tile, tile, triton.cdiv(n, tile) * triton.cdiv(m, tile)
    return plan.rows, m, triton.cdiv(n, plan.rows)


def _programs(n: int, m: int, plan: Plan) -> int:
    """Return how many programs share the chunks where one scale is of all entries."""
    return min(triton.cdiv(n, plan.rows) * triton.cdiv(m, plan.cols), plan.programs)


def _chunk(plan: Plan, width: int) -> dict[str, int]:
    return {"BR": plan.rows, "BC": plan.cols, "OWN": min(plan.cols, 8), "TURNS": turns(width)}


def _even(plan: Plan, height: int, width: int) -> bool:
    """Return whether a rectangle is of whole chunks."""
    return height % plan.rows == 0 and width % plan.cols == 0


@functools.cache
def _sums(
    make: Any, layout: tuple[int, ...], stages: int, width: int, kinds: tuple[Any, ...]
) -> tuple[int, list[Launch]]:
    """Return how many programs sum up the stages, and their launches. ``make``: what makes plans."""
    n, m, row, col, *_ = layout
    plan = make(n, m, "tensor", 0, "sums", stages, row < col, width)
    programs = _programs(n, m, plan)
    constants = {**_chunk(plan, width), "PROGRAMS": power(programs), "EVEN": _even(plan, n, m), "DEPTH": plan.depth}
    numbers = (*layout, n * m)
    return programs, [
        Launch(
            phase.sum_stage_of_tensor,
            programs,
            numbers,
            {**constants, "STAGE": stage, "BACK": (stages - stage) % 2 == 0},
            plan,
            kinds[1],
        )
        for stage in range(stages)
    ]


@functools.cache
def _writes(
    make: Any,
    layout: tuple[int, ...],
    stages: int,
    granularity: str,
    tile: int,
    width: int,
    summed: int,
    mean: bool,
    master: torch.dtype,
    kinds: tuple[Any, ...],
) -> Launch:
    """Return the launch that writes; ``kinds`` are those of weight, scales, dense weight and codes."""
    n, m, row, col, *_ = layout
    _, same, weight, _, dense, codes = kinds
    what = "codes" if weight is None else "both" if mean and granularity != "tensor" else "write"
    plan = make(n, m, granularity, tile, what, stages, row < col, width)
    numbers = (*layout, n * m, 2 * n * m)
    constants = {
        **_chunk(plan, width),
        "STAGES": stages,
        "MEAN": mean,
        "MASTER": MASTERS[master],
        "FROM_CODES": weight is None,
        "DENSE": dense is not None,
        "CODES": codes is not None and weight is not None,
        "DEPTH": plan.depth,
    }
    if granularity == "tensor":
        constants |= {"PROGRAMS": power(summed), "EVEN": _even(plan, n, m), "BACK": True}
        return Launch(phase.write_tensor, _programs(n, m, plan), (*numbers, n * m, summed), constants, plan, same)
    height, across, programs = _rectangles(n, m, granularity, tile, plan)
    groups = n if granularity == "row" else programs
    whole = n % height == 0 and m % across == 0 and _even(plan, height, across)
    constants |= {"ROWS": granularity == "row", "EVEN": whole}
    return Launch(phase.write_groups, programs, (*numbers, height, across, groups), constants, plan, same)


@functools.cache
def _gradients(
    make: Any,
    layout: tuple[int, ...],
    grad_strides: tuple[int, ...],
    stages: int,
    granularity: str,
    tile: int,
    width: int,
    kinds: tuple[Any, ...],
) -> tuple[int, Launch]:
    """Return how many programs sum up the gradient of scales, and the launch; ``kinds``: of grad, weight, codes ..."""
    n, m, row, col, *_ = layout
    plan = make(n, m, granularity, tile, "grad", stages, row < col, width)
    if shared := granularity == "tensor":
        height, across, programs = n, m, _programs(n, m, plan)
    else:
        height, across, programs = _rectangles(n, m, granularity, tile, plan)
    groups = n if granularity == "row" else programs
    grad_layout = _layout((2 * n, 2 * m), grad_strides)
    constants = {
        **_chunk(plan, width),
        "STAGES": stages,
        "ROWS": granularity == "row",
        "SHARED": shared,
        "FROM_CODES": kinds[4] is not None,
    }
    numbers = (*grad_layout, *layout[2:], n * m, height, across, groups)
    return programs, Launch(phase.sum_scale_gradients, programs, numbers, constants, plan, kinds[1])


def _write(
    weight: Tensor | None,
    scales: Tensor,
    partials: Tensor | None,
    dense: Tensor | None,
    codes: Tensor | None,
    layout: tuple[int, ...],
    stages: int,
    granularity: str,
    tile: int,
    width: int,
    mean: bool,
    master: torch.dtype,
) -> None:
    """Launch what writes the dense weight, the block codes, or both; it reads the codes where there is no weight."""
    if INTERPRETED and dense is not None and not (dense.dtype == master == torch.float32):
        wide = torch.empty_like(dense, dtype=torch.float32)
        _write(
            weight, scales, partials, wide, codes, layout, stages, granularity, tile, width, mean, torch.float32
        )  # fmt: skip
        dense.copy_(wide.to(master))
        return
    kinds = _kinds(weight, scales, dense, codes)
    summed = 1 if partials is None else partials.shape[-1]
    launch = _writes(_plan, layout, stages, granularity, tile, width, summed, mean, master, kinds)
    if granularity == "tensor":
        launch(weight, scales, partials, dense, codes)
    else:
        launch(weight, scales, dense, codes)


def sum_stages(weight: Tensor, scales: Tensor, width: int = 1) -> Tensor:
    """Launch the sums of all stages where one scale is of all entries; they leave the scales of the last stage open."""
    layout, stages = _layout(weight.shape, weight.stride()), scales.shape[0]
    programs, launches = _sums(_plan, layout, stages, width, _kinds(weight, scales))
    partials = torch.empty((stages, 6, programs), dtype=torch.float64, device=weight.device)
    for launch in launches:
        launch(weight, scales, partials)
    return partials


def quantize(
    weight: Tensor,
    scales: Tensor,
    dense: Tensor | None,
    codes: Tensor | None,
    *,
    stages: int,
    granularity: str,
    tile: int,
    width: int,
    mean: bool,
) -> None:
    """Write the dense quantized weight, the block codes, or both; with ``mean`` the scales too.

    Args:
        weight: (2n, 2m), any strides.
        scales: (T, 2, 2, *group), contiguous; read, of any floating dtype, or with ``mean`` written, float32.
        dense: (2n, 2m), contiguous, any floating dtype, or None.
        width: of the blocks to rotate, see :func:`rotates`; 1 where none are. Codes and scales are of the rotated
            weight, the dense weight is turned back.
        codes: uint8 (ceil(T/2), n, m), contiguous, or None.
    """
    layout = _layout(weight.shape, weight.stride())
    partials = sum_stages(weight, scales, width) if mean and granularity == "tensor" else None
    _write(weight, scales, partials, dense, codes, layout, stages, granularity, tile, width, mean, weight.dtype)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    dense: Tensor,
    *,
    stages: int,
    granularity: str,
    tile: int,
    width: int,
    master: torch.dtype,
) -> None:
    """Write the dense weight of block codes, rounded to ``master`` and then to its own dtype."""
    layout = (codes.shape[-2], codes.shape[-1], 0, 0, 0, 0)
    _write(None, scales, None, dense, codes, layout, stages, granularity, tile, width, False, master)


def scale_gradient(
    grad: Tensor,
    weight: Tensor,
    codes: Tensor | None,
    scales: Tensor,
    *,
    stages: int,
    granularity: str,
    tile: int,
    width: int,
) -> Tensor:
    """Return the gradient of the scales, float32 and of their shape; from block codes where they are given."""
    layout = _layout(weight.shape, weight.stride())
    kinds = _kinds(grad, weight, codes, scales)
    programs, launch = _gradients(_plan, layout, grad.stride(), stages, granularity, tile, width, kinds)
    if granularity == "tensor":
        sums = torch.empty((4 * stages, programs), dtype=torch.float64, device=grad.device)
        launch(grad, weight, codes, scales, sums)
        return sums.sum(1).float().view(scales.shape)
    sums = torch.empty(scales.shape, dtype=torch.float32, device=grad.device)
    launch(grad, weight, codes, scales, sums)
    return sums
