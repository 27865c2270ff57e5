"""Packed layers on a GPU: kernels against cuBLAS and the memory's limit, and tokens a second of a 7B model, in one run.

    python benchmarks/bench_inference.py --out inference.json              # kernels, under three minutes
    python benchmarks/bench_inference.py --parts model --out model.json    # LLaMA-2-7B's shape; compiling takes minutes
    python benchmarks/bench_inference.py --check                           # no times: kernels against PyTorch
    python benchmarks/bench_inference.py --tune --out tune.json            # how decode is launched; ways side by side
    TRITON_INTERPRET=1 python benchmarks/bench_inference.py --device cpu   # that it runs, on small shapes

Weights are random codes: speed and size, never quality. A call is one in a CUDA graph that goes through so many copies
of the weights that each has left the cache when its turn comes. Competitors take turns, a graph each, so that other
work and the clock meet all of them; times are medians over the rounds with the lowest and the highest. The limit is
what a copy moves in the same run, counting both directions; launch_us is a kernel that does nothing. The model decodes
greedily from a prompt of 128 tokens, with a static cache and `torch.compile(mode="reduce-overhead")` of the whole
model, ours and nn.Linear alike. --check uses several processes, as most of its time is waiting for the compiler.
--tune prints lines for `TUNED` of ops/cuda/decode.py, and times of each way, which `Thresholds` of ops/gpu.py follow.
"""

import argparse
import concurrent.futures
import copy
import functools
import gc
import importlib.util
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairy2i import PackedLinear, PhaseScheme, RealScheme
from fairy2i.ops import gpu
from fairy2i.ops.inference import code_rows_and_columns, layout_of
from fairy2i.packed import use_backend
from fairy2i.packing import pack_codes
from fairy2i.schemes import Scheme

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)]
TOKENS = [1, 2, 4, 8, 16, 64, 256, 2048]
FEW = [1, 16]  # tokens of the schemes that are not the ones to beat
KINDS: dict[str, Scheme] = {
    "W2": PhaseScheme(stages=2),
    "W2 row": PhaseScheme(stages=2, granularity="row", scales="learned"),
    "W1": PhaseScheme(stages=1),
    "W3": PhaseScheme(stages=3),
    "W4": PhaseScheme(stages=4),
    "binary": RealScheme(levels=2),
    "ternary": RealScheme(levels=3),
}
TUNED_KINDS = ("W2", "W1")
JOINED = [(12288, 4096), (22016, 4096)]  # q, k, v and gate, up of the model, which are one call each
MODEL = {  # LLaMA-2-7B
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {**MODEL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "vocab_size": 64}
CACHE = 192 << 20  # bytes of copies: three times the largest cache


def summary(values: list[float], digits: int = 2) -> dict[str, float]:
    """Return median, lowest and highest."""
    named = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


class Timer:
    """Times calls in microseconds: a CUDA graph by events, or on the processor by the clock.

    It keeps the call, and so what the call refers to: a graph has no more than addresses, and the capture of the next
    one gives memory that nobody holds back to the driver.
    """

    def __init__(self, call: Callable[[], Any], count: int, device: str) -> None:
        self.count, self.cuda, self.call, self.kept = count, device == "cuda", call, call
        if self.cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            self.call = graph.replay
        self.call()

    def __call__(self) -> float:
        """Return the microseconds of one of the calls in the graph."""
        if not self.cuda:
            start = time.perf_counter()
            self.call()
            return (time.perf_counter() - start) * 1e6 / self.count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self.count


def take_turns(timers: dict[str, Timer], rounds: int) -> dict[str, dict[str, float]]:
    """Let each be timed once a round."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: summary(values) for name, values in times.items()}


def copy_rate(device: str) -> float:
    """Return GB/s of a copy, both directions counted."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timer = Timer(lambda: target.copy_(source), 1, device)
    return 2 * source.nbytes / min(timer() for _ in range(10)) / 1e3


def launch_time(device: str) -> float:
    """Return the microseconds that a kernel that does next to nothing takes in a graph."""
    one = torch.zeros(1, device=device)
    timer = Timer(lambda: [one.add_(1) for _ in range(100)], 100, device)
    return min(timer() for _ in range(10))


def in_processes(work: Callable[..., Any], args: argparse.Namespace, seconds: float) -> list[Any]:
    """Return what work(args, part, parts) of each part gave: in processes of their own on a GPU, else of the only one.

    What is not ready in time is None.
    """
    if args.device != "cuda":
        return [work(args, 0, 1)]
    end, parts = time.monotonic() + seconds, max(min((os.cpu_count() or 2) - 2, 14), 1)
    with concurrent.futures.ProcessPoolExecutor(parts, torch.multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(work, args, part, parts) for part in range(parts)]
        concurrent.futures.wait(waiting, max(end - time.monotonic(), 0))
        found = [one.result() if one.done() else None for one in waiting]
        for process in list(pool._processes.values()) if None in found else []:
            process.terminate()
    return found


def random_words(scheme: Scheme, shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return words, scales and layout of a layer of random codes."""
    layout = layout_of(scheme, "gpu")
    size = gpu.words_shape(*code_rows_and_columns(*shape, layout[0]), *layout[:2])
    words = torch.randint(-32768, 32768, size, dtype=torch.int16, device=device)
    scales = torch.rand(scheme.scale_shape(*shape), device=device) * 0.01 + 0.01
    return words, scales, layout


def packed_call(
    scheme: Scheme, shape: tuple[int, int], x: Tensor, way: str | None
) -> tuple[Callable[[], Any], int, int]:
    """Return a call of all copies, how many they are, and the bytes of one."""
    words, scales, layout = random_words(scheme, shape, x.device.type)
    gpu.prepare_memory(shape[1], scheme.rotation, layout, x.device)  # as a model's layers do when they are loaded
    size = words.nbytes + scales.nbytes
    copies = [(words.clone(), scales.clone()) for _ in range(1 + min(CACHE // size, 63) if x.is_cuda else 2)]
    return lambda: [gpu.linear(x, *one, None, shape[0], layout, way=way) for one in copies], len(copies), size


def dense_call(shape: tuple[int, int], x: Tensor) -> tuple[Callable[[], Any], int, int]:
    """The same of nn.Linear."""
    size = shape[0] * shape[1] * x.element_size()
    copies = [torch.randn(shape, dtype=x.dtype, device=x.device) for _ in range(1 + CACHE // size if x.is_cuda else 2)]
    return lambda: [F.linear(x, w) for w in copies], len(copies), size


def peer_calls(shape: tuple[int, int], x: Tensor) -> dict[str, tuple[Callable[[], Any], int, int] | str]:
    """Return other libraries' kernels, or why they are left out."""
    found: dict[str, tuple[Callable[[], Any], int, int] | str] = {}
    for name in ("gemlite", "torchao"):
        if importlib.util.find_spec(name) is None:
            found[name] = "not installed"
    if "gemlite" not in found:
        try:
            from gemlite.helper import A16Wn  # type: ignore[import-not-found]

            codes = torch.randint(0, 4, shape, dtype=torch.uint8, device=x.device)
            ones = torch.rand(shape[0] * shape[1] // 64, 1, device=x.device, dtype=x.dtype)
            make = A16Wn(device="cuda", dtype=x.dtype)
            layer = make.from_weights(codes, ones, ones, W_nbits=2, group_size=64)
            copies = [layer] + [copy.deepcopy(layer) for _ in range(CACHE * 4 // codes.nbytes)]
            found["gemlite"] = (lambda: [one(x) for one in copies], len(copies), codes.nbytes // 4)
        except Exception as error:  # another version of its interface
            found["gemlite"] = f"{type(error).__name__}: {error}"[:200]
    if "torchao" not in found:
        try:
            from torchao.quantization import Int4WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

            with torch.device(x.device):
                layers = [nn.Linear(shape[1], shape[0], bias=False, dtype=x.dtype) for _ in range(4)]
            for one in layers:
                quantize_(one, Int4WeightOnlyConfig(group_size=128))
            found["torchao"] = (lambda: [one(x) for one in layers], 4, shape[0] * shape[1] // 2)
        except Exception as error:
            found["torchao"] = f"{type(error).__name__}: {error}"[:200]
    return found


def measure_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Time layers."""
    found: dict[str, Any] = {"copy_GB_per_s": round(copy_rate(args.device), 1)}
    found |= {"launch_us": round(launch_time(args.device), 2), "peers": {}, "shapes": {}}
    print(f"copy {found['copy_GB_per_s']} GB/s, launch {found['launch_us']} us", flush=True)
    limit, end = found["copy_GB_per_s"], time.monotonic() + args.budget
    for tokens, shape in itertools.product(args.tokens, args.shapes):
        label = f"{shape[0]}x{shape[1]}, {tokens} tokens"
        if time.monotonic() > end:
            found.setdefault("left_out", []).append(label)
            continue
        x = torch.randn(tokens, shape[1], device=args.device).to(args.dtype)
        calls: dict[str, tuple[Callable[[], Any], int, int]] = {"nn.Linear": dense_call(shape, x)}
        for kind, scheme in KINDS.items():
            if kind.startswith("W2") or tokens in FEW:
                calls[kind] = packed_call(scheme, shape, x, None)
        if 16 <= tokens:
            calls |= {f"W2 {way}": packed_call(KINDS["W2"], shape, x, way) for way in ways(tokens)}
        if tokens in FEW and args.device == "cuda":
            for name, peer in peer_calls(shape, x).items():
                if isinstance(peer, str):
                    found["peers"][name] = peer
                else:
                    calls[name] = peer
        timers: dict[str, Timer] = {}
        for name, (call, count, _) in calls.items():
            try:
                timers[name] = Timer(call, count, args.device)
            except Exception as error:
                found.setdefault("failed", {})[f"{label}, {name}"] = f"{type(error).__name__}: {error}"[:300]
                torch.cuda.synchronize() if args.device == "cuda" else None
        rows = take_turns(timers, args.rounds)
        for name, row in rows.items():
            size = calls[name][2]
            row["GB_per_s"] = round(size / row["median"] / 1e3, 1)
            row["share_of_copy"] = round(row["GB_per_s"] / limit, 3)
            row["times_nn_linear"] = round(rows["nn.Linear"]["median"] / row["median"], 2)
            row["bytes"] = size
        found["shapes"][label] = rows
        shown = ", ".join(f"{name} {row['median']} us ({row['times_nn_linear']}x)" for name, row in rows.items())
        print(f"{label}: {shown}", flush=True)
        del calls, timers
        gc.collect()
    return found


def ways(tokens: int) -> list[str]:
    """Return the ways that are worth a try for so many tokens."""
    wide = ["wide"] if gpu.why_no_cuda("wide") is None else []
    return [*(["planes", "blocks"] if tokens <= 64 else []), *wide, "dense"]


def decode_candidates(tokens: int) -> Iterable[Any]:
    """Return configurations of the kernel for few tokens to try."""
    from fairy2i.ops.cuda.decode import Config

    if tokens <= 2:
        for (warps, blocks), depth, parts in itertools.product(((16, 1), (8, 1), (8, 2), (4, 2)), (2, 3, 4), (0, 2, 4)):
            yield Config(warps=warps, depth=depth, blocks=blocks, parts=parts)
    else:
        for warps, depth, ranges in itertools.product((16, 8), (2, 3, 4), (1, 2, 4)):
            yield Config(warps=warps, depth=depth, ranges=ranges, halves=True)


def run_copies(copies: list[Tensor], scales: Tensor, layout: Any, x: Tensor, y: Tensor, config: Any) -> None:
    """Multiply with each copy by decode."""
    from fairy2i.ops.cuda import decode

    for words in copies:
        decode.multiply(x, words, scales, None, y, layout, None, config)


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """Sweep configurations of decode, and where another way than dense is faster."""
    from fairy2i.ops.cuda import decode

    found: dict[str, Any] = {"best": {}, "paste": [], "ways": {}}
    begin = time.monotonic()
    few = [tokens for tokens in args.tokens if tokens <= gpu.THRESHOLDS.decode and gpu.why_no_cuda() is None]
    cases = list(itertools.product(few, TUNED_KINDS, args.shapes))
    end = begin + args.budget * 0.85
    for i, (tokens, kind, shape) in enumerate(cases):
        share = time.monotonic() + (end - time.monotonic()) / (len(cases) - i)
        configs = list(decode_candidates(tokens))
        x = torch.randn(tokens, shape[1], device=args.device).to(args.dtype)
        words, scales, layout = random_words(KINDS[kind], shape, args.device)
        copies = [words] + [words.clone() for _ in range(min(CACHE // words.nbytes, 63) if x.is_cuda else 0)]
        y = x.new_empty(tokens, shape[0])
        rows: list[tuple[float, Any]] = []
        for config in configs:
            if time.monotonic() > share and rows:
                break
            call = functools.partial(run_copies, copies, scales, layout, x, y, config)
            try:
                timer = Timer(call, len(copies), args.device)
                rows.append((round(min(timer() for _ in range(5)), 2), config))
            except Exception as error:
                found.setdefault("failed", {})[f"{kind} {shape} {tokens} {config}"] = f"{error}"[:200]
        if not rows:
            continue
        rows.sort(key=lambda row: row[0])
        key = str((words.shape[2], words.shape[0], layout[1], decode.compiled_tokens(tokens)))
        best = [f"{us} {config}" for us, config in rows[:8]]
        found["best"][f"{kind} {shape} {tokens}"] = {"key": key, "tried": len(rows), "best": best}
        line = f"    {key}: {rows[0][1]},  # {rows[0][0]} us, {kind} {shape[0]}x{shape[1]}, {tokens} tokens"
        found["paste"].append(line)
        rate = words.nbytes / rows[0][0] / 1e3
        print(f"{kind} {shape} {tokens}: {best[0]}, {rate:.0f} GB/s, of {len(rows)}/{len(configs)}; then {best[1:3]}")
    print("\n".join(["TUNED = {", *found["paste"], "}"]), flush=True)
    end = begin + args.budget
    can = gpu.why_no_cuda("wide") is None and args.dtype == torch.bfloat16
    for shape, tokens in itertools.product(args.shapes[:4], (16, 32, 64, 256, 512, 1024) if can else ()):
        if time.monotonic() > end:
            break
        x = torch.randn(tokens, shape[1], device=args.device).to(args.dtype)
        tried = ["wide", "dense", *(["planes"] if tokens <= 64 else [])]
        calls = {way: packed_call(KINDS["W2"], shape, x, way) for way in tried}
        timers = {way: Timer(call, count, args.device) for way, (call, count, _) in calls.items()}
        found["ways"][f"{shape[0]}x{shape[1]}, {tokens} tokens"] = row = take_turns(timers, 5)
        print(shape, tokens, {way: times["median"] for way, times in row.items()}, flush=True)
    return found


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Compare all ways with PyTorch on weird shapes: at most twice the error of the plain path in the same dtype."""
    found = in_processes(check_some, args, args.budget)
    bad = [line for one in found if one for line in one["wrong"]]
    result = {"cases": sum(one["cases"] for one in found if one), "wrong": bad, "not_ready": found.count(None)}
    print(f"{result['cases']} cases, {len(bad)} wrong, {result['not_ready']} of {len(found)} processes not ready")
    return result


def check_some(args: argparse.Namespace, part: int, parts: int) -> dict[str, Any]:
    """Check every so many of the cases."""
    schemes: list[Scheme] = [*KINDS.values(), PhaseScheme(stages=2, granularity="tile", tile=40)]
    schemes += [PhaseScheme(rotation=64), PhaseScheme(stages=5)]
    big = [(130, 258), (1002, 336), (34, 16386)] if args.device == "cuda" else [(6, 34)]
    bad, count = [], 0
    cases = [
        (scheme, shape, dtype)
        for scheme, shape, dtype in itertools.product(schemes, big, (torch.bfloat16, torch.float16, torch.float32))
        if dtype == torch.bfloat16 or scheme == KINDS["W2"]  # the tests have all of them
    ]
    for scheme, (rows, columns), dtype in cases[part::parts]:
        layer = random_layer(scheme, rows, columns, args.device)
        layout = layout_of(scheme, "gpu")
        words = gpu.repack(layer.codes, code_rows_and_columns(rows, columns, layout[0]), layout)
        weight = layer.dense_weight()
        for tokens in (1, 2, 4, 16, 70, 300) if args.device == "cuda" else (3,):
            x = torch.randn(tokens, columns, device=args.device).to(dtype)
            exact = F.linear(x.double(), weight.double())
            plain = (F.linear(x, weight.to(dtype)).double() - exact).norm()
            for way in ("decode", "planes", "wide", "blocks", "dense"):
                if way == "decode" and not (tokens <= 16 and gpu.takes_few(tokens, layout, dtype, words)):
                    continue
                if way == "wide" and not gpu.takes_wide(layout, dtype, columns, words.device):
                    continue
                if way in ("planes", "blocks") and dtype == torch.float32:
                    continue
                if way == "planes" and (scheme.granularity == "tile" or tokens > 70):
                    continue
                case = f"{scheme} {rows}x{columns} {dtype} {tokens} {way}"
                count += 1
                try:
                    y = gpu.linear(x, words, layer.scales, None, rows, layout, way=way)
                    same = torch.equal(y, gpu.linear(x, words, layer.scales, None, rows, layout, way=way))
                    ratio = float((y.double() - exact).norm() / (plain + torch.finfo(dtype).eps / 4 * exact.norm()))
                    if not same or not ratio <= 2:
                        bad.append(f"{case}: {ratio:.2f}, same bits: {same}")
                except Exception as error:
                    bad.append(f"{case}: {type(error).__name__}: {error}"[:500])
                if bad and bad[-1].startswith(case):
                    print(bad[-1], flush=True)
    return {"cases": count, "wrong": bad}


def random_layer(scheme: Scheme, rows: int, columns: int, device: str) -> PackedLinear:
    """Return a packed layer with random codes, in the order of the format."""
    layer = PackedLinear(columns, rows, False, scheme=scheme, device=device).eval()
    levels = scheme.levels if isinstance(scheme, RealScheme) else 4
    codes = torch.randint(0, levels, scheme.code_shape(rows, columns), dtype=torch.uint8, device=device)
    layer.codes.copy_(pack_codes(codes, scheme.code_width))
    layer.scales.uniform_(0.01, 0.02)
    return layer


def make_model(scheme: Scheme | None, args: argparse.Namespace) -> nn.Module:
    """Return a random model, packed if there is a scheme, with every linear layer and the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(MODEL if args.device == "cuda" else TINY), max_position_embeddings=4096)
    before = torch.get_default_dtype()
    torch.set_default_dtype(args.dtype)
    try:
        with torch.device(args.device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    if scheme is not None:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                parent = model.get_submodule(name.rpartition(".")[0])
                new = random_layer(scheme, layer.out_features, layer.in_features, args.device)
                setattr(parent, name.rpartition(".")[2], new)
        use_backend(model, "gpu")
    gc.collect()
    return model


class Decoder:
    """Greedy decoding, step by step, with a static cache and a compiled forward."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        from transformers import StaticCache

        self.model, self.args = model, args
        # one for all runs: what is compiled, and CUDA graphs, know where it lies
        self.cache = StaticCache(config=model.config, max_cache_len=args.prompt + 160)
        mode: Any = {"mode": "reduce-overhead"} if args.device == "cuda" else {"backend": "aot_eager"}
        self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **mode)

    def __call__(self, new: int, prompt: int) -> tuple[float, float]:
        """Return seconds of the prompt and of so many tokens after the first."""
        self.cache.reset()
        ids = torch.ones(1, prompt, dtype=torch.long, device=self.args.device)
        wait = torch.cuda.synchronize if self.args.device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        token = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        wait()
        middle = time.perf_counter()
        for step in range(new):
            place = torch.full((1, 1), prompt + step, device=self.args.device)
            out = self.forward(input_ids=token, position_ids=place, past_key_values=self.cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        wait()
        return middle - start, time.perf_counter() - middle


def kernels_of(decoder: Decoder, prompt: int) -> dict[str, list[float]]:
    """Return [microseconds, launches] of a decoded token for the kernels that take the most time."""
    activity = torch.profiler.ProfilerActivity.CUDA
    found = []
    for new in (2, 10):  # the difference is without the prompt
        with torch.profiler.profile(activities=[activity]) as profile:
            decoder(new, prompt)
        found.append({event.key: (event.self_device_time_total, event.count) for event in profile.key_averages()})
    rows = {}
    for key, (us, count) in found[1].items():
        before = found[0].get(key, (0.0, 0))
        rows[key[:70]] = [round((us - before[0]) / 8, 1), round((count - before[1]) / 8, 1)]
    return dict(sorted(rows.items(), key=lambda row: -row[1][0])[:16])


def measure_model(args: argparse.Namespace) -> dict[str, Any]:
    """Let models decode in turns."""
    torch._dynamo.config.cache_size_limit = 64
    found: dict[str, Any] = {}
    decoders: dict[str, Decoder] = {}
    kinds = {name: KINDS.get(name) for name in ("nn.Linear", *args.kinds)}
    new = 128 if args.device == "cuda" else 4
    for name, scheme in kinds.items():
        begin = time.monotonic()
        try:
            model = make_model(scheme, args)
            tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights_of(model)}
            decoder = Decoder(model, args)
            with torch.no_grad():
                for _ in range(2):
                    decoder(4, args.prompt)
            decoders[name], found[name] = decoder, {"weights_GB": round(sum(tensors.values()) / 1e9, 3)}
            found[name]["ready_after_s"] = round(time.monotonic() - begin, 1)
            with torch.no_grad():
                found[name]["first_tokens_per_s"] = round(new / decoder(new, args.prompt)[1], 1)
                if args.device == "cuda":
                    found[name]["kernels_us_a_token"] = kernels_of(decoder, args.prompt)
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        print(name, found[name], flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    with torch.no_grad():
        for _ in range(args.rounds_model):
            for name, decoder in decoders.items():
                times[name].append(decoder(new, args.prompt))
    for name, values in times.items():
        found[name]["decode_tokens_per_s"] = summary([new / decode for _, decode in values])
        found[name]["prefill_eager_ms"] = summary([prefill * 1e3 for prefill, _ in values])
        print(name, found[name], flush=True)
    return found


def weights_of(model: nn.Module) -> Iterable[Tensor]:
    """Return the weights of the linear layers: parameters, words and scales; not embeddings and norms."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight
        elif isinstance(module, PackedLinear):
            yield from module.buffers(recurse=False)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--parts", nargs="+", choices=("kernels", "model"), default=["kernels"])
    parser.add_argument("--shapes", nargs="+", help="OUTxIN; default: those of LLaMA-2-7B")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["W2", "W2 row"], help="of models")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rounds_model", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--budget", type=float, default=150, help="seconds for kernels, --check or --tune")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", help="JSON file to write; default: the screen alone")
    args = parser.parse_args()
    small = args.device == "cpu"
    args.shapes = [tuple(map(int, s.split("x"))) for s in args.shapes or []] or (
        [(34, 66)] if small else [*SHAPES, *JOINED] if args.tune else SHAPES
    )
    args.tokens = args.tokens or ([1] if small else [1, 2, 4, 8] if args.tune else TOKENS)
    args.rounds, args.rounds_model = (2, 1) if small else (args.rounds, args.rounds_model)
    args.prompt = min(args.prompt, 5) if small else args.prompt
    args.dtype = getattr(torch, args.dtype)
    if small and not gpu.interpreted():
        parser.error("--device cpu needs TRITON_INTERPRET=1")
    return args


def main() -> None:
    """Measure and write."""
    args = parse_args()
    torch.manual_seed(0)
    begin = time.monotonic()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "Triton's interpreter"
    versions = {
        package: importlib.import_module(package).__version__ for package in ("torch", "triton", "transformers")
    }
    result: dict[str, Any] = {"device": name, **versions, "dtype": str(args.dtype)[6:]}
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {"check": check, "tune": tune}
    parts |= {"kernels": measure_kernels, "model": measure_model}
    chosen = [part for part in ("check", "tune") if getattr(args, part)] or args.parts
    write = functools.partial(write_json, args.out, result)
    for part in chosen:
        result[part] = parts[part](args)
        result["seconds"] = round(time.monotonic() - begin, 1)
        write()
    if args.check and result["check"]["wrong"]:
        raise SystemExit(1)


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Write what is known by now."""
    if path:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
