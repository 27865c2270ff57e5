"""Pack a checkpoint from disk to disk, layer by layer: the model is never in memory as a whole.

The model is first built without weights, on the "meta" device, by from_pretrained itself, and converted there by the
same functions as a model with weights. So transformers and :mod:`fairy2i.convert` decide all that there is to decide:
names, dtypes, ties, which layers are quantized and how, what config.json says. What is left to do here is to read one
tensor after the other, to pack each layer through PackedLinear.from_qat, and to write a file when it is full. The
result is the checkpoint that loading, converting and saving in memory would give, tensor by tensor.

In memory at any time: what quantizing one layer needs, and the tensors of one output file. The largest layer counts, as
a rule an output head: 20 bytes per weight for two stages with mean scales, 8 to 30 for the other named methods, up to
50 for scales that are fitted.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from .checksums import checksum_metadata, sort_metadata
from .convert import ConversionReport, Method, convert_to_inference_mode, replace_modules_for_qat
from .packed import PackedLinear
from .qat import QATLinear
from .saving import atomic_folder

TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)


class NotStreamable(ValueError):
    """The checkpoint cannot be read tensor by tensor: load it with from_pretrained and convert it in memory."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}; load it with from_pretrained and convert it in memory")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: str
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Read it; the file is mapped only as long as the result lives."""
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(self.key)


def pack_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    method: Method | None = None,
    *,
    skip_lm_head: bool | None = None,
    skip_modules: Iterable[str] = (),
    dtype: torch.dtype | str = "auto",
    tokenizer: str | None = None,
    max_shard_size: int | str = "1GB",
) -> ConversionReport:
    """Pack a checkpoint on disk into a packed checkpoint on disk, layer by layer.

    Tensors and config.json are those of from_pretrained, convert_to_inference_mode and save_pretrained, bit for bit;
    tokenizer files and chat templates are copied. The output appears when it is complete, or not at all
    (:mod:`fairy2i.saving`).

    Args:
        source: a folder with a config.json and safetensors, in one file or with an index; or a Hub id.
        output: folder to make.
        method: None for a QAT checkpoint, which is packed as it was trained. For a plain one, what
            replace_modules_for_qat takes; scales that the scheme learns stay at their first fit.
        skip_lm_head, skip_modules: as for replace_modules_for_qat; for a plain checkpoint only.
        dtype: dtype of the weights as from_pretrained takes it; "auto" is that of the checkpoint.
        tokenizer: folder or Hub id of the tokenizer, if it does not lie with the model.
        max_shard_size: largest size of an output file, in bytes or as "1GB". A single larger tensor has its own file.

    Returns:
        The report of the conversion.

    Raises:
        FileExistsError: ``output`` is not empty.
        FileNotFoundError: ``source`` or a file of it is not there.
        NotStreamable: there are no safetensors, or transformers stores the tensors in another way than it uses them.
        ValueError: a method for a QAT checkpoint, none for a plain one, or an unknown one; a source that is packed
            already; a missing tensor, damaged file, wrong shape; NaN or infinite weights (names tensor and file).
    """
    with atomic_folder(output) as folder:
        source = _local_folder(os.fspath(source))
        files = _read_headers(source)
        model, trained = _skeleton(source, dtype)
        skip_modules = [skip_modules] if isinstance(skip_modules, str) else list(skip_modules)
        check_method(source, trained, method, skip_lm_head is not None or bool(skip_modules))
        stored = _locate(model, files)
        report = replace_modules_for_qat(model, {} if method is None else method, skip_lm_head, skip_modules)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QATLinear)}
        convert_to_inference_mode(model)

        with _without_bars():
            model.save_pretrained(folder, state_dict={})  # all but the weights
        _write_weights(model, layers, stored, folder, max_shard_size)
        if tokenizer is None:
            _copy_tokenizer(source, folder)
        else:
            AutoTokenizer.from_pretrained(os.path.expanduser(tokenizer)).save_pretrained(folder)
    return report


def is_trained(source: str, config: Any) -> bool:
    """Return whether a config is that of a QAT checkpoint, and not of a plain one.

    Raises:
        ValueError: of neither: the model is packed already, or quantized by something else.
    """
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    kind = quantization.get("quant_method")
    if quantization and kind != "fairy2i":
        raise ValueError(f"{source} is already quantized by {kind}; get it in full precision (bfloat16) first")
    if quantization.get("mode") == "packed":
        raise ValueError(f"{source} is packed already")
    return bool(quantization)


def check_method(source: str, trained: bool, method: Method | None, skips: bool = False) -> None:
    """Raise unless a plain checkpoint comes with a method, and a QAT checkpoint without: it has its own.

    Raises:
        ValueError: says which of the two.
    """
    if trained and (method is not None or skips):
        raise ValueError(f"{source} is a QAT checkpoint and is packed as it was trained; leave out method and skips")
    if not trained and method is None:
        raise ValueError(f"{source} is not a QAT checkpoint; give a method to quantize it without training")


# The source


def find_model(source: str) -> str:
    """Return the path of a model folder with "~" filled in; a Hub id comes back as it is.

    Raises:
        FileNotFoundError: ``source`` looks like a local path and is not there.
    """
    path = os.path.expanduser(source)
    if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not os.path.isdir(path):
        raise FileNotFoundError(f"there is no model folder {path}; give a folder with a config.json or a Hub id")
    return path


def _local_folder(source: str) -> str:
    """Return the folder of a source; of a Hub id, after downloading the files that are needed and no others."""
    folder = find_model(source)
    if os.path.isdir(folder):
        return folder
    folder = snapshot_download(source, allow_patterns=["*.json", *TOKENIZER_FILES])
    return snapshot_download(source, allow_patterns=_weight_files(folder) or [SAFE_WEIGHTS_NAME])


def _weight_files(folder: str) -> list[str]:
    """Return the names of the safetensors files of a checkpoint; none if it has no such files."""
    if os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_NAME)):
        return [SAFE_WEIGHTS_NAME]
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not os.path.isfile(index):
        return []
    try:
        with open(index, encoding="utf-8") as file:
            return sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error


def _read_headers(folder: str) -> dict[str, _Stored]:
    """Return all tensors of a checkpoint by name; reads headers only, which also finds a truncated file."""
    found: dict[str, _Stored] = {}
    names = _weight_files(folder)
    if not names:
        if gguf := sorted(name for name in os.listdir(folder) if name.endswith(".gguf")):
            raise ValueError(f"{folder} has GGUF weights; name the file, gguf_file={gguf[0]!r}, to load it in memory")
        raise NotStreamable(f"{folder} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is not there, but {SAFE_WEIGHTS_INDEX_NAME} names it; copy it again")
        try:
            with safe_open(path, "pt") as opened:
                found |= {key: _Stored(path, key, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}); copy it again") from error
    return found


def _skeleton(folder: str, dtype: torch.dtype | str) -> tuple[Any, bool]:
    """Return the model as from_pretrained would load it, on "meta", and whether it is a QAT model."""
    trained = is_trained(folder, AutoConfig.from_pretrained(folder))
    with _without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map="meta",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _locate raises, and names the file
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ValueError(f"{folder} has no {some}; the checkpoint is incomplete or of another kind of model")
    return model, trained


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing progress where it has no weights to move."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _locate(model: Any, files: dict[str, _Stored]) -> dict[str, _Stored]:
    """Return where each tensor of the model is stored, by its name in the model; ties what the checkpoint has twice."""
    prefix = f"{model.base_model_prefix}."
    state = model.state_dict(keep_vars=True)
    found: dict[str, _Stored] = {}
    for name in state:
        keys = (_saved_name(model, name), name, name.removeprefix(prefix), prefix + name)
        if (key := next((key for key in keys if key in files), None)) is not None:
            found[name] = files[key]
    if _twice(model, found):
        model.tie_weights()
        state = model.state_dict(keep_vars=True)
    by_parameter = {id(state[name]): stored for name, stored in found.items()}
    for name, tensor in state.items():
        if id(tensor) not in by_parameter:
            raise NotStreamable(f"the checkpoint stores {name} under another name or in parts")
        stored = found.setdefault(name, by_parameter[id(tensor)])
        if stored.shape != tuple(tensor.shape):
            raise ValueError(f"{stored.file}: {stored.key} has shape {stored.shape}, expected {tuple(tensor.shape)}")
    return found


def _saved_name(model: Any, name: str) -> str:
    """Return the name under which save_pretrained stores a tensor of the model: that of the checkpoint it came from."""
    conversions = getattr(model, "_weight_conversions", None) or []
    if not all(isinstance(conversion, WeightRenaming) for conversion in conversions):
        raise NotStreamable(f"transformers fuses or splits tensors of {type(model).__name__} when it loads them")
    return next(iter(revert_weight_conversion(model, {name: torch.empty(0, device="meta")})))


def _twice(model: Any, found: dict[str, _Stored]) -> bool:
    """Whether tensors that should be tied are stored twice: from_pretrained then compares them, which "meta" cannot."""
    state, twice = model.state_dict(keep_vars=True), False
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if one in found and other in found and state[one] is not state[other]:
            # the first transformers of version 5 never tie them
            if one not in model.all_tied_weights_keys or not torch.equal(found[one].read(), found[other].read()):
                raise NotStreamable(f"the config ties {one} to {other}, but the checkpoint has two tensors")
            twice = True
    return twice


# The output


def _write_weights(
    model: Any, layers: dict[str, QATLinear], stored: dict[str, _Stored], folder: str, max_shard_size: int | str
) -> None:
    """Write the weights of a packed model on "meta", each file as soon as its tensors are there."""
    state = model.state_dict(keep_vars=True)
    for ignored in model._keys_to_ignore_on_save or ():
        state.pop(ignored, None)
    parameters: dict[str, Tensor] = {name: tensor for name, tensor in state.items() if isinstance(tensor, nn.Parameter)}
    for tied in parameters.keys() - remove_tied_weights_from_state_dict(parameters.copy(), model).keys():
        del state[tied]
    names = {_saved_name(model, name): name for name in state}
    split = split_torch_state_dict_into_shards(
        {key: state[name] for key, name in names.items()},
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    need, free = split.metadata["total_size"], shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"no room: the packed weights need {need / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left")
    tensors = _tensors(state, layers, stored)
    ready: dict[str, Tensor] = {}
    for file, keys in split.filename_to_tensors.items():
        while not all(names[key] in ready for key in keys):
            ready |= next(tensors)
        shard = {key: ready.pop(names[key]) for key in keys}
        save_file(shard, os.path.join(folder, file), metadata={"format": "pt", **checksum_metadata(shard)})
        sort_metadata(os.path.join(folder, file))
        del shard
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        with open(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), "w", encoding="utf-8") as opened:
            opened.write(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _tensors(
    state: dict[str, Tensor], layers: dict[str, QATLinear], stored: dict[str, _Stored]
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a packed model in the order of its state: those of a layer at once, others one by one."""
    done: set[str] = set()
    with tqdm(total=len(layers), desc="Packing", unit="layer", disable=None) as bar:
        for name, empty in state.items():
            layer = name.rpartition(".")[0]
            if layer not in layers:
                yield {name: stored[name].read().to(empty.dtype)}
            elif layer not in done:
                done.add(layer)
                packed = _pack(layer, layers[layer], stored)
                bar.update()
                yield {f"{layer}.{key}": tensor for key, tensor in packed.state_dict().items()}


def _pack(name: str, empty: QATLinear, stored: dict[str, _Stored]) -> PackedLinear:
    """Read the weights of one layer and pack them."""
    layer = QATLinear.from_linear(empty, empty.scheme, empty.fan_in_fan_out)
    for key, parameter in empty.named_parameters():
        if f"{name}.{key}" in stored:
            source = stored[f"{name}.{key}"]
            tensor = source.read().to(parameter.dtype)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{source.file}: {source.key} has NaN or infinite entries as {parameter.dtype}")
        else:  # the scheme learns scales that the checkpoint does not have yet
            tensor = torch.empty_like(parameter, device="cpu")
        setattr(layer, key, nn.Parameter(tensor, requires_grad=False))
    if f"{name}.scales" not in stored:
        layer.init_scales()
    return PackedLinear.from_qat(layer)


def _copy_tokenizer(source: str, folder: str) -> None:
    for pattern in TOKENIZER_FILES:
        for path in glob.glob(os.path.join(glob.escape(source), pattern)):
            target = os.path.join(folder, os.path.relpath(path, source))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(path, target)
