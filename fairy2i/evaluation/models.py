"""Models as they are measured: opened, quantized on the fly where that is asked for, and known by their contents."""

import argparse
import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..convert import convert_to_inference_mode, replace_modules_for_qat
from ..inspection import model_bits_per_weight, quantized_layers
from ..loading import DTYPES, default_device, load_model_and_tokenizer, move_to_device, parse_method
from ..packed import keep_dense_weights
from ..qat import QATLinear
from ..schemes import method_name
from ..streaming import find_model

WEIGHTS = (".safetensors", ".gguf", ".bin")
FULL_BITS = 16  # what an unquantized tensor takes where models are published


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to be measured.

    Attributes:
        model, tokenizer: as transformers loads them; QAT layers have become plain ones with the quantized weight.
        method: "none", a method quantized on the fly, or "trained: " and what the checkpoint says.
        schemes: the methods of the quantized layers in full, each with the number of its layers.
        bits_per_weight: true bits of the quantized layers, scales counted; None without any.
        packed_bytes: the weights of the model as a packed checkpoint in 16 bits: codes, scales, and all else.
    """

    model: Any
    tokenizer: Any
    method: str
    schemes: list[dict[str, Any]]
    bits_per_weight: float | None
    packed_bytes: int

    @property
    def trained(self) -> bool:
        """Is it a checkpoint that was quantized before?"""
        return self.method.startswith("trained: ")

    def about(self) -> dict[str, Any]:
        """Return what it is, JSON-able."""
        return {
            "method": self.method,
            "scheme": self.schemes,
            "bits_per_weight": self.bits_per_weight,
            "packed_bytes": self.packed_bytes,
        }


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that open_model reads, except the model itself."""
    parser.add_argument("--gguf_file", help="a GGUF file inside the model folder")
    parser.add_argument("--tokenizer", help="tokenizer, if it does not lie with the model")
    parser.add_argument("--skip_lm_head", action=argparse.BooleanOptionalAction, help="default: only a tied head")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--device_map", help="spread a large model: auto, balanced, sequential; instead of --device")
    parser.add_argument(
        "--keep_dense",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep packed weights dequantized once they are used: faster, in the memory of an unquantized model",
    )


def one_model_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with what all commands read that measure one model by several methods."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--quant_method", nargs="+", default=["none"], help="methods to measure, 'none': as it is")
    parser.add_argument("--output", help="write the results to this JSON file")
    add_model_arguments(parser)
    return parser


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, quantized layers packed, all else in 16 bits, shared ones once."""
    layers = quantized_layers(model)
    bits, own = 0.0, set()
    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        bits += layer.scheme.bits_per_weight(*shape) * math.prod(shape)
        own |= {f"{name}.{part}" for part, _ in layer.named_parameters(recurse=False) if part != "bias"}
    rest = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in own)
    return round((bits + rest * FULL_BITS) / 8)


def open_model(source: str, method: str, args: argparse.Namespace) -> OpenModel:
    """Load a model, quantize it on the fly where asked, and make it ready to be measured.

    Args:
        source: a folder or a Hub id.
        method: as parse_method takes it, "none" for the model as it is.
        args: has what add_model_arguments adds.

    Raises:
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    wanted = parse_method(method)
    model, tokenizer = load_model_and_tokenizer(
        source,
        gguf_file=args.gguf_file,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device_map=args.device_map,
    )
    if not args.device_map:
        move_to_device(model, args.device)  # quantizing is faster there
    trained = ", ".join(sorted({method_name(layer.scheme) for layer in quantized_layers(model).values()}))
    if trained and wanted is not None:
        raise ValueError(f"{source} is quantized already (trained: {trained}); leave out --quant_method")
    if wanted is not None:
        replace_modules_for_qat(model, wanted, args.skip_lm_head)
    layers = quantized_layers(model).values()
    counts = Counter(layer.scheme for layer in layers)
    schemes = [{**scheme.to_dict(), "layers": count} for scheme, count in counts.items()]
    bits, size = model_bits_per_weight(model), packed_bytes(model)
    if any(isinstance(layer, QATLinear) for layer in layers):
        convert_to_inference_mode(model, packed=False)  # the same outputs, and no window quantizes anew
    keep_dense_weights(model, args.keep_dense)
    label = f"trained: {trained}" if trained else method
    return OpenModel(model.eval(), tokenizer, label, schemes, bits or None, size)


def weight_files(source: str, gguf_file: str | None = None) -> list[str]:
    """Return the paths of the files with a local model's weights; none for a Hub id."""
    folder = find_model(source)
    if not os.path.isdir(folder):
        return []
    if gguf_file:
        return [os.path.join(folder, gguf_file)]
    names = sorted(name for name in os.listdir(folder) if name.endswith(WEIGHTS))
    kinds = {os.path.splitext(name)[1] for name in names}
    best = next((kind for kind in WEIGHTS if kind in kinds), "")  # as transformers chooses
    return [os.path.join(folder, name) for name in names if name.endswith(best or WEIGHTS)]


def fingerprint(source: str, gguf_file: str | None = None, tokenizer: str | None = None) -> str:
    """Return a hash of what a model answers by: its weights, config and tokenizer files; of a Hub id, the id.

    Raises:
        FileNotFoundError: the model, or the GGUF file in it, is not there.
    """
    files = weight_files(source, gguf_file)
    whole = hashlib.sha256()
    if not files:
        whole.update(source.encode())
    for folder, wanted in ((find_model(source), ("config.json",)), (find_model(tokenizer or source), ("tokenizer",))):
        if os.path.isdir(folder):
            files += [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if n.startswith(wanted)]
        else:
            whole.update(folder.encode())
    for path in files:
        whole.update(os.path.basename(path).encode() + bytes.fromhex(file_sha256(path)))
    return whole.hexdigest()


def file_sha256(path: str) -> str:
    """Return the hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
