"""Measure perplexity.

    python eval/eval_ppl.py --model MODEL                                     # WikiText-2 and C4, as the model is
    python eval/eval_ppl.py --model MODEL --quant_method none bitnet complex_phase_v2   # quantized on the fly
    python eval/eval_ppl.py --model outputs/qat --data my_text.txt --window 1024 --max_windows 128

A QAT checkpoint is measured as it was trained. Quantizing a model on the fly that was not trained for it gives noise:
that is the point of training.
"""

import argparse
import json
import logging
import os
import platform
import sys

import torch
import transformers
from transformers.utils.logging import set_verbosity_warning

import fairy2i
from fairy2i import QATLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.evaluation.perplexity import load_eval_text, perplexity, tokenize_text
from fairy2i.evaluation.table import markdown_table, number
from fairy2i.inspection import model_bits_per_weight, quantized_layers
from fairy2i.loading import load_model_and_tokenizer, parse_method
from fairy2i.schemes import method_name


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def main(args: argparse.Namespace) -> None:
    methods = [(name, parse_method(name)) for name in args.quant_method]  # errors first, then the work
    texts = [load_eval_text(source) for source in args.data]
    results = []
    for name, method in methods:
        model, tokenizer = load_model_and_tokenizer(
            args.model, gguf_file=args.gguf_file, tokenizer=args.tokenizer, dtype=getattr(torch, args.dtype)
        )
        layers = quantized_layers(model)
        trained = ", ".join(sorted({method_name(layer.scheme) for layer in layers.values()}))
        if layers and args.quant_method != ["none"]:
            raise ValueError(f"{args.model} was trained with {trained}; leave out --quant_method")
        if method is not None:
            replace_modules_for_qat(model, method, args.skip_lm_head)
        bits = model_bits_per_weight(model) or None
        if any(isinstance(m, QATLinear) for m in model.modules()):
            convert_to_inference_mode(model, packed=False)  # the same outputs, and no window quantizes anew
        model.to(args.device)
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
    header = ["model", "method", "data", "protocol", "window", "perplexity", "± (nats)"]
    rows = []
    for r in results:
        names = [os.path.basename(args.model.rstrip("/")), r["method"], os.path.basename(r["data"]), r["protocol"]]
        rows.append(
            [
                *names,
                r["window"],
                number(r["perplexity"]),
                "-" if r["standard_error"] is None else f"{r['standard_error']:.4f}",
            ]
        )
    print(markdown_table(header, rows))
    if args.output:
        versions = {module.__name__: module.__version__ for module in (fairy2i, torch, transformers)}
        settings = {"dtype": args.dtype, "device": args.device, "python": platform.python_version(), **versions}
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"settings": settings, "results": results}, file, indent=1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_verbosity_warning()
    try:
        main(parse_args(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
