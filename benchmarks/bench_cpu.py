"""Packed layers on the CPU: kernels against the memory's limit, and tokens a second against PyTorch and llama.cpp.

    python benchmarks/bench_cpu.py --out cpu.json                                      # without llama.cpp
    python benchmarks/bench_cpu.py --out cpu.json --peer ../shared/tools/llama_cpp_peer.py \\
        --peer_python VENV/bin/python --peer_models DIR        # DIR as `llama_cpp_peer.py make DIR` leaves it

The model has the shape of TinyLlama-1.1B and random weights: speed and size, never quality. Competitors take turns in
each round, so that other work on the machine meets all of them; figures are medians over the rounds, with the lowest
and the highest. Decoding is timed as the difference between long and short calls of `generate()`, prefill as one that
makes one token from 128; llama.cpp's as its tool does. The limit is what this run reads and copies: `torch.sum` over
256 MiB, and `copy_`, counting both directions.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fairy2i import METHODS, PackedLinear, PhaseScheme, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.ops import cpu
from fairy2i.packed import use_backend

SHAPE = {  # TinyLlama-1.1B
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SCHEMES = {
    "W2": METHODS["complex_phase_v2"],
    "W2 row": PhaseScheme(granularity="row", scales="learned"),
    "W1": METHODS["complex_phase_v1"],
}
MATRICES = {"gate and up": (11264, 2048), "down": (2048, 5632), "head": (32000, 2048)}
PEER_TYPES = ["TQ2_0", "Q2_K", "Q4_K_M"]
PEER_LINE = re.compile(r"^(\w+): prefill ([\d.]+) tok/s, decode ([\d.]+) tok/s", re.M)


def seconds(call: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(values: list[float], digits: int = 2) -> dict[str, float]:
    """Return median, lowest and highest."""
    named = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def memory_limits(repeats: int) -> dict[str, Callable[[], float]]:
    """Return calls that measure GB/s: reading, and copying with both directions counted."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return {
        "read": lambda: source.nbytes / min(seconds(source.sum) for _ in range(repeats)) / 1e9,
        "copy": lambda: 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(repeats)) / 1e9,
    }


def random_layer(scheme: Any, rows: int, columns: int) -> PackedLinear:
    """Return a packed layer with random codes."""
    layer = PackedLinear(columns, rows, False, scheme=scheme).eval()
    layer.codes.random_(0, 256)
    layer.scales.uniform_(0.01, 0.02)
    return layer


def measure_kernels(rounds: int) -> dict[str, Any]:
    """Time single layers at batch 1, over copies that fall out of the cache between two calls."""
    found: dict[str, Any] = {}
    limits = memory_limits(3)
    for name, (rows, columns) in MATRICES.items():
        times: dict[str, list[float]] = {}
        size: dict[str, int] = {}
        x = torch.randn(1, columns)
        calls: dict[str, tuple[int, Callable[[], Any]]] = {}
        for label, scheme in SCHEMES.items():
            copies = max(2, (96 << 20) // (rows * columns // 4))
            for backend in cpu.MODES:
                layers = [use_backend(random_layer(scheme, rows, columns), backend) for _ in range(copies)]
                calls[f"{label} {backend}"] = (copies, lambda layers=layers, x=x: [layer(x) for layer in layers])
                size[f"{label} {backend}"] = layers[0].codes.nbytes
        for dtype in (torch.float32, torch.bfloat16):
            copies = max(2, (192 << 20) // (rows * columns * dtype.itemsize))
            weights = [torch.randn(rows, columns).to(dtype) for _ in range(copies)]
            small = x.to(dtype)
            label = f"torch {str(dtype)[6:]}"
            calls[label] = (copies, lambda weights=weights, small=small: [F.linear(small, w) for w in weights])
            size[label] = weights[0].nbytes
        bandwidth: dict[str, list[float]] = {key: [] for key in limits}
        with torch.no_grad():
            for call in calls.values():
                call[1]()
            for _ in range(rounds):
                for key, measure in limits.items():
                    bandwidth[key].append(measure())
                for label, (copies, call) in calls.items():
                    times.setdefault(label, []).append(seconds(call) / copies)
        read = statistics.median(bandwidth["read"])
        found[name] = {
            "shape": [rows, columns],
            "limit_gb_s": {key: summary(values, 1) for key, values in bandwidth.items()},
            "layers": {
                label: {
                    "microseconds": summary([value * 1e6 for value in values], 1),
                    "gb_s": round(size[label] / statistics.median(values) / 1e9, 1),
                    "share_of_read": round(size[label] / statistics.median(values) / 1e9 / read, 2),
                }
                for label, values in times.items()
            },
        }
    return found


def make_model(scheme: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of the shape with random weights, packed if there is a scheme."""
    config = LlamaConfig(**SHAPE, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        if scheme is not None:
            replace_modules_for_qat(model, scheme)
            convert_to_inference_mode(model)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = rotary
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        if parameter.dim() > 1:
            parameter.data.uniform_(-0.03, 0.03)
        else:
            parameter.data.fill_(1)
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.codes.random_(0, 256)
            layer.scales.fill_(0.015)
    return model


def generate_seconds(model: Any, prompt: int, tokens: int) -> float:
    """Time a call of generate()."""
    ids = torch.randint(0, SHAPE["vocab_size"], (1, prompt))
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return seconds(lambda: model.generate(ids, **settings))


def measure_ours(model: Any, tokens: int) -> tuple[float, float]:
    """Return (decode, prefill) in tokens a second."""
    generate_seconds(model, 8, 2)  # the others have had the caches since
    long, short = generate_seconds(model, 8, tokens + 2), generate_seconds(model, 8, 2)
    return tokens / (long - short), 128 / generate_seconds(model, 128, 1)


def measure_peer(args: argparse.Namespace, kind: str, threads: int) -> tuple[float, float]:
    """Return (decode, prefill) of llama.cpp in tokens a second."""
    command = [args.peer_python, args.peer, "bench", args.peer_models, kind]
    command += ["--threads", str(threads), "--tokens", str(args.tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = PEER_LINE.search(done.stdout)
    if line is None:
        raise ValueError(f"{args.peer} printed no rates: {done.stdout[-300:]}")
    return float(line[3]), float(line[2])


def measure_models(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Let all competitors take turns."""
    calls: dict[str, Callable[[], tuple[float, float]]] = {}
    for label, scheme in SCHEMES.items():
        model = make_model(scheme)
        for backend in cpu.MODES:

            def ours(model: Any = model, backend: Any = backend) -> tuple[float, float]:
                use_backend(model, backend)
                return measure_ours(model, args.tokens)

            calls[f"{label} {backend}"] = ours
    for dtype in () if args.no_torch else (torch.float32, torch.bfloat16):
        plain = make_model(None, dtype)
        calls[f"torch {str(dtype)[6:]}"] = lambda plain=plain: measure_ours(plain, max(args.tokens // 4, 2))
    for kind in PEER_TYPES if args.peer else ():
        calls[f"llama.cpp {kind}"] = lambda kind=kind: measure_peer(args, kind, threads)
    rates: dict[str, list[tuple[float, float]]] = {label: [] for label in calls}
    for number in range(args.rounds):
        for label, call in calls.items():
            rates[label].append(call())
            decode, prefill = rates[label][-1]
            print(
                f"{threads} threads, round {number + 1}: {label}: decode {decode:.1f}, prefill {prefill:.1f}",
                flush=True,
            )
    return {
        label: {"decode": summary([value[0] for value in values]), "prefill": summary([value[1] for value in values])}
        for label, values in rates.items()
    }


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode in each measurement")
    parser.add_argument("--parts", nargs="+", default=["kernels", "models"], choices=["kernels", "models"])
    parser.add_argument("--no_torch", action="store_true", help="leave out the models with plain torch weights")
    parser.add_argument("--peer", help="llama_cpp_peer.py; without it llama.cpp is left out")
    parser.add_argument("--peer_python", default="python3", help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--peer_models", help="folder that `llama_cpp_peer.py make` filled")
    args = parser.parse_args()
    if args.peer and not args.peer_models:
        parser.error("--peer needs --peer_models")
    return args


def main() -> None:
    """Measure and write."""
    args = parse_args()
    cpu.library()
    if not args.peer:
        print("llama.cpp is left out: no --peer")
    result: dict[str, Any] = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "instruction_set": cpu.instruction_set(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "load_before": os.getloadavg(),
        "threads": {},
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        part = result["threads"][str(threads)] = {}
        if "kernels" in args.parts:
            part["kernels"] = measure_kernels(args.rounds)
            print(json.dumps(part["kernels"], indent=1), flush=True)
        if "models" in args.parts:
            part["models"] = measure_models(args, threads)
    result["load_after"] = os.getloadavg()
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
