"""What the files of a checkpoint hold, and whether that fits a model: found out before and after transformers loads it.

transformers itself names no file that is truncated, logs a wrong shape or a tensor without a place, casts a wrong
dtype, and fills what is missing with random numbers. Here each of these is an error, for the tensors of quantized
layers. Read are the headers, the scales, and where the header has checksums (of a packed checkpoint), all bytes once.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..checksums import verify_checksums
from ..convert import linear_layers
from ..inspection import quantized_layers
from ..packed import PackedLinear
from ..schemes import Scheme

_DTYPES = {"codes": "U8", "scales": "F32"}  # of a packed layer, in the words of safetensors; a bias may be any float


class StoredTensor(NamedTuple):
    """Where a tensor of a checkpoint lies, its name there, and what its header says."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(model: Any, files: Iterable[str]) -> dict[str, StoredTensor]:
    """Return what the safetensors files among ``files`` hold, by the names that the model's class has for it.

    Raises:
        ValueError: a file is truncated, a tensor does not have its checksum, or a checksum has no tensor (names both).
    """
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    stored = {}
    named: set[str] = set()
    keys: set[str] = set()
    for file in map(str, files):
        if file.endswith(".safetensors"):
            try:
                with safe_open(file, "pt") as opened:
                    named |= verify_checksums(opened, file)
                    keys.update(opened.keys())
                    for key in opened.keys():
                        header = opened.get_slice(key)
                        name = rename_source_key(key, renamings, [])[0]
                        stored[name] = StoredTensor(file, key, header.get_dtype(), tuple(header.get_shape()))
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or damaged: {error}") from error
    if lost := sorted(named - keys):
        raise ValueError(f"{file}: the checkpoint has a checksum of {lost[0]}, but not the tensor; copy it again")
    return stored


def fit_to_model(
    model: Any, method: Mapping[str, Scheme | None], skip_modules: Iterable[str], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, Scheme | None], list[str]]:
    """Return the method and the skipped modules of a checkpoint as they are for a model that loads it.

    The layers of a backbone have other names in a model with a head on it. A model for another task lacks the head
    that the checkpoint has, and has a new one that stays plain.
    """
    names = {name for name, _, _ in linear_layers(model)}

    def here(patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
        for pattern in patterns:
            name = next((name for name in _names(model, pattern) if name in names), pattern)
            if name in names or _is_glob(pattern) or not _is_head_of_another_task(model, pattern):
                yield pattern, name

    new = []
    if _is_of_another_task(model) and hasattr(model, model.base_model_prefix):
        heads = [name for name in sorted(names) if not name.startswith(f"{model.base_model_prefix}.")]
        new = [name for name in heads if not {f"{name}.weight", f"{name}.codes"} & stored.keys()]
    return {name: method[pattern] for pattern, name in here(method)}, [*(name for _, name in here(skip_modules)), *new]


def check_stored(model: Any, stored: Mapping[str, StoredTensor]) -> set[str]:
    """Return the names of the tensors of quantized layers that are not stored; the model may know them otherwise.

    Raises:
        ValueError: a tensor of a quantized layer has another shape or dtype, scales are NaN or infinite, or there are
            codes or learned scales of a layer that the model does not have so (names file and tensor).
    """
    layers = quantized_layers(model)
    packed = any(isinstance(layer, PackedLinear) for layer in layers.values())
    expected = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in _state(layer).items()}
    last = ".codes" if packed else ".scales"
    absent, homeless = set(expected), []
    for key, (file, stored_key, dtype, shape) in stored.items():
        name = next((name for name in _names(model, key) if name in expected), None)
        if name is None:
            if key.endswith(last) and not _is_head_of_another_task(model, key):
                homeless.append(key)
            continue
        absent.discard(name)
        kind = name.rpartition(".")[2]
        if not packed and kind != "scales":
            continue  # transformers checks weights, and may be told to leave out those that do not fit
        wanted = _DTYPES.get(kind, dtype) if packed else dtype
        if (dtype, shape) != (wanted, tuple(expected[name].shape)):
            raise ValueError(
                f"{file}: {stored_key} is {dtype} {shape}, expected {wanted} {tuple(expected[name].shape)}"
            )
        if kind == "scales":
            with safe_open(file, "pt") as opened:
                _check_finite(f"{file}: {stored_key}", opened.get_tensor(stored_key))
    # whoever renames tensors with a key_mapping gives each its place: then there are as many as layers
    if homeless and sum(key.endswith(last) for key in stored) > sum(key.endswith(last) for key in expected):
        what = "packed layer" if packed else "layer with learned scales"
        tensor = stored[homeless[0]]
        layer_name = homeless[0].removesuffix(last)
        raise ValueError(f"{tensor.file}: {tensor.key} has no place, the model has no {what} {layer_name}")
    return absent


def check_loaded(model: Any, absent: set[str]) -> None:
    """Check that the tensors of quantized layers which no file names were loaded nevertheless.

    Raises:
        ValueError: a tensor was not loaded (names it and what was expected), or its scales are NaN or infinite.
    """
    for name, layer in quantized_layers(model).items():
        for key, tensor in _state(layer).items():
            if f"{name}.{key}" not in absent:
                continue
            if not getattr(tensor, "_is_hf_initialized", False):
                what = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"the checkpoint has no {name}.{key}, expected {what}")
            if key == "scales":
                _check_finite(f"{name}.{key}", tensor)


def _state(layer: nn.Module) -> dict[str, Tensor]:
    return layer.state_dict(keep_vars=True)


def _check_finite(name: str, scales: Tensor) -> None:
    if not torch.isfinite(scales).all():
        raise ValueError(f"{name} has NaN or infinite entries; the checkpoint is damaged")


def _names(model: Any, name: str) -> tuple[str, str, str]:
    """Return the names that something may have here or in a checkpoint: as it is, with the backbone's prefix, without.

    transformers takes each for the same tensor when it loads a backbone into a model with a head, or the other way.
    """
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _is_of_another_task(model: Any) -> bool:
    """Whether the checkpoint was saved from another class, so that either may have a head that the other lacks."""
    known = getattr(model.config, "architectures", None) or [type(model).__name__]
    return type(model).__name__ not in known


def _is_head_of_another_task(model: Any, name: str) -> bool:
    """Whether a name in a checkpoint that was saved from another class is a head's: not in the backbone's layers."""
    backbone = getattr(model, model.base_model_prefix, model)
    parts = name.removeprefix(f"{model.base_model_prefix}.").split(".")
    in_layers = parts[0] in dict(backbone.named_children()) and any(part.isdigit() for part in parts)
    return _is_of_another_task(model) and not in_layers


def _is_glob(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")
