"""`fairy2i eval`, which is eval/eval_ppl.py: perplexity of a model on texts, by method, as a table and as JSON."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
import transformers

from .._version import __version__
from ..loading import parse_method
from .models import OpenModel, fingerprint, one_model_parser, open_model
from .perplexity import PROTOCOLS, make_windows, measure
from .table import markdown_table, number
from .texts import EvalText, load_eval_text

DESCRIPTION = """Measure perplexity.

  fairy2i eval --model MODEL                                     # WikiText-2 and C4, as the model is
  fairy2i eval --model MODEL --quant_method none bitnet complex_phase_v2   # quantized on the fly
  fairy2i eval --model outputs/qat --data my_text.jsonl --protocol gptq fairy2i --window 1024
  fairy2i eval --model MODEL --data wikitext2=wiki.test.raw c4=c4-validation.00000-of-00008.json.gz

and elsewhere:  fairy2i eval tasks --help      # accuracy on ARC, HellaSwag, PIQA, WinoGrande, BoolQ, OpenBookQA
                fairy2i eval compare --help    # several models or methods in one table and a picture

A QAT or packed checkpoint is measured as it was trained. Quantizing a model on the fly that was not trained for it
gives noise: that is the point of training. `accelerate` is of no use here: it is one process. What the protocols are:
docs/evaluation.md."""


DATA = ["wikitext2", "c4"]  # measured on where nothing is said


def add_perplexity_arguments(parser: argparse.ArgumentParser, data: Sequence[str] | None, default: str) -> None:
    """Add the arguments that measure_texts reads; ``default`` says in words what ``data`` is."""
    parser.add_argument(
        "--data",
        nargs="*",
        default=None if data is None else list(data),
        help="wikitext2, c4 (from the Hub), wikitext2=FILE, c4=FILE (local copies of these), any files, Hub data sets; "
        f"default: {default}",
    )
    parser.add_argument("--protocol", nargs="+", default=["gptq"], choices=list(PROTOCOLS), help="default: %(default)s")
    parser.add_argument("--window", type=int, default=2048, help="tokens in a window (default %(default)s)")
    parser.add_argument("--stride", type=int, help="protocol strided: from window to window (default: half of one)")
    parser.add_argument("--max_windows", type=int, help="measure on the first so many windows only")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = one_model_parser("fairy2i eval", DESCRIPTION)
    add_perplexity_arguments(parser, DATA, " ".join(DATA))
    parser.add_argument("--batch_size", type=int, default=1, help="windows at a time (default %(default)s)")
    return parser.parse_args(argv)


def measure_text(opened: OpenModel, text: EvalText, protocol: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the perplexity of one model on one text by one protocol, JSON-able.

    Args:
        opened, text, protocol: what to measure.
        args: has ``window``, ``stride``, ``max_windows`` and ``batch_size``.

    Raises:
        ValueError: the protocol cannot be applied; the message says what to change.
    """
    windows = make_windows(
        protocol, text, opened.tokenizer, args.window, stride=args.stride, max_windows=args.max_windows
    )
    result = measure(opened.model, windows, args.batch_size)
    documents = {}
    if windows.documents is not None:
        names = ("documents", "dropped_documents", "dropped_tokens")
        documents = {name: getattr(windows, name) for name in names}
    return {
        "data": text.name,
        "data_sha256": data_sha256(text, protocol),
        **result.to_dict(),
        "stride": windows.stride,
        "max_windows": args.max_windows,
        "bits_per_byte": result.bits_per_byte(windows),
        **documents,
    }


def data_sha256(text: EvalText, protocol: str) -> str:
    """Return the hash of what a protocol takes of a text: the joined text, or its documents one by one."""
    return text.documents_sha256 if protocol == "fairy2i" else text.sha256


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers of a run may depend on beside model and data, JSON-able."""
    found = {"fairy2i": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("datasets", "lm_eval", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    where: dict[str, Any] = {"dtype": args.dtype, "device": args.device_map or args.device}
    where["batch_size"] = getattr(args, "batch_size", None) or args.task_batch_size
    return {**where, "python": platform.python_version(), **found}


def write_json(path: str, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(f"{path}.part", path)


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one result for each method, text and protocol.

    Raises:
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    for method in args.quant_method:  # errors first, then the work
        parse_method(method)
    texts = [load_eval_text(source) for source in args.data]
    if not texts:
        raise ValueError("--data names no text to measure on")
    results = []
    sha256 = fingerprint(args.model, args.gguf_file, args.tokenizer)
    for method in args.quant_method:
        opened = open_model(args.model, method, args)
        if opened.trained and args.quant_method != ["none"]:
            raise ValueError(f"{args.model} is quantized already ({opened.method}); leave out --quant_method")
        about = {"model": args.model, "model_sha256": sha256, **opened.about()}
        for text in texts:
            results += [{**about, **measure_text(opened, text, protocol, args)} for protocol in args.protocol]
    return results


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Return results of :func:`measure_all` as a Markdown table."""
    rows = []
    for r in results:
        error = "-" if r["standard_error"] is None else f"{r['standard_error']:.4f}"
        per_byte = "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
        model, data = os.path.basename(r["model"].rstrip("/")), os.path.basename(r["data"])
        shown = number(r["perplexity"])
        rows.append([model, r["method"], data, r["protocol"], r["window"], shown, error, per_byte])
    header = ["model", "method", "data", "protocol", "window", "perplexity", "± (nats)", "bits per byte"]
    notes = [
        f"{os.path.basename(r['data'])}: {r['dropped_documents']:,} of {r['documents'] + r['dropped_documents']:,} "
        f"documents ({r['dropped_tokens']:,} tokens) dropped, longer than the window"
        for r in results
        if r.get("dropped_documents")
    ]
    return "\n".join([markdown_table(header, rows), *dict.fromkeys(notes)])


def main(argv: Sequence[str]) -> str:
    """Measure as the command line says, write the JSON file if it asks for one; return the table to show.

    Raises:
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    args = parse_args(argv)
    results = measure_all(args)
    if args.output:
        write_json(args.output, {"settings": settings(args), "results": results})
    return results_table(results)
