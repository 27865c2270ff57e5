"""Train a model with quantization.

    accelerate launch train/train.py --config configs/train/demo.yaml
    accelerate launch train/train.py --model MODEL --data TEXT --quant_method complex_phase_v2 --max_steps 300

Settings come from the YAML file of --config, if any, and then from the flags, which win. Besides the flags of this
script all of transformers.TrainingArguments can be set. The result is a Hugging Face checkpoint in --output_dir that
`from_pretrained` loads back as a QAT model, given `import fairy2i`.
"""

import argparse
import difflib
import json
import logging
import sys
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.utils.logging import set_verbosity_warning

from fairy2i.training.trainer import QATArguments, QATTrainingArguments, run_training


def yaml_to_flags(path: str, known: list[str]) -> list[str]:
    """Turn a YAML mapping into command-line flags, so that both are checked and converted alike."""
    with open(path, encoding="utf-8") as file:
        settings: dict[str, Any] = yaml.safe_load(file) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of names to values")
    flags: list[str] = []
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{path}: unknown setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(
        (QATArguments, QATTrainingArguments), description=__doc__.replace("%", "%%"), allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file with settings, the same names as the flags.")
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    config = only_config.parse_known_args(argv)[0].config
    try:
        known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
        flags = yaml_to_flags(config, known) if config else []
        qat, training, _ = parser.parse_args_into_dataclasses(flags + argv, look_for_args_file=False)
        run_training(qat, training)
    except (ValueError, OSError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    set_verbosity_warning()
    main(sys.argv[1:])
