"""The training loss in chunks: the kernel beside PyTorch's operations, in one run, with the memory's limit.

    python benchmarks/bench_loss.py --out loss.json                  # SmolLM2's head and tokens; a few seconds on a GPU
    python benchmarks/bench_loss.py --vocabulary 151936 --width 4096 --tokens 8192
    python benchmarks/bench_loss.py --device cpu --tokens 64 --vocabulary 500 --width 32    # that it runs

Loss and all gradients of the student's head, forward and backward, bf16 activations and float32 weights. The two take
turns; times are medians with the lowest and the highest, by CUDA events. The limit is that of the logits alone: each is
written by a product, read twice and written as a gradient, and read by two products, 2 bytes each time, at the rate of
a copy; the products' own time, measured too, comes on top or in its place.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fairy2i.ops import training as ops
from fairy2i.training.loss import Head, chunked_loss

BACKENDS: tuple[ops.Backend, ...] = ("auto", "torch")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args()


def milliseconds(call: Callable[[], object], cuda: bool) -> float:
    """Return the time of a call."""
    if not cuda:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> None:
    """Measure, print and write."""
    args = parse_args()
    cuda = args.device.startswith("cuda")
    heads = []
    for trained in (True, False):
        hidden = torch.randn(args.tokens, args.width, device=args.device, dtype=torch.bfloat16)
        weight = torch.randn(args.vocabulary, args.width, device=args.device) / args.width**0.5
        heads.append(Head(hidden.requires_grad_(trained), weight.requires_grad_(trained), None))
    student, teacher = heads
    targets = torch.randint(args.vocabulary, (args.tokens,), device=args.device)

    def loss(backend: ops.Backend, distill: float) -> Tensor:
        before = ops.set_backend(backend)
        try:
            taught = teacher if distill else None
            total = chunked_loss(student, targets, taught, weight=distill, chunk=args.chunk)
            total.backward()
            return total.detach()
        finally:
            ops.set_backend(before)

    def products(count: int) -> None:
        weight = student.weight.detach().bfloat16()
        for rows in student.hidden.detach().split(args.chunk):
            for _ in range(count):
                logits = F.linear(rows, weight)
            logits @ weight
            logits.mT @ rows

    calls: dict[str, Callable[[], object]] = {}
    for name, distill in (("cross-entropy", 0.0), ("half distillation", 0.5)):
        for backend in BACKENDS:
            calls[f"{name}, {'kernel' if backend == 'auto' else 'PyTorch'}"] = partial(loss, backend, distill)
        calls[f"{name}, products alone"] = partial(products, 2 if distill else 1)
    source = torch.empty(1 << (29 if cuda else 20), dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float] = {}
    for name, call in calls.items():
        call()
        if cuda:
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            peaks[name] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
    for _ in range(args.turns):
        for name, call in calls.items():
            times[name].append(milliseconds(call, cuda))
    rate = 2 * source.numel() / statistics.median(times.pop("copy")) / 1e6
    report = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "device")},
        "copy_GB_per_s": round(rate, 1),
        "limit_ms": {
            name: round(2 * args.tokens * args.vocabulary * each / rate / 1e6, 3)
            for name, each in (("cross-entropy", 6), ("half distillation", 9))
        },
        "ms": {
            name: {"median": round(statistics.median(t), 3), "low": round(min(t), 3), "high": round(max(t), 3)}
            for name, t in times.items()
        },
        "peak_GiB": peaks,
    }
    print(json.dumps(report, indent=1))
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
