"""The `fairy2i` command: quantize, inspect, generate, doctor."""

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import nn
from transformers import TextStreamer, set_seed
from transformers.utils.logging import set_verbosity_warning

from ._version import __version__
from .convert import ConversionReport, Method, convert_to_inference_mode, replace_modules_for_qat
from .evaluation.table import markdown_table
from .inspection import inspect_layers, model_bits_per_weight
from .loading import load_model_and_tokenizer, parse_method
from .packed import PackedLinear
from .qat import QATLinear
from .saving import atomic_folder
from .streaming import NotStreamable, check_method, pack_checkpoint

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "triton",
    "lm_eval",
    "gguf",
)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--gguf_file", help="a GGUF file inside the model folder")
    parser.add_argument("--tokenizer", help="tokenizer, if it does not lie with the model")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its subcommands."""
    parser = argparse.ArgumentParser(prog="fairy2i", description="Language models in one to four bits per weight.")
    parser.add_argument("--version", action="version", version=f"fairy2i {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quantize = commands.add_parser(
        "quantize",
        help="pack a checkpoint",
        description="Pack a QAT checkpoint as it was trained, or quantize and pack a plain one. A plain model that\n"
        "was not trained for it is of little use at one or two bits. Safetensors are packed layer by layer,\n"
        "without the whole model in memory. The output is there when it is complete, or not at all.",
        epilog="examples:\n"
        "  fairy2i quantize outputs/my-w2 my-w2-packed                           # a QAT checkpoint\n"
        "  fairy2i quantize MODEL model-w2-packed --method complex_phase_v2      # a plain one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(quantize)
    quantize.add_argument("output", help="folder to make; an empty one may be there")
    quantize.add_argument("--method", help="method for a plain checkpoint: a name, or JSON as for train.py")
    quantize.add_argument("--skip_lm_head", action=argparse.BooleanOptionalAction, help="default: only a tied head")
    quantize.add_argument("--dequantized", action="store_true", help="write plain weights instead of packed ones")
    quantize.set_defaults(run=run_quantize)

    inspect = commands.add_parser(
        "inspect", help="show what is in a quantized checkpoint", description="Show method, bits and codes by layer."
    )
    _add_model(inspect)
    inspect.add_argument("--original", help="unquantized model to measure the error of each layer against")
    inspect.add_argument("--original_gguf_file", help="a GGUF file inside the folder of the original")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=run_inspect)

    generate = commands.add_parser(
        "generate", help="continue a prompt", description="Continue a prompt, printed as it is made."
    )
    _add_model(generate)
    generate.add_argument("prompt", help="text to continue; - reads it from standard input")
    generate.add_argument("--max_new_tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--top_p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    generate.set_defaults(run=run_generate)

    doctor = commands.add_parser("doctor", help="show versions, hardware and backends")
    doctor.set_defaults(run=run_doctor)
    return parser


def _load(args: argparse.Namespace) -> tuple[nn.Module, object]:
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    return load_model_and_tokenizer(args.model, gguf_file=args.gguf_file, tokenizer=args.tokenizer, dtype=dtype)


def run_quantize(args: argparse.Namespace) -> None:
    """Pack a checkpoint and write it: from disk to disk where that can be done, else in memory."""
    method, report = parse_method(args.method), None
    if not (args.gguf_file or args.dequantized):
        try:
            report = pack_checkpoint(
                args.model,
                args.output,
                method,
                skip_lm_head=args.skip_lm_head,
                dtype=args.dtype,
                tokenizer=args.tokenizer,
            )
        except NotStreamable as error:
            print(f"the whole model goes into memory: {error.reason}", file=sys.stderr)
    if report is None:
        report = _quantize_in_memory(args, method)
    print(report)
    size = sum(entry.stat().st_size for entry in os.scandir(args.output) if entry.name.endswith(".safetensors"))
    print(f"{args.output}: {size / 1e6:,.1f} MB of weights")


def _quantize_in_memory(args: argparse.Namespace, method: Method | None) -> ConversionReport:
    with atomic_folder(args.output) as folder:
        model, tokenizer = _load(args)
        kinds = {type(module) for module in model.modules()}
        if PackedLinear in kinds:
            raise ValueError(f"{args.model} is packed already")
        check_method(args.model, QATLinear in kinds, method, args.skip_lm_head is not None)
        report = replace_modules_for_qat(model, {} if method is None else method, args.skip_lm_head)
        convert_to_inference_mode(model, packed=not args.dequantized)
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return report


def run_inspect(args: argparse.Namespace) -> None:
    """Print what is in a checkpoint."""
    model, _ = _load(args)
    original = None
    if args.original:
        original, _ = load_model_and_tokenizer(args.original, gguf_file=args.original_gguf_file)
    layers = inspect_layers(model, original)
    if not layers:
        raise ValueError(f"{args.model} has no quantized layers")
    weights = sum(layer.numel for layer in layers)
    bits = model_bits_per_weight(model)
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    summary = {"layers": len(layers), "weights": weights, "bits_per_weight": bits, "bytes_in_memory": total}
    if args.json:
        print(json.dumps({**summary, "per_layer": [layer.to_dict() for layer in layers]}, indent=1))
        return
    rows = []
    for layer in layers:
        use = " ".join(f"{share:.0%}" for share in layer.code_use)
        shape = "x".join(map(str, layer.shape))
        error = "-" if layer.error is None else f"{layer.error:.4f}"
        rows.append([layer.name, layer.method, shape, f"{layer.bits_per_weight:.4f}", use, error])
    print(markdown_table(["layer", "method", "shape", "bits", "use of the codes", "error"], rows))
    print(f"\n{len(layers)} layers, {weights:,} weights at {bits:.4f} bits; {total / 1e6:,.1f} MB in memory in all")


def run_generate(args: argparse.Namespace) -> None:
    """Continue a prompt and print the text as it comes."""
    model, tokenizer = _load(args)
    model.to(args.device).eval()
    set_seed(args.seed)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    inputs = tokenizer(prompt, return_tensors="pt").to(args.device)  # type: ignore[operator]
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt is empty")
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    streamer = TextStreamer(tokenizer)  # type: ignore[arg-type]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id  # type: ignore[attr-defined]
    model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer, pad_token_id=pad, **sampling)  # type: ignore[operator]


def run_doctor(args: argparse.Namespace) -> None:
    """Print versions, hardware and backends."""
    print(f"fairy2i {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"  {package:16} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package:16} not installed")
    print(
        f"CPU      {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for index in range(torch.cuda.device_count()):
        print(f"GPU {index}    {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        print("GPU      none that PyTorch can use")
    print("Backends reference (pure PyTorch): on. It is the only one in this version.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 after an error, 2 for a wrong command line, 130 after ctrl-C."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_verbosity_warning()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
