"""What quantized training costs beside nn.Linear: time and peak memory of forward and backward, in one run.

    python benchmarks/bench_qat.py --out qat.json             # layers and a block of LLaMA-2-7B, two minutes on a GPU
    python benchmarks/bench_qat.py --tokens 2048 8192 32768   # as many tokens in a step
    python benchmarks/bench_qat.py --parts kernels sweep      # the kernels alone, against a copy; other block sizes
    python benchmarks/bench_qat.py --check                    # no times: kernels against PyTorch, small shapes
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/bench_qat.py --check --small
    python benchmarks/bench_qat.py --device cpu               # anywhere: small shapes, PyTorch alone

Every variant computes the gradients of its input and of its weight, from None. Variants take turns, a call each, so a
change of clock or of temperature meets all of them; a time is the median over the turns, with the 10th and the 90th
percentile, by CUDA events. Peak memory is that of a call of one variant alone on the device, weights and gradients
counted.

    linear            nn.Linear
    v1 .. v4          QATLinear with the kernels, as the paper's methods
    learned-row       two stages, learned scales; rotated: the same with the weight rotated, fairy2i_w2
    v2 codes, dense   the same, with the quantized weight kept from before (fairy2i.reuse), as within a step
    v2 torch          QATLinear with PyTorch alone; "compiled" is torch.compile of it
    v2 complex        a plain implementation in complex arithmetic, written for this comparison
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fairy2i import METHODS, PhaseScheme, QATLinear, replace_modules_for_qat
from fairy2i.ops import training as ops
from fairy2i.phase_quant import phase_dequantize, phase_quantize, phase_scale_gradient
from fairy2i.reuse import Reuse, reuse_quantized

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)]
PARTS = ("kernels", "layers", "block", "host", "sweep")
LEARNED = PhaseScheme(stages=2, granularity="row", scales="learned")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "sweep"])
    parser.add_argument("--shapes", nargs="+", help="OUTxIN; default: those of LLaMA-2-7B")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens in a step; default: 8192, and 2048 for 4096x4096")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes its time")
    parser.add_argument("--check", action="store_true", help="compare kernels with PyTorch, and measure nothing")
    parser.add_argument("--small", action="store_true", help="fewer cases of --check, as for compute-sanitizer")
    parser.add_argument("--budget", type=float, default=90, help="seconds after which the sweep measures no more")
    parser.add_argument("--out", help="JSON file to write; default: the screen alone")
    return parser.parse_args(argv)


class ComplexLinear(nn.Module):
    """The method in complex arithmetic, as one would write it down first: the yardstick of what kernels save."""

    def __init__(self, weight: nn.Parameter, stages: int) -> None:
        super().__init__()
        self.weight = weight
        self.stages = stages

    def quantized(self) -> Tensor:
        """Return the dense quantized weight, float32."""
        weight = self.weight.detach().float()
        n, m = weight.shape[0] // 2, weight.shape[1] // 2
        a11, a12, a21, a22 = weight[:n, :m], weight[:n, m:], weight[n:, :m], weight[n:, m:]
        done = []
        for z in (torch.complex(a11 + a22, a21 - a12) / 2, torch.complex(a11 - a22, a12 + a21) / 2):
            total = torch.zeros_like(z)
            for _ in range(self.stages):
                rest = z - total
                turns = torch.remainder(torch.round(torch.angle(rest) / (torch.pi / 2)), 4)
                real = turns % 2 == 0
                scale_re = rest.real[real].abs().mean().clamp(min=1e-6)
                scale_im = rest.imag[~real].abs().mean().clamp(min=1e-6)
                sign = torch.where(turns < 2, 1.0, -1.0)
                total = total + torch.complex(scale_re * sign * real, scale_im * sign * ~real)
            done.append(total)
        u, w = done
        top = torch.cat((u.real + w.real, w.imag - u.imag), 1)
        return torch.cat((top, torch.cat((u.imag + w.imag, u.real - w.real), 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with the quantized weight, straight-through."""
        quantized = self.quantized().to(self.weight.dtype)
        return F.linear(x, self.weight + (quantized - self.weight).detach())


# Measuring


class Clock:
    """Times calls on a device: events on a GPU, else the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def start(self, ahead: bool = False) -> Any:
        """Return a mark of now; ``ahead`` has the device idle a millisecond before, so that calls can queue up."""
        if not self.cuda:
            return time.perf_counter()
        if ahead:
            torch.cuda._sleep(2_000_000)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two marks."""
        return start.elapsed_time(end) if self.cuda else (end - start) * 1e3


def in_turns(calls: dict[str, Callable[[], Any]], turns: int, clock: Clock, calls_each: int = 1) -> dict[str, Any]:
    """Return milliseconds of each call: median, 10th and 90th percentile."""
    for call in calls.values():
        for _ in range(3):
            call()
    marks: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            call()  # what ran before was another variant
            start = clock.start(ahead=calls_each > 1)
            for _ in range(calls_each):
                call()
            marks[name].append((start, clock.start()))
    clock.sync()
    times = {name: sorted(clock.between(*mark) / calls_each for mark in found) for name, found in marks.items()}
    return {
        name: {
            "ms": statistics.median(found),
            "low": found[len(found) // 10],
            "high": found[-1 - len(found) // 10],
        }
        for name, found in times.items()
    }


def peak_of(make: Callable[[], Callable[[], Any]], device: torch.device) -> tuple[Callable[[], Any], int | None]:
    """Return the call that ``make`` makes, and the peak memory over what was there before it; None without a GPU."""
    if device.type != "cuda":
        return make(), None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    call = make()
    for _ in range(2):  # the first one compiles
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
    return call, torch.cuda.max_memory_allocated() - before


def size_of(*tensors: Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Rotation:
    """Items one after the other, without end: so many that none lies in the cache when its turn comes."""

    def __init__(self, *lists: list[Any]) -> None:
        self.items = list(zip(*lists, strict=True))
        self.turn = 0

    def __call__(self) -> Any:
        """Return the next."""
        self.turn = (self.turn + 1) % len(self.items)
        return self.items[self.turn]


@contextlib.contextmanager
def backend(name: Any) -> Iterator[None]:
    """Quantize with this backend inside."""
    before: Any = ops.set_backend(name)
    try:
        yield
    finally:
        ops.set_backend(before)


def step_of(module: nn.Module, x: Tensor, grad: Tensor, name: str) -> Callable[[], None]:
    """Return a call of forward and backward with this backend; no gradients are left behind."""

    def step() -> None:
        with backend(name):
            module(x).backward(grad)
            x.grad = None
            for parameter in module.parameters():
                parameter.grad = None

    return step


def table(rows: list[dict[str, Any]], first: Sequence[str]) -> str:
    """Return rows as Markdown, with times and memory over those of the row called linear in the same group."""
    lines = [f"| {' | '.join(first)} | ms | low | high | over linear | peak MiB | over linear |"]
    lines.append("|" + "---|" * (len(first) + 6))
    lines[:0] = [f"failed: {row['failed']}" for row in rows if "failed" in row]
    for row in rows:
        if "failed" in row:
            continue
        peak = "" if row.get("peak") is None else f"{row['peak'] / 2**20:.0f}"
        cells = [*(str(row[name]) for name in first), *(f"{row[key]:.4g}" for key in ("ms", "low", "high"))]
        more = "" if not row.get("memory") else f"{row['memory']:.3f}"
        lines.append(f"| {' | '.join(cells)} | {row['ratio']:.3f} | {peak} | {more} |")
    return "\n".join(lines)


def with_ratios(times: dict[str, Any], peaks: dict[str, Any], base: str, **group: Any) -> list[dict[str, Any]]:
    """Return one row for each variant."""
    rows = []
    for name, found in times.items():
        row = {**group, "variant": name, **found, "ratio": found["ms"] / times[base]["ms"], "peak": peaks.get(name)}
        row["memory"] = row["peak"] / peaks[base] if row["peak"] and peaks.get(base) else None
        rows.append(row)
    return rows


# Parts


def make_layer(weight: nn.Parameter, method: str | None) -> nn.Module:
    """Return a layer with this weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    if method is None:
        return linear
    return ComplexLinear(weight, 2) if method == "complex" else QATLinear.from_linear(linear, scheme_of(method))


def make_kept(weight: nn.Parameter, method: str, what: Any) -> nn.Module:
    """Return a layer that keeps its quantized weight."""
    layer = make_layer(weight, method)
    Reuse(layer, what).begin()
    return layer


def make_compiled(weight: nn.Parameter, method: str | None) -> Any:
    """Return a layer that is compiled, one graph."""
    return torch.compile(make_layer(weight, method), fullgraph=True, dynamic=False)


def scheme_of(method: str) -> Any:
    """Return the scheme of a method."""
    return LEARNED if method == "learned" else METHODS["fairy2i_w2" if method == "rotated" else method]


def bench_layers(args: argparse.Namespace, device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Measure single layers."""
    rows = []
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    v2, on = "complex_phase_v2", "auto" if clock.cuda else "torch"
    for i, (out, inner) in enumerate(args.shapes):
        usual = [8192] if clock.cuda else [64]
        for k, tokens in enumerate(args.tokens or (usual if i else [*usual, usual[0] // 4])):
            weight = nn.Parameter(torch.randn(out, inner, device=device, dtype=dtype) * 0.02)
            x = torch.randn(tokens, inner, device=device, dtype=dtype, requires_grad=True)
            grad = torch.randn(tokens, out, device=device, dtype=dtype)
            variants: list[tuple[str, str, Callable[[], nn.Module]]] = [
                ("linear", on, partial(make_layer, weight, None)),
                *((f"v{t}", on, partial(make_layer, weight, f"complex_phase_v{t}")) for t in range(1, 5)),
                ("learned-row", on, partial(make_layer, weight, "learned")),
                ("rotated", on, partial(make_layer, weight, "rotated")),
                ("v2 codes", on, partial(make_kept, weight, v2, "codes")),
                ("v2 dense", on, partial(make_kept, weight, v2, "dense")),
            ]
            if i == k == 0:
                variants += [
                    ("v2 torch", "torch", partial(make_layer, weight, v2)),
                    ("v4 torch", "torch", partial(make_layer, weight, "complex_phase_v4")),
                    ("v2 complex", "torch", partial(make_layer, weight, "complex")),
                ]
            if i == k == 0 and not args.no_compile:
                variants += [
                    ("linear compiled", on, partial(make_compiled, weight, None)),
                    ("v2 compiled", on, partial(make_compiled, weight, v2)),
                    ("v2 torch compiled", "torch", partial(make_compiled, weight, v2)),
                    ("v2 complex compiled", "torch", partial(make_compiled, weight, "complex")),
                ]
            steps, peaks = {}, {}
            for name, how, make in variants:
                steps[name], peak = peak_of(partial(make_step, make, x, grad, how), device)
                peaks[name] = None if peak is None else peak + size_of(weight, x, grad)
            rows += with_ratios(
                in_turns(steps, args.turns, clock), peaks, "linear", layer=f"{out}x{inner}", tokens=tokens
            )
            del steps, variants, make, weight, x, grad
            torch._dynamo.reset()
    return rows


def make_step(make: Callable[[], nn.Module], x: Tensor, grad: Tensor, how: str) -> Callable[[], None]:
    """Return a call of forward and backward of a layer that is made now."""
    with backend(how):
        return step_of(make(), x, grad, how)


def llama_block(small: bool) -> tuple[nn.Module, Any, int]:
    """Return a decoder block of LLaMA-2-7B, what makes its position embeddings, and its width."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    width, inner, heads = (128, 256, 4) if small else (4096, 11008, 32)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads
    )
    config._attn_implementation = "sdpa"
    block, rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)
    for parameter in block.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return block.train(), rotary, width


class BlockStep:
    """A step over a few micro-batches of a decoder block.

    Args:
        base: the block to copy, in float32.
        method: None for plain linear layers.
        count: micro-batches.
        sharded: FSDP2 with float32 weights and bfloat16 computation; else all is of the dtype of the input.
        reuse: how quantized weights are kept over the micro-batches, or None.
        how: the backend.
        x, grad, positions: what each micro-batch uses.
    """

    def __init__(
        self,
        base: nn.Module,
        method: str | None,
        count: int,
        sharded: bool,
        reuse: Any,
        how: str,
        x: Tensor,
        grad: Tensor,
        positions: Any,
    ) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        block = copy.deepcopy(base).to(x.device, None if sharded else x.dtype)
        if method is not None:
            with backend(how):
                replace_modules_for_qat(nn.ModuleList([block]), scheme_of(method))
        if sharded:
            fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=x.dtype, reduce_dtype=torch.float32))
        self.block, self.count, self.reuse, self.how = block, count, reuse, how
        self.x, self.grad, self.positions = x, grad, positions

    def __call__(self) -> None:
        """Do a step; no gradients are left behind."""
        with backend(self.how):
            kept = contextlib.nullcontext() if self.reuse is None else reuse_quantized(self.block, self.reuse)
            with kept:
                for _ in range(self.count):
                    y = self.block(self.x, position_embeddings=self.positions)
                    (y[0] if isinstance(y, tuple) else y).backward(self.grad)
                    self.x.grad = None
            for parameter in self.block.parameters():
                parameter.grad = None


def bench_block(args: argparse.Namespace, device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Measure a whole block: a step of one micro-batch, of four, and with FSDP2 in a group of one process."""
    dtype, length = (torch.bfloat16, 2048) if clock.cuda else (torch.float32, 32)
    on, v2, v4 = "auto" if clock.cuda else "torch", "complex_phase_v2", "complex_phase_v4"
    # variant, method, what is kept, backend
    linear = ("linear", None, None, on)
    settings: list[tuple[str, int, bool, list[tuple[str, str | None, str | None, str]]]] = [
        (
            "1 micro-batch",
            1,
            False,
            [
                linear,
                ("v1", "complex_phase_v1", None, on),
                ("v2", v2, None, on),
                ("v4", v4, None, on),
                ("learned-row", "learned", None, on),
                ("rotated", "rotated", None, on),
                ("v2 torch", v2, None, "torch"),
            ],
        ),
        (
            "4 micro-batches",
            4,
            False,
            [
                linear,
                ("v2", v2, None, on),
                ("v2 codes", v2, "codes", on),
                ("v2 dense", v2, "dense", on),
                ("v4 codes", v4, "codes", on),
                ("learned-row codes", "learned", "codes", on),
                ("rotated dense", "rotated", "dense", on),
            ],
        ),
    ]
    if clock.cuda:
        sharded: list[tuple[str, str | None, str | None, str]] = [
            linear,
            ("v2", v2, None, on),
            ("learned-row", "learned", None, on),
            ("rotated", "rotated", None, on),
        ]
        settings.append(("1 micro-batch, FSDP2", 1, True, sharded))
        settings.append(("4 micro-batches, FSDP2", 4, True, [linear, ("v2 codes", v2, "codes", on)]))
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        for key, value in defaults.items():
            os.environ.setdefault(key, value)
        dist.init_process_group("nccl", device_id=device)
    rows: list[dict[str, Any]] = []
    try:
        with device:
            base, rotary, width = llama_block(small=not clock.cuda)
        for tokens in args.tokens or [8192 if clock.cuda else 64]:
            batch = max(tokens // length, 1)
            x = torch.randn(batch, length, width, device=device, dtype=dtype, requires_grad=True)
            grad = torch.randn(batch, length, width, device=device, dtype=dtype)
            positions = rotary(x, torch.arange(length, device=device)[None])
            for setting, count, shard, variants in settings:
                steps, peaks = {}, {}
                for name, method, kept, how in variants:
                    make = partial(BlockStep, base, method, count, shard, kept, how, x, grad, positions)
                    try:
                        steps[name], peak = peak_of(make, device)
                    except Exception as error:  # the others go on without it
                        rows.append({"failed": f"{setting} {name}: {error!r}"[-1000:]})
                        continue
                    peaks[name] = None if peak is None else peak + size_of(x, grad)
                times = in_turns(steps, max(args.turns * 2 // 3 // count, 3), clock)
                rows += with_ratios(times, peaks, "linear", layer=setting, tokens=batch * length)
                del steps, make
    finally:
        if clock.cuda:
            dist.destroy_process_group()
    return rows


def bench_kernels(args: argparse.Namespace, device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Measure the ops alone against a copy of the weight, and say how many bytes a second they move."""
    rows = []
    run, bf16 = torch.ops.fairy2i, torch.bfloat16
    for out, inner in args.shapes:
        size = out * inner * 2
        weights = [torch.randn(out, inner, device=device, dtype=bf16) * 0.02 for _ in range(max(2, int(4e8) // size))]
        grads = [torch.randn_like(weight) for weight in weights]
        cases: dict[str, tuple[Callable[[], Any], float]] = {}

        def add(name: str, moved: float, call: Callable[..., Any], *lists: Any, cases: Any = cases) -> None:
            turn = Rotation(*lists)
            cases[name] = (lambda: call(*turn()), moved)

        add("copy", 2 * size, Tensor.copy_, [torch.empty_like(weight) for weight in weights], weights)
        for granularity, stages in (("tensor", 1), ("tensor", 2), ("tensor", 4), ("row", 2), ("tile", 2)):
            how = (stages, granularity, 64, 0)
            fits = [run.phase_quantize_mean(weight, *how, None, True) for weight in weights]
            scales, blocks = [fit[1] for fit in fits], [fit[2] for fit in fits]
            key, passes = f"{granularity} {stages}", stages + 2 if granularity == "tensor" else 2
            add(f"{key} mean", passes * size, lambda w, how=how: run.phase_quantize_mean(w, *how, bf16, False), weights)
            add(
                f"{key} given",
                2 * size,
                lambda w, s, how=how: run.phase_quantize_given(w, s, *how, bf16, False, None),
                weights,
                scales,
            )
            if stages == 2:
                add(
                    f"{key} from codes",
                    (1 + 1 / 8) * size,
                    lambda b, s, how=how: run.phase_dequantize_blocks(b, s, *how, bf16, bf16, None),
                    blocks,
                    scales,
                )
                add(
                    f"{key} scale gradient",
                    2 * size,
                    lambda g, w, s, how=how: run.phase_scale_gradient(g, w, None, s, *how),
                    grads,
                    weights,
                    scales,
                )
        times = in_turns({name: call for name, (call, _) in cases.items()}, args.turns, clock, calls_each=8)
        for row in with_ratios(times, {}, "copy", layer=f"{out}x{inner}", tokens=0):
            row["gb_per_s"] = cases[row["variant"]][1] / row["ms"] / 1e6
            rows.append(row)
        del weights, grads, cases, add
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def bench_host(args: argparse.Namespace, device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Measure what a call costs the processor: a layer so small that the GPU waits for it."""
    rows = []
    x = torch.randn(16, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(16, 256, device=device, dtype=torch.bfloat16)
    linear = nn.Linear(256, 256, bias=False, device=device, dtype=torch.bfloat16)
    steps = {"linear": step_of(linear, x, grad, "auto")}
    for name in ("complex_phase_v2", "complex_phase_v4", "learned", "rotated"):
        module = QATLinear.from_linear(copy.deepcopy(linear), scheme_of(name))
        steps[name] = step_of(module, x, grad, "auto")
    kept = QATLinear.from_linear(copy.deepcopy(linear), METHODS["complex_phase_v2"])
    Reuse(kept, "codes").begin()
    steps["v2 codes"] = step_of(kept, x, grad, "auto")
    for name, step in steps.items():
        for _ in range(20):
            step()
        clock.sync()
        begun = time.perf_counter()
        for _ in range(200):
            step()
        clock.sync()
        us = (time.perf_counter() - begun) / 200 * 1e6
        rows.append({"layer": "host", "variant": name, "us_per_call": us})
    return rows


# Other ways to launch: (rows, columns, warps) of a chunk, programs, depth
CHUNKS = [(1, 512, 2), (1, 512, 4), (4, 128, 2), (1, 1024, 4), (1, 1024, 8), (8, 128, 4), (1, 2048, 4), (2, 1024, 8)]
COUNTS = (264, 512, 1024, 2048)
DEPTHS = (1, 2, 3)
MORE = ({"registers": 64}, {"registers": 80})


@contextlib.contextmanager
def planned(**plans: Any) -> Iterator[None]:
    """Launch kernels as ``plans`` say, by what a kernel does; others as ever."""
    from fairy2i.ops.triton import quantize as launch

    original: Any = launch._plan

    def plan(n: int, m: int, granularity: str, tile: int, what: str, stages: int, turned: bool, width: int) -> Any:
        return plans.get(what) or original(n, m, granularity, tile, what, stages, turned, width)

    setattr(launch, "_plan", plan)  # noqa: B010
    try:
        yield
    finally:
        setattr(launch, "_plan", original)  # noqa: B010


def sweep_call(what: str, stages: int, weights: Rotation) -> Callable[[], Any]:
    """Return a call of the sums ("sums"), of writing with given scales ("write") or of both ("mean")."""
    from fairy2i.ops.triton.quantize import sum_stages

    how, bf16 = (stages, "tensor", 64, 0), torch.bfloat16
    if what == "sums":
        found = torch.empty(stages, 2, 2, device=weights.items[0][0].device)
        return lambda: sum_stages(weights()[0], found)
    if what == "mean":
        return lambda: torch.ops.fairy2i.phase_quantize_mean(*weights(), *how, bf16, False)
    scales = torch.linspace(0.02, 0.005, 4 * stages, device=weights.items[0][0].device).view(stages, 2, 2)
    return lambda: torch.ops.fairy2i.phase_quantize_given(*weights(), scales, *how, bf16, False, None)


def compile_plans(tasks: list[tuple[str, int, Any]]) -> list[str]:
    """Compile kernels into Triton's cache on disk, in a process of its own; return what failed."""
    failed = []
    weights = Rotation([torch.zeros(4096, 4096, device="cuda", dtype=torch.bfloat16)])
    for what, stages, plan in tasks:
        try:
            with planned(**{what: plan}):
                sweep_call(what, stages, weights)()
            torch.cuda.synchronize()
        except Exception as error:  # the sweep goes on without it
            failed.append(f"{what} {stages} {plan}: {error!r}"[:300])
    return failed


def bench_sweep(args: argparse.Namespace, device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Measure the kernels of one scale for all entries with other chunks, grids and depths, in two rounds.

    The second one takes the best of the first, for v2 and v4, and then both kernels together.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from fairy2i.ops.triton.quantize import Plan

    rows: list[dict[str, Any]] = []
    until = time.perf_counter() + args.budget
    sizes = [(out, inner, out * inner * 2) for out, inner in args.shapes]
    weights = {
        f"{out}x{inner}": Rotation(
            [
                torch.randn(out, inner, device=device, dtype=torch.bfloat16) * 0.02
                for _ in range(max(2, int(2e8) // size))
            ]
        )
        for out, inner, size in sizes
    }
    workers = min(len(os.sched_getaffinity(0)), 32)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:

        def prepare(tasks: list[tuple[str, int, Any]]) -> None:
            shares = [tasks[i::workers] for i in range(workers)]
            for failed in pool.map(compile_plans, [share for share in shares if share]):
                rows.extend({"failed": line} for line in failed)

        def measure(what: str, stages: int, names: list[str], plans: dict[str, Any], turns: int = 5) -> None:
            for name in names:
                if time.perf_counter() > until:
                    return
                try:
                    with planned(**plans):
                        times = in_turns({"it": sweep_call(what, stages, weights[name])}, turns, clock, calls_each=8)
                except Exception as error:
                    rows.append({"failed": f"{what} {stages} {plans}: {error!r}"[:300]})
                    continue
                found = {"layer": name, "what": what, "stages": stages, "us": round(times["it"]["ms"] * 1e3, 1)}
                rows.append(found | {key: tuple(plan) for key, plan in plans.items()})

        def best(what: str, stages: int, count: int) -> list[Any]:
            """Return the plans that are best over all layers together."""
            total: dict[Any, float] = {}
            for row in rows:
                if row.get("what") == what and row["stages"] == stages and what in row:
                    total[row[what]] = total.get(row[what], 0.0) + row["us"]
            return [Plan(*plan) for plan in sorted(total, key=lambda plan: total[plan])[:count]]

        names = list(weights)
        plans = [Plan(*chunk, count, depth) for chunk in CHUNKS for count in COUNTS for depth in DEPTHS]
        whats = ("sums", "write")
        prepare([("sums", 2, plan) for plan in plans])
        prepare([("write", 2, plan) for plan in plans if plan.programs == COUNTS[0]])  # the same for all counts
        for what in whats:
            for stages in (2, 4):
                measure(what, stages, names, {})  # as it is
            for plan in plans:
                measure(what, 2, names[:2], {what: plan})
        again = {what: [plan._replace(**more) for plan in best(what, 2, 4) for more in ({}, *MORE)] for what in whats}
        prepare([(what, stages, plan) for what in whats for plan in again[what] for stages in (2, 4)])
        for what in whats:
            for plan in again[what]:
                for stages in (2, 4):
                    measure(what, stages, names, {what: plan}, 9)
        for stages in (2, 4):
            measure("mean", stages, names, {}, 9)
            for sums in best("sums", stages, 2):
                for write in best("write", stages, 2):
                    measure("mean", stages, names, {"sums": sums, "write": write}, 9)
    return rows


def sweep_summary(rows: list[dict[str, Any]]) -> str:
    """Return the best few of each kind, and how it is now."""
    lines = [f"failed: {row['failed']}" for row in rows if "failed" in row][:5]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if "us" in row:
            groups.setdefault((row["what"], row["stages"], row["layer"]), []).append(row)
    for (what, stages, layer), found in groups.items():
        plain = [row["us"] for row in found if not {"sums", "write"} & row.keys()]
        lines.append(
            f"{what} v{stages} {layer}: now {plain[0] if plain else '?'} us; rows, cols, warps, programs, depth ..."
        )
        for row in sorted(found, key=lambda row: row["us"])[:6]:
            plans = {key: row[key] for key in ("sums", "write") if key in row}
            lines.append(f"    {row['us']:7.1f} {' '.join(f'{key} {plan}' for key, plan in plans.items()) or 'now'}")
    return "\n".join(lines)


# Checking


def check(device: torch.device, small: bool, say: Callable[[str], None] = print) -> int:
    """Compare every kernel with PyTorch on small and odd shapes; return how many cases differ."""
    run = torch.ops.fairy2i
    bad = cases = 0
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((34, 70),) if small else ((2, 2), (34, 70), (128, 514), (514, 96)):
            for granularity, tile in (("tensor", 64), ("row", 64), ("tile", 5), ("tile", 64)):
                for stages in (2,) if small else (1, 2, 3, 4):
                    for turned in (False, True):
                        weight = torch.randn(shape, device=device).mul(0.02).to(dtype)
                        weight = weight.T if turned else weight
                        options: Any = {"granularity": granularity, "tile": tile}
                        codes, scales = phase_quantize(weight, stages=stages, **options)
                        dense = phase_dequantize(codes, scales, **options).to(dtype)
                        how = (stages, granularity, tile, 0)
                        found = run.phase_quantize_mean(weight, *how, dtype, True)
                        blocks = found[2]
                        given, _ = run.phase_quantize_given(weight, scales, *how, dtype, False, None)
                        again = run.phase_dequantize_blocks(blocks, scales, *how, dtype, dtype, None)
                        grad = torch.randn(weight.shape, device=device)
                        moved = run.phase_scale_gradient(grad, weight, None, scales, *how)
                        expected = phase_scale_gradient(grad, codes, **options)
                        same = [
                            torch.equal(ops.from_blocks(blocks, stages), codes),
                            torch.equal(found[1], scales),
                            *(torch.equal(value, dense) for value in (found[0], given, again)),
                            torch.allclose(moved, expected, rtol=1e-6, atol=1e-6),
                        ]
                        cases += 1
                        if not all(same):
                            bad += 1
                            say(f"differs: {dtype} {tuple(weight.shape)} {granularity} {tile} {stages} {turned} {same}")
    say(f"{cases - bad} of {cases} cases agree with PyTorch")
    return bad


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what the command line says; return it, and write it as JSON where that is wanted."""
    args = parse_args(argv)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    if args.check:
        if check(device, args.small, say):
            raise SystemExit(1)
        return {}
    given = [tuple(map(int, shape.split("x"))) for shape in args.shapes or ()]
    args.shapes = given or (SHAPES if name == "cuda" else [(256, 256), (256, 512)])
    clock = Clock(device)
    report: dict[str, Any] = {
        "settings": {key: value for key, value in vars(args).items()},
        "device": torch.cuda.get_device_name(device) if name == "cuda" else "cpu",
        "torch": torch.__version__,
        "kernels": ops.fused(torch.empty(0, device=device), 2),
    }
    benches: dict[str, Any] = {
        "kernels": bench_kernels,
        "layers": bench_layers,
        "block": bench_block,
        "host": bench_host,
        "sweep": bench_sweep,
    }
    for part in args.parts:
        if name == "cpu" and part not in ("layers", "block"):
            continue
        begun = time.perf_counter()
        rows = benches[part](args, device, clock)
        report[part] = rows
        report[f"{part}_seconds"] = time.perf_counter() - begun
        say(f"\n{part} ({report[f'{part}_seconds']:.0f} s)\n")
        if part in ("layers", "block", "kernels"):
            say(table(rows, ("layer", "tokens", "variant")))
        elif part == "sweep":
            say(sweep_summary(rows))
        else:
            say("\n".join(json.dumps(row) for row in rows))
        if args.out:  # after each, so that a run that breaks off leaves what it has
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
    return report


if __name__ == "__main__":
    main()
