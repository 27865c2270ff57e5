"""`fairy2i train`, which is train/train.py: settings from flags and a YAML file to one training run."""

import argparse
import difflib
import json
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..loading import read_yaml
from .trainer import QATArguments, QATTrainingArguments, run_training

DESCRIPTION = """Train a model with quantization.

  fairy2i train --model MODEL --data TEXT --quant_method complex_phase_v2 --max_steps 300
  fairy2i train --config configs/train/demo.yaml --data my_text.txt

One process trains on the GPU if there is one, and on the CPU otherwise. For several, let accelerate start them; all
that follows is the same:

  accelerate launch train/train.py --config configs/train/demo.yaml      (in a clone)
  accelerate launch -m fairy2i train --config my_config.yaml             (wherever it is installed)

Settings come from the YAML file of --config, if any, and then from the flags, which win. Besides the flags of this
command all of transformers.TrainingArguments can be set. The result is a Hugging Face checkpoint in --output_dir that
`from_pretrained` loads back as a QAT model, given `import fairy2i`. `fairy2i quantize` packs it."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and the description as it is written."""


def yaml_to_flags(path: str, known: Sequence[str]) -> list[str]:
    """Turn a YAML mapping into command-line flags, so that both are checked and converted alike.

    Raises:
        ValueError: the file is not YAML or no mapping, or has a setting that is not among the ``known``.
        OSError: the file cannot be read.
    """
    settings: dict[str, Any] = read_yaml(path) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of names to values")
    flags: list[str] = []
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{path}: unknown setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        if value is None or value == []:
            continue
        if value is False and name.endswith("_strategy"):
            value = "no"  # what YAML reads as false where it is not quoted
        nested = isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], list))
        values = [json.dumps(value)] if nested else value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def parse_args(argv: Sequence[str]) -> tuple[QATArguments, QATTrainingArguments]:
    """Read the command line and the file of --config.

    Raises:
        ValueError: a setting is unknown or has an impossible value.
        OSError: the file of --config cannot be read.
    """
    parser = HfArgumentParser(
        (QATArguments, QATTrainingArguments),  # type: ignore[arg-type]
        prog="fairy2i train",
        usage="fairy2i train [--config FILE] --model MODEL --data TEXT [--quant_method METHOD] [--name value ...]",
        description=DESCRIPTION.replace("%", "%%"),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.type is string_to_bool:  # where None is the default, the parser wants a value: --bf16 is --bf16 true
            action.nargs, action.const = "?", True
    parser.add_argument("--config", help="YAML file with settings, the same names as the flags.")
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    config = only_config.parse_known_args(argv)[0].config
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    flags = yaml_to_flags(config, known) if config else []
    qat, training, _ = parser.parse_args_into_dataclasses([*flags, *argv], look_for_args_file=False)
    return qat, training


def main(argv: Sequence[str]) -> dict[str, float]:
    """Train as the command line says; return the metrics.

    Raises:
        ValueError, OSError: an argument is missing or wrong; the message says what to give instead.
    """
    return run_training(*parse_args(argv))
