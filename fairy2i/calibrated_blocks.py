"""Blocks of a model that calibration is done with, in files, so that a run that was stopped goes on where it was.

A file for each decoder block: master weights and scales of its quantized layers, and in its header what they were made
from, settings and text, and the weights before. A file that does not fit is not used.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .qat import QATLinear

logger = logging.getLogger(__name__)


def sha256(*parts: Any) -> str:
    """Return a hash of tensors, and of other things by their JSON."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            data = part.detach().cpu().contiguous().flatten()
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(data.view(torch.uint8).numpy())
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


class CalibratedBlocks:
    """The files of one calibration.

    Args:
        folder: made at the first block; whoever has the result removes it.
        made_from: JSON-able or tensors, all that the result depends on beside the blocks: text, schemes, damping.
    """

    def __init__(self, folder: str, *made_from: Any) -> None:
        self.folder, self._origin, self._index = folder, sha256(*made_from), -1

    def next(self, block: nn.Module) -> None:
        """Go on to a block, as it is before it is calibrated: it depends on all before it."""
        self._index += 1
        self._origin = sha256(self._origin, *(part for pair in block.state_dict().items() for part in pair))

    @property
    def _path(self) -> str:
        return os.path.join(self.folder, f"block-{self._index:04}.safetensors")

    def load(self, layers: Mapping[str, QATLinear]) -> list[dict[str, Any]] | None:
        """Put what is kept of the block into its layers; return what :meth:`save` was given, None if there is none."""
        try:
            with safe_open(self._path, "pt") as file:
                about = file.metadata() or {}
                if about.get("made_from") != self._origin:
                    logger.warning("%s is of another calibration, and this block is calibrated again", self._path)
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s), and this block is calibrated again", self._path, error)
            return None
        with torch.no_grad():
            for name, layer in layers.items():
                layer.matrix.copy_(tensors[f"{name}.weight"])
                layer.group_scales.copy_(tensors[f"{name}.scales"])  # type: ignore[union-attr]
        return json.loads(about["done"])

    def save(self, layers: Mapping[str, QATLinear], done: Sequence[Any]) -> None:
        """Keep the block; the file appears whole or not at all.

        Args:
            layers: calibrated.
            done: dataclasses that :meth:`load` is to return, as dicts.

        Raises:
            OSError: the disk is full, say; the files of other blocks stay.
        """
        os.makedirs(self.folder, exist_ok=True)
        tensors = {}
        for name, layer in layers.items():
            tensors[f"{name}.weight"] = layer.matrix.detach().contiguous()
            tensors[f"{name}.scales"] = layer.group_scales.detach().contiguous()  # type: ignore[union-attr]
        about = {"made_from": self._origin, "done": json.dumps([dataclasses.asdict(entry) for entry in done])}
        partial = f"{self._path}.partial"
        try:
            save_file(tensors, partial, about)
        except SafetensorError as error:
            raise OSError(f"{partial} cannot be written: {error}") from None
        os.replace(partial, self._path)
