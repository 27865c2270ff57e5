"""Tokens a second, model FLOP utilization and peak memory of quantization-aware training, against plain linear layers.

    torchrun --nproc_per_node 2 benchmarks/train_throughput.py --wrapper fsdp2 --shape 7b --out fsdp2_7b.json
    torchrun --nproc_per_node 2 benchmarks/train_throughput.py --wrapper ddp --shape 7b --out ddp_7b.json
    torchrun --nproc_per_node 2 benchmarks/train_throughput.py --shape tiny --length 64 --steps 3     # on any CPU

A LLaMA with random weights, made on "meta" and filled on each process; `accelerate launch` starts it as well. Bytes
for each parameter, before activations:

    fsdp2   weights, gradients and both states of AdamW in float32, computed in bfloat16: 16, divided by the processes
    ddp     all four in bfloat16: 8, in each process. In float32 they would be 16, 108 GB for 7B, and 135 GB with the
            autocast copies and a block of activations: no room on a GPU of 141 GB. So ddp numbers are speed, no recipe.

Model FLOPs of a token are 6 for each weight of a matrix and 6 * layers * hidden * length for causal attention; neither
recomputation nor quantization counts as work.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from fairy2i import PhaseScheme, QATLinear, replace_modules_for_qat
from fairy2i.training.objective import Objective
from fairy2i.training.sharding import keep_scales_exact

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "125m": (768, 2048, 12, 12, 12, 32000),
    "tiny": (64, 128, 2, 4, 4, 512),
}
METHODS = {
    "linear": None,
    "w2": "complex_phase_v2",
    "w2-learned-row": PhaseScheme(stages=2, granularity="row", scales="learned"),
}
BYTES_A_PARAMETER = {"fsdp2": 16, "ddp": 8}
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bfloat16, as the data sheets say
WEIGHT_STD = 0.02


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrapper", choices=sorted(BYTES_A_PARAMETER), default="fsdp2")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer or more blocks than the shape has")
    parser.add_argument("--vocabulary", type=int, help="another vocabulary than the shape has")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"], help="torch.compile the blocks")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=1, help="rows in a step, each process")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--loss-chunk-tokens", type=int, default=1024, help="0: whole logits")
    parser.add_argument("--peak", type=float, help="TFLOP/s of one device; default: by its name")
    parser.add_argument("--force", action="store_true", help="run also what does not fit by the arithmetic")
    parser.add_argument("--out", help="JSON file to write; default: the screen alone")
    return parser.parse_args(argv)


def model_config(args: argparse.Namespace) -> LlamaConfig:
    """Return the configuration of the shape."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=args.vocabulary or vocabulary,
        max_position_embeddings=max(args.length, 64),
        tie_word_embeddings=False,
        use_cache=False,
    )


def flops_per_token(model: nn.Module, config: LlamaConfig, length: int) -> int:
    """Return the model FLOPs of training on one token: forward and backward of all matrices and of attention."""
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    return 6 * weights + 6 * config.num_hidden_layers * config.hidden_size * length


@torch.no_grad()
def fill(model: nn.Module, config: LlamaConfig, device: torch.device) -> None:
    """Give a model from "meta", sharded or not, memory and random weights, in place."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif not name.endswith(".scales"):
            nn.init.normal_(parameter, std=WEIGHT_STD)
    sample = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * WEIGHT_STD
    for layer in model.modules():
        if isinstance(layer, QATLinear) and layer.scales is not None:
            fit = layer.scheme.quantize(sample)[1].mean(-1, keepdim=True)  # rows of random weights are all alike
            whole = fit.expand(layer.scheme.scale_shape(layer.out_features, layer.in_features)).contiguous().to(device)
            target: Any = layer.scales
            if isinstance(target, DTensor):
                target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
            else:
                target.copy_(whole)
    rotary: Any = model.get_submodule("model.rotary_emb")  # its buffers are computed, not loaded
    with device:
        model.get_submodule("model").rotary_emb = type(rotary)(config)


def build(args: argparse.Namespace, method: str, compiled: bool, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return the model and what wraps it, filled and ready to train."""
    config = model_config(args)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.float32 if args.wrapper == "fsdp2" else torch.bfloat16)
    scheme = METHODS[method]
    if scheme is not None:
        replace_modules_for_qat(model, scheme)
    if not args.no_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    blocks = model.model.layers
    if compiled:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if args.wrapper == "ddp":
        torch.manual_seed(0)
        fill(model, config, device)
        ids = [device.index] if device.type == "cuda" else None
        return model, DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model.model.embed_tokens, mp_policy=policy)
    fully_shard([model.model.norm, model.lm_head], mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mp_policy=policy)
    torch.manual_seed(0)
    fill(model, config, device)
    return model, keep_scales_exact(model)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(args: argparse.Namespace, method: str, compiled: bool, device: torch.device) -> dict[str, Any]:
    """Return what one model needs for a step of training."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    model, wrapped = build(args, method, compiled, device)
    flops = flops_per_token(model, model_config(args), args.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    objective = Objective(model, chunk=args.loss_chunk_tokens)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    vocabulary = model_config(args).vocab_size
    times: list[float] = []
    losses: list[float] = []
    for step in range(args.warmup + args.steps):
        ids = torch.randint(vocabulary, (args.batch, args.length), generator=generator).to(device)
        dist.barrier()
        start = time.perf_counter()
        loss, _ = objective(wrapped, {"input_ids": ids, "labels": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        if cuda:
            torch.cuda.synchronize(device)
        if step >= args.warmup:
            times.append(time.perf_counter() - start)
    slowest = torch.tensor(times, device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    peak = (
        torch.cuda.max_memory_allocated(device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    seconds = slowest.tolist()
    rates = [args.batch * args.length * dist.get_world_size() / s for s in seconds]
    result = {
        "method": method,
        "compile": compiled,
        "parameters": parameters,
        "step_s": spread(seconds),
        "tokens_per_s": spread(rates),
        "tflops_per_device": flops * statistics.median(rates) / dist.get_world_size() / 1e12,
        "peak_gib": peak / 2**30,
        "chunked_loss": objective.chunked,
        "losses": losses,
    }
    result["mfu"] = result["tflops_per_device"] / args.peak if args.peak else None
    return result


def room(args: argparse.Namespace, device: torch.device) -> tuple[float, float | None]:
    """Return the bytes that parameters and optimizer need in one process, and those of the device, if it says so."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in LlamaForCausalLM(model_config(args)).parameters())
    processes = dist.get_world_size() if args.wrapper == "fsdp2" else 1
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return count * BYTES_A_PARAMETER[args.wrapper] / processes, there


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what the command line says; return it, and write it as JSON where that is wanted.

    Raises:
        SystemExit: it does not fit.
    """
    args = parse_args(argv)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        first = dist.get_rank() == 0
        name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
        if args.peak is None:
            args.peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        needed, there = room(args, device)
        if first:
            say(f"parameters, gradients and optimizer: {needed / 1e9:.1f} GB in each process, before activations")
        if there is not None and needed > 0.95 * there and not args.force:
            raise SystemExit(f"that does not fit into {there / 1e9:.0f} GB; take another shape, or --force")
        report: dict[str, Any] = {
            "settings": vars(args),
            "device": name,
            "processes": dist.get_world_size(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "parameter_and_optimizer_gb": needed / 1e9,
            "results": [],
        }
        for compiled in args.compile:
            for method in args.methods:
                try:
                    result = measure(args, method, compiled == "on", device)
                except torch.OutOfMemoryError as error:
                    result = {"method": method, "compile": compiled == "on", "error": str(error).splitlines()[0]}
                report["results"].append(result)
                gc.collect()
                torch._dynamo.reset()
                if cuda:
                    torch.cuda.empty_cache()
                if first:
                    say(json.dumps(result))
                    if args.out:  # after each, so that a run that breaks off leaves what it has
                        with open(args.out, "w", encoding="utf-8") as file:
                            json.dump(report, file, indent=1)
        return report
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
