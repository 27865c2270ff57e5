"""The `fairy2i` command: prepare, train, eval, quantize, inspect, generate, doctor."""

import argparse
import json
import logging
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from transformers import TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_warning

from ._version import __version__
from .allocate import CHOICE_TOKENS, allocate_stages
from .calibrate import calibrate
from .convert import ConversionReport, Method, convert_to_inference_mode, replace_modules_for_qat
from .evaluation.table import markdown_table
from .inspection import LayerInfo, inspect_layers, summarize
from .loading import (
    DTYPES,
    check_learned_rows,
    check_phase_codes,
    context_length,
    default_device,
    load_config,
    load_model_and_tokenizer,
    move_to_device,
    parse_method,
    read_documents,
)
from .ops import cpu, gpu
from .packed import BACKENDS as PACKED_BACKENDS
from .packed import DEFAULT as PACKED_DEFAULT
from .packed import Backend, keep_dense_weights, use_backend
from .plotting import WeightHistograms, check_plot_file, draw
from .saving import atomic_folder
from .schemes import PhaseScheme
from .streaming import NotStreamable, check_method, is_trained, pack_checkpoint

PACKAGES = {  # name: what an optional one is for
    "torch": "",
    "transformers": "",
    "accelerate": "",
    "datasets": "",
    "safetensors": "",
    "huggingface_hub": "",
    "triton": "torch.compile on a GPU",
    "peft": "adapters: pip install 'fairy2i[lora]'",
    "lm_eval": "tasks: pip install 'fairy2i[eval]'",
    "gguf": "GGUF files: pip install 'fairy2i[gguf]'",
    "matplotlib": "inspect --plot: pip install 'fairy2i[plot]'",
}
INSTRUCTION_SETS = (  # as torch.cpu.get_capabilities names them: x86, then ARM
    *("avx2", "fma3", "avx512_f", "avx512_bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16", "neon", "dot", "i8mm", "bf16", "sve", "sve2", "sme"),
)
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 131_072, 1024
SAVES_MEMORY = {  # by command: what to try on a GPU whose memory is full
    "train": "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, "
    "--gradient_checkpointing true, a shorter --block_size, a smaller --loss_chunk_tokens or --teacher_offload true",
    "eval": "a smaller batch size or --window, --dtype bfloat16 or --device cpu",
    "quantize": "a shorter --calibrate_length, --dtype bfloat16 or --device cpu",
    "generate": "--no-keep_dense, --dtype bfloat16 or --device cpu",
}
BACKENDS: dict[str, Callable[[], str | None]] = {  # what multiplies: None if it is on, or why it is off
    "reference (pure PyTorch)": lambda: None,
    "CPU kernels (cpu_exact, cpu_int8)": cpu.why_off,
    "GPU kernels (gpu)": gpu.why_off,
}


def run_train(argv: Sequence[str]) -> None:
    """Train as train/train.py does."""
    from .training.command import main  # not at the top: the Trainer takes seconds to import

    logging.getLogger(__package__).setLevel(logging.INFO)
    main(argv)


def run_eval(argv: Sequence[str]) -> None:
    """Measure perplexity as eval/eval_ppl.py does, or what the first word says."""
    from .evaluation import command, compare, tasks

    mains = {"tasks": tasks.main, "compare": compare.main}
    if argv and argv[0] in mains:
        print(mains[argv[0]](argv[1:]))
    else:
        print(command.main(argv))


def run_prepare(argv: Sequence[str]) -> None:
    """Prepare shards as train/prepare_data.py does."""
    from .training.prepare import main

    logging.getLogger(__package__).setLevel(logging.INFO)
    main(argv)


# Commands that read their own arguments: what they can be told is written where they are
FORWARDED: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (run_train, "train a model with quantization, as train/train.py"),
    "prepare": (run_prepare, "tokenize texts into shards for training, as train/prepare_data.py"),
    "eval": (run_eval, "measure perplexity; `eval tasks` accuracy, `eval compare` several models in one table"),
}


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--gguf_file", help="a GGUF file inside the model folder")
    parser.add_argument("--tokenizer", help="tokenizer, if it does not lie with the model")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="default: as in the checkpoint")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its subcommands."""
    parser = argparse.ArgumentParser(
        prog="fairy2i",
        description="Language models in one to four bits per weight. `fairy2i COMMAND --help` tells more of a command.",
        epilog="With FAIRY2I_DEBUG=1 in the environment an error shows where it comes from.",
    )
    parser.add_argument("--version", action="version", version=f"fairy2i {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, (_, text) in FORWARDED.items():
        commands.add_parser(name, help=text, add_help=False)

    quantize = commands.add_parser(
        "quantize",
        help="pack a checkpoint",
        description="Pack a QAT checkpoint as it was trained, or quantize and pack a plain one. A plain model that\n"
        "was not trained for it is of little use at one or two bits. Safetensors are packed layer by layer,\n"
        "without the whole model in memory. The output is there when it is complete, or not at all.",
        epilog="examples:\n"
        "  fairy2i quantize outputs/my-w2 my-w2-packed                           # a QAT checkpoint\n"
        "  fairy2i quantize MODEL model-w2-packed --method complex_phase_v2      # a plain one\n"
        "  fairy2i quantize MODEL model-w4-packed --calibrate my_text.txt \\\n"
        '    --method \'{"kind": "phase", "stages": 4, "granularity": "row", "scales": "learned"}\'\n'
        "  fairy2i quantize MODEL model-w2.5-packed --method fairy2i_w2 --bits 2.5 --calibrate my_text.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(quantize)
    quantize.add_argument("output", help="folder to make; an empty one may be there")
    quantize.add_argument("--method", help="method for a plain checkpoint: a name, or JSON as for train.py")
    quantize.add_argument("--skip_lm_head", action=argparse.BooleanOptionalAction, help="default: only a tied head")
    quantize.add_argument("--dequantized", action="store_true", help="write plain weights instead of packed ones")
    quantize.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="fit a plain checkpoint to a text before it is packed, without training: a file, folder or Hub data set. "
        "Never text that the model is measured on. Needs a method with learned row scales",
    )
    quantize.add_argument("--calibrate_tokens", type=int, help=f"tokens of it to use (default {CALIBRATION_TOKENS:,})")
    quantize.add_argument(
        "--calibrate_length",
        type=int,
        help=f"tokens in a sequence (default {CALIBRATION_LENGTH:,}, or the model's context where that is shorter)",
    )
    quantize.add_argument(
        "--bits",
        type=float,
        help="mean bits per weight over the quantized layers, scales counted, as 2.5: each layer gets 1 to 4 stages "
        "of the method, more where the text of --calibrate says that they lower the loss more",
    )
    quantize.add_argument("--device", help="where to calibrate (default: the GPU if there is one, else cpu)")
    quantize.set_defaults(run=run_quantize)

    inspect = commands.add_parser(
        "inspect",
        help="show what is in a quantized checkpoint",
        description="Show method, bits, use of the codes and error of each layer. The error ||w - q|| / ||w|| is\n"
        "measured against the weights of --original; without it, against the master weights of a QAT\n"
        "checkpoint. A packed checkpoint has no master weights: its error is known only beside an original.",
        epilog="examples:\n"
        "  fairy2i inspect outputs/my-w2                                     # what quantization leaves out\n"
        "  fairy2i inspect my-w2-packed --original MODEL --plot my-w2.png    # what training changed as well\n"
        "  fairy2i inspect my-w2-packed --json | jq .bits_per_weight",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(inspect)
    inspect.add_argument("--original", help="unquantized model to measure the error of each layer against")
    inspect.add_argument("--original_gguf_file", help="a GGUF file inside the folder of the original")
    inspect.add_argument("--json", action="store_true", help="print JSON, with the totals, instead of a table")
    inspect.add_argument("--plot", metavar="FILE", help="draw a picture: phases, errors, codes (.png, .pdf, .svg)")
    inspect.set_defaults(run=run_inspect)

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with any model, packed, QAT or plain, printed as it is made.",
        epilog="examples:\n"
        '  fairy2i generate my-w2-packed "Once upon a time"\n'
        '  fairy2i generate my-w2-packed --chat "What is a complex number?" --temperature 0.7\n'
        "  cat story.txt | fairy2i generate my-w2-packed - --max_new_tokens 32 --dtype float32",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(generate)
    generate.add_argument("prompt", help="text to continue; - reads it from standard input")
    generate.add_argument("--chat", action="store_true", help="let the chat template of the model frame the prompt")
    generate.add_argument("--max_new_tokens", type=int, default=128, help="tokens at most (default %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--top_p", type=float, default=0.95, help="with a temperature (default %(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="with a temperature (default %(default)s)")
    generate.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1")
    generate.add_argument(
        "--backend",
        default="auto",
        choices=PACKED_BACKENDS,
        help="what multiplies packed weights (default: cpu_exact on the CPU, gpu on an NVIDIA GPU, the reference where "
        "there are no kernels); cpu_int8 rounds activations to 8 bits and is the fastest on the CPU",
    )
    generate.add_argument(
        "--fast",
        action="store_true",
        help="on a GPU: packed weights through the GPU's kernels, a cache of fixed size, and a compiled model replayed "
        "as a CUDA graph. The first tokens take a minute or so; for long texts",
    )
    generate.add_argument(
        "--keep_dense",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where the reference multiplies, keep packed weights dequantized once they are used: the memory of an "
        "unquantized model, but many times faster than --no-keep_dense, which rebuilds each weight for each token",
    )
    generate.set_defaults(run=run_generate)

    doctor = commands.add_parser("doctor", help="show versions, hardware and backends")
    doctor.set_defaults(run=run_doctor)
    return parser


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    return load_model_and_tokenizer(args.model, gguf_file=args.gguf_file, tokenizer=args.tokenizer, dtype=args.dtype)


def run_quantize(args: argparse.Namespace) -> None:
    """Pack a checkpoint and write it: from disk to disk where that can be done, else in memory."""
    for name in ("calibrate_tokens", "calibrate_length", "device"):
        if getattr(args, name) is not None and not args.calibrate:
            raise ValueError(f"--{name} is for calibration only; give a text with --calibrate, or leave it out")
    if args.bits is not None and not args.calibrate:
        raise ValueError("--bits needs a text that says which layers matter; give one with --calibrate")
    method, report = parse_method(args.method), None
    if not (args.gguf_file or args.dequantized or args.calibrate):
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
        config = load_config(args.model, args.gguf_file)
        trained = is_trained(args.model, config)
        if trained and args.calibrate:
            raise ValueError(f"{args.model} is a QAT checkpoint and is packed as it was trained; leave out --calibrate")
        check_method(args.model, trained, method, args.skip_lm_head is not None)
        method = {} if method is None else method
        if args.bits is not None:
            check_phase_codes(method)
        if args.calibrate:
            check_learned_rows(method)
            count, length = _calibration_size(args, context_length(config))
            documents = read_documents(args.calibrate)
        model, tokenizer = _load(args)
        if args.calibrate:
            tokens = _first_tokens(documents, tokenizer, count, length)
            move_to_device(model, args.device or default_device())
        if args.bits is not None:
            some = tokens[: max(CHOICE_TOKENS // length, 1)]
            method = chosen = allocate_stages(model, some, method, args.bits, skip_lm_head=args.skip_lm_head)
            print(f"layers by stages, {args.bits:g} bits per weight at most:\n{_stages_table(chosen)}")
        report = replace_modules_for_qat(model, method, args.skip_lm_head)
        if args.calibrate:
            kept = _calibrated_blocks(args.output)
            if os.path.isdir(kept):
                print(f"going on with the blocks that are in {kept}", file=sys.stderr)
            layers = calibrate(model, tokens, keep=kept)
            before, after = (sum(getattr(layer, key) for layer in layers) / len(layers) for key in ("before", "after"))
            print(f"mean relative error of the layers' outputs: {before:.4f} rounded, {after:.4f} calibrated")
        convert_to_inference_mode(model, packed=not args.dequantized)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if args.calibrate:
        shutil.rmtree(_calibrated_blocks(args.output))
    return report


def _calibrated_blocks(output: str) -> str:
    """Return the folder beside the output for what a calibration is done with, until all of it is."""
    return os.path.realpath(os.path.expanduser(output)) + ".calibration"


def _stages_table(chosen: Mapping[str, PhaseScheme]) -> str:
    """Return how many layers have how many stages, by the last part of their names."""
    counts: dict[str, Counter[int]] = {}
    for name, scheme in chosen.items():
        counts.setdefault(name.rpartition(".")[2], Counter())[scheme.stages] += 1
    stages = sorted({scheme.stages for scheme in chosen.values()})
    rows = [[name, *(count[number] or "" for number in stages)] for name, count in counts.items()]
    return markdown_table(["stages", *map(str, stages)], rows)


def _calibration_size(args: argparse.Namespace, context: int | None) -> tuple[int, int]:
    """Return how many tokens to calibrate on, and how many are in a sequence.

    Raises:
        ValueError: one does not go with the other, or with the context of the model.
    """
    length = args.calibrate_length
    if length is None:
        length = min(CALIBRATION_LENGTH, context or CALIBRATION_LENGTH)
    if length < 1:
        raise ValueError(f"--calibrate_length must be at least 1, got {length}")
    if context and length > context:
        raise ValueError(f"--calibrate_length {length} is longer than the model's context of {context}")
    count = CALIBRATION_TOKENS if args.calibrate_tokens is None else args.calibrate_tokens
    if count < length:
        raise ValueError(f"--calibrate_tokens {count} is less than one sequence of {length}, the --calibrate_length")
    return count, length


def _first_tokens(documents: Any, tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """Return the first tokens of a text, with EOS behind each document: int64 (sequences, length)."""
    from .training.data import encode_documents  # here: it needs datasets, which packing does not

    ids: list[int] = []
    for document in documents:
        ids += encode_documents(tokenizer, [document["text"]])[0]
        if len(ids) >= count:
            break
    rows = min(len(ids), count) // length
    if rows < 1:
        raise ValueError(
            f"the text of --calibrate has {len(ids)} tokens, less than one sequence of {length}; give more text or a "
            "smaller --calibrate_length"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


def run_inspect(args: argparse.Namespace) -> None:
    """Print what is in a checkpoint."""
    if args.original_gguf_file and not args.original:
        raise ValueError("--original_gguf_file is a file in the folder of --original; give that too")
    if args.plot:
        check_plot_file(args.plot)
    model, _ = _load(args)
    original = None
    if args.original:
        original, _ = load_model_and_tokenizer(args.original, gguf_file=args.original_gguf_file, dtype=args.dtype)
    histograms = WeightHistograms()
    layers = inspect_layers(model, original, look=histograms.add if args.plot else None, progress=True)
    if not layers:
        raise ValueError(f"{args.model} has no quantized layers")
    if args.plot:
        os.makedirs(os.path.dirname(args.plot) or ".", exist_ok=True)
        draw(layers, histograms, os.path.basename(args.model.rstrip("/"))).savefig(args.plot)
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    total = {"model": args.model, **summarize(layers), "bytes_in_memory": size}
    if args.json:
        print(json.dumps({**total, "per_layer": [layer.to_dict() for layer in layers]}, indent=1))
    else:
        print(_layer_table(layers, total))


def _layer_table(layers: Sequence[LayerInfo], total: dict[str, Any]) -> str:
    """Return the table of the layers, and under it a line with the totals."""
    rows = []
    for layer in layers:
        use = " ".join(f"{share:.0%}" for share in layer.code_use)
        shape = "x".join(map(str, layer.shape))
        error = "-" if layer.error is None else f"{layer.error:.4f}"
        rows.append([layer.name, layer.method, shape, f"{layer.bits_per_weight:.4f}", use, error])
    table = markdown_table(["layer", "method", "shape", "bits", "use of the codes", "error"], rows)
    error = ""
    if total["error"] is not None:
        error = f"; error of all {total['error']:.4f} against the {total['error_against']}"
    weights = f"{total['weights']:,} weights at {total['bits_per_weight']:.4f} bits"
    size = f"{total['bytes_in_memory'] / 1e6:,.1f} MB in memory in all"
    return f"{table}\n\n{len(layers)} layers, {weights}{error}; {size}"


def named_backend(backend: Backend, device: torch.device) -> Backend:
    """Return what "auto" is on a device where that has kernels: by name, a layer that they do not take is an error."""
    if backend != "auto" or PACKED_DEFAULT != "auto":
        return backend
    if gpu.auto_takes(device):
        return "gpu"
    return "cpu_exact" if device.type == "cpu" and not cpu.why_off() else backend


def run_generate(args: argparse.Namespace) -> None:
    """Continue a prompt and print the text as it comes."""
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must not be negative, --top_p above 0 and at most 1")
    loaded, anything = _load(args)
    model: Any = loaded.eval()
    tokenizer: Any = anything
    move_to_device(model, args.device)
    backend = named_backend(args.backend, torch.device(args.device))
    fast: dict[str, Any] = {}
    if args.fast:
        if torch.device(args.device).type != "cuda":
            raise ValueError("--fast is for a GPU; leave it out, or give --device cuda")
        backend = "gpu" if backend == "auto" else backend
        # generate() compiles what decodes, with CUDA graphs, where the cache is static
        fast = {"cache_implementation": "static"}
    if backend in gpu.MODES and (reason := gpu.why_off()):
        raise ValueError(f"--backend {backend} cannot be used: {reason}")
    use_backend(model, backend)
    keep_dense_weights(model, args.keep_dense and backend not in {**cpu.MODES, **gpu.MODES})
    set_seed(args.seed)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not args.chat:
        inputs = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        raise ValueError(f"{args.model} has no chat template; leave out --chat")
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt is empty")
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    streamer = TextStreamer(tokenizer, skip_prompt=args.chat, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = {"max_new_tokens": args.max_new_tokens, "pad_token_id": pad, **sampling, **fast}
    model.generate(**inputs.to(args.device), streamer=streamer, **settings)


def run_doctor(args: argparse.Namespace) -> None:
    """Print versions, hardware and backends."""
    print(f"fairy2i {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package, use in PACKAGES.items():
        try:
            print(f"  {package:16} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package:16} not installed" + (f" ({use})" if use else ""))
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # younger than the oldest PyTorch we take
    print(f"CPU      {found.get('cpu_name', platform.processor())}, {os.cpu_count()} cores, ", end="")
    print(f"{torch.get_num_threads()} threads, PyTorch uses {torch.backends.cpu.get_cpu_capability()}")
    print("         " + (" ".join(name for name in INSTRUCTION_SETS if found.get(name)) or "instruction sets unknown"))
    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    print(f"PyTorch  built for {', '.join(f'{name} {version}' for name, version in built.items() if version) or 'CPU'}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        kind = f"compute capability {device.major}.{device.minor}"
        print(f"GPU {index}    {device.name}, {device.total_memory / 2**30:.0f} GiB, {kind}")
    if not torch.cuda.is_available():
        print("GPU      none that PyTorch can use")
    for name, why_off in BACKENDS.items():
        print(f"Backend  {name}: {f'off, {reason}' if (reason := why_off()) else 'on'}")
    if not gpu.why_off():
        for way, tokens in (("decode", "up to 16 tokens"), ("wide", "many tokens")):
            unused = None if getattr(gpu.THRESHOLDS, way) else "it is not used yet"
            state = f"off, {reason}" if (reason := gpu.why_no_cuda(way) or unused) else "on"
            print(f"         in CUDA C++, for {tokens}: {state}")
    if not cpu.why_off():
        sets = ", ".join(name if runs else f"{name} (not here)" for name, runs in cpu.instruction_sets().items())
        print(f"         CPU kernels use {cpu.instruction_set()} of {sets}; {cpu.library_path()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 after an error, 2 for a wrong command line, 130 after ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    times = "%(asctime)s " if command == "train" else ""
    logging.basicConfig(level=logging.WARNING, format=f"{times}%(message)s", datefmt="%H:%M:%S")
    set_verbosity_warning()
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        if command in FORWARDED:
            FORWARDED[command][0](argv[1:])
        else:
            args = build_parser().parse_args(argv)
            args.run(args)
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("FAIRY2I_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        if os.environ.get("FAIRY2I_DEBUG"):
            raise
        sentences = " ".join(str(error).split()).split(". ")  # what, how much, and then all that is allocated
        tip = f"; try {SAVES_MEMORY[command]}" if command in SAVES_MEMORY else ""
        print(f"error: {'. '.join(sentences[:2]).rstrip('.')}{tip}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
