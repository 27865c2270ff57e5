"""`fairy2i eval`, which is eval/eval_ppl.py: perplexity of a model on texts, by method, as a table and as JSON."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from .._version import __version__
from ..convert import convert_to_inference_mode, replace_modules_for_qat
from ..inspection import model_bits_per_weight, quantized_layers
from ..loading import load_model_and_tokenizer, parse_method
from ..qat import QATLinear
from ..schemes import method_name
from .perplexity import load_eval_text, perplexity, tokenize_text
from .table import markdown_table, number

DESCRIPTION = """Measure perplexity.

  fairy2i eval --model MODEL                                     # WikiText-2 and C4, as the model is
  fairy2i eval --model MODEL --quant_method none bitnet complex_phase_v2   # quantized on the fly
  fairy2i eval --model outputs/qat --data my_text.txt --window 1024 --max_windows 128

A QAT or packed checkpoint is measured as it was trained. Quantizing a model on the fly that was not trained for it
gives noise: that is the point of training. `accelerate` is of no use here: it is one process."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="fairy2i eval", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--gguf_file", help="a GGUF file inside the model folder")
    parser.add_argument("--tokenizer", help="tokenizer, if it does not lie with the model")
    parser.add_argument("--quant_method", nargs="+", default=["none"], help="methods to measure, 'none': as it is")
    parser.add_argument("--skip_lm_head", action=argparse.BooleanOptionalAction, help="default: only a tied head")
    parser.add_argument("--data", nargs="+", default=["wikitext2", "c4"], help="wikitext2, c4, files, Hub data sets")
    parser.add_argument("--window", type=int, default=2048, help="tokens in a window (default %(default)s)")
    parser.add_argument("--max_windows", type=int, help="measure on the first so many windows only")
    parser.add_argument("--batch_size", type=int, default=1, help="windows at a time (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="write the results to this JSON file")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one result for each method and text.

    Raises:
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    methods = [(name, parse_method(name)) for name in args.quant_method]  # errors first, then the work
    texts = [load_eval_text(source) for source in args.data]
    results = []
    for name, method in methods:
        model, tokenizer = load_model_and_tokenizer(
            args.model, gguf_file=args.gguf_file, tokenizer=args.tokenizer, dtype=getattr(torch, args.dtype)
        )
        model.to(args.device)  # quantizing is faster there
        layers = quantized_layers(model)
        trained = ", ".join(sorted({method_name(layer.scheme) for layer in layers.values()}))
        if layers and args.quant_method != ["none"]:
            raise ValueError(f"{args.model} was trained with {trained}; leave out --quant_method")
        if method is not None:
            replace_modules_for_qat(model, method, args.skip_lm_head)
        bits = model_bits_per_weight(model) or None
        if any(isinstance(m, QATLinear) for m in model.modules()):
            convert_to_inference_mode(model, packed=False)  # the same outputs, and no window quantizes anew
        for text in texts:
            tokens = tokenize_text(text.text, tokenizer)
            result = perplexity(model, tokens, args.window, args.max_windows, args.batch_size)
            results.append(
                {
                    "model": args.model,
                    "method": f"trained: {trained}" if layers else name,
                    "bits_per_weight": bits,
                    "data": text.name,
                    "data_sha256": text.sha256,
                    **result.to_dict(),
                }
            )
    return results


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Return results of :func:`measure` as a Markdown table."""
    rows = []
    for r in results:
        error = "-" if r["standard_error"] is None else f"{r['standard_error']:.4f}"
        model, data = os.path.basename(r["model"].rstrip("/")), os.path.basename(r["data"])
        rows.append([model, r["method"], data, r["protocol"], r["window"], number(r["perplexity"]), error])
    return markdown_table(["model", "method", "data", "protocol", "window", "perplexity", "± (nats)"], rows)


def main(argv: Sequence[str]) -> str:
    """Measure as the command line says, write the JSON file if it asks for one; return the table to show.

    Raises:
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    args = parse_args(argv)
    results = measure(args)
    if args.output:
        versions = {"fairy2i": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        settings = {"dtype": args.dtype, "device": args.device, "python": platform.python_version(), **versions}
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"settings": settings, "results": results}, file, indent=1)
    return results_table(results)
