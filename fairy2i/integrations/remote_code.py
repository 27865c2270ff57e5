"""What lets a checkpoint load as what it is in a program that never imported fairy2i.

transformers skips a quantization method that it does not know, with no more than a warning, and fills the layers whose
weights it misses with random numbers. So a small Python file lies beside the weights, and the `auto_map` of config.json
names it. With `trust_remote_code=True` transformers runs it when it reads the config; it imports fairy2i, which
registers the quantizer (or transformers says which package to install), and hands back the model's own config. The
`auto_map` names the config alone: every Auto class reads that first, and model, tokenizer and `architectures` stay
those of transformers. Where nobody asks for remote code the file is not looked at.
"""

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

SHIM_FILE = "modeling_fairy2i.py"
AUTO_MAP = {"AutoConfig": "modeling_fairy2i.CheckpointConfig"}  # goes into config.json as "auto_map"
SHIM = '''\
"""Lets from_pretrained(..., trust_remote_code=True) load this checkpoint, which needs the package fairy2i."""

from fairy2i.integrations.remote_code import CheckpointConfig
'''


class CheckpointConfig:
    """What the `auto_map` names: reads the config as if there were no `auto_map`; its import did the work."""

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Return the config of the model's own class, as AutoConfig.from_pretrained does (see there)."""
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)

    @staticmethod
    def register_for_auto_class(auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers calls it on remote code, to copy that again when the model is saved."""


def write_shim(folder: str | os.PathLike[str]) -> None:
    """Write the file into a folder with a config.json that has AUTO_MAP as its "auto_map"."""
    Path(folder, SHIM_FILE).write_text(SHIM, encoding="utf-8")


def has_auto_map(config: Any) -> bool:
    """Return whether a model's config has AUTO_MAP; entries that come from the Hub have an id and "--" in front."""
    auto_map = getattr(config, "auto_map", None) or {}
    return {key: value.rpartition("--")[2] for key, value in auto_map.items()} == AUTO_MAP


def add_auto_map(config: Any) -> None:
    """Give a model's config the `auto_map`, in place, unless it has one of other remote code, which has to stay."""
    if not getattr(config, "auto_map", None) or has_auto_map(config):
        config.auto_map = dict(AUTO_MAP)


def remove_auto_map(config: Any) -> None:
    """Take AUTO_MAP out of a model's config, in place."""
    if has_auto_map(config):
        del config.auto_map
