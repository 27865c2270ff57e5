"""Open what users name: a model by path or Hub id, documents by file, folder or Hub data set."""

import glob
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import fsspec
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .convert import Method
from .schemes import METHODS, PhaseScheme, Scheme, method_name, resolve_method, scheme_from_dict
from .streaming import find_model

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")  # what --dtype takes
DOCUMENT_SEPARATOR = "<|endoftext|>"
_COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # by suffix, what ``datasets`` calls it


def load_model_and_tokenizer(
    model: str,
    *,
    gguf_file: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a folder or a Hub id. A QAT checkpoint comes back as a QAT model.
        gguf_file: name of a GGUF file inside ``model``; its weights are dequantized (needs the package ``gguf``).
        tokenizer: folder or Hub id of the tokenizer, if it does not lie with the model.
        dtype: dtype of the weights, or its name; "auto" is that of the checkpoint.
        device_map: as transformers takes it: "auto" spreads a large model over all devices.

    Raises:
        FileNotFoundError: ``model`` looks like a local path and is not there.
        OSError: neither a folder nor a model that the Hub can give.
    """
    model = find_model(model)
    extra = {"gguf_file": gguf_file, "device_map": device_map}
    extra = {name: value for name, value in extra.items() if value}
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **extra)
    if gguf_file and getattr(loaded, "hf_quantizer", None) is not None:
        loaded.hf_quantizer.remove_quantization_config(loaded)  # the weights are plain now; let the model be saved
    return loaded, AutoTokenizer.from_pretrained(os.path.expanduser(tokenizer or model))


def load_config(model: str, gguf_file: str | None = None) -> Any:
    """Return the config of a model: what can be known of it without its weights.

    Raises:
        FileNotFoundError: ``model`` looks like a local path and is not there.
        OSError: neither a folder nor a model that the Hub can give.
    """
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    return AutoConfig.from_pretrained(find_model(model), **extra)


def context_length(config: Any) -> int | None:
    """Return how many tokens a model can see at once, or None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def default_device() -> str:
    """Return the device that commands use where none is named: the GPU, if PyTorch can use one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def move_to_device(model: nn.Module, device: str | torch.device) -> None:
    """Move a model to a device, in place.

    Raises:
        ValueError: the device is not there, not in this build of PyTorch, or has too little memory.
    """
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        raise ValueError(f"the model cannot go to {device}: {error}") from None


def parse_method(text: str | dict[str, Any] | None) -> Method | None:
    """Read a method as scripts and YAML files give it.

    Args:
        text: a method name; "none" or None; a scheme as a dict with ``kind``; a mapping {pattern: any of these}; or the
            JSON text of one of the last two.

    Returns:
        What replace_modules_for_qat takes, or None for an unquantized model.

    Raises:
        ValueError: unknown name, kind or field, or text that is neither a name nor JSON.
    """
    if isinstance(text, str) and text.lstrip().startswith("{"):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the method {text!r} is not valid JSON: {error}") from None
    if text is None or text == "none":
        return None
    if isinstance(text, str):
        if text not in METHODS:
            resolve_method(text)  # raises and lists the known names
        return text
    if not isinstance(text, dict):
        raise ValueError(f"a method is a name, a scheme or a mapping of patterns to these, got {text!r}")
    if "kind" in text:
        return scheme_from_dict(text)
    mapping: dict[str, str | Scheme | None] = {}
    for pattern, value in text.items():
        entry = parse_method(value)
        if not (entry is None or isinstance(entry, str | Scheme)):
            raise ValueError(f"the pattern {pattern!r} must stand for one method, got the mapping {value!r}")
        mapping[pattern] = entry
    return mapping


def _schemes(method: Method) -> list[Scheme]:
    parts = list(method.values()) if isinstance(method, Mapping) else [method]
    return [resolve_method(part) for part in parts if part is not None]


def check_phase_codes(method: Method) -> None:
    """Raise unless all layers of a method have phase codes, and so stages to choose.

    Raises:
        ValueError: names the scheme that has none.
    """
    if others := [scheme for scheme in _schemes(method) if not isinstance(scheme, PhaseScheme)]:
        raise ValueError(f"--bits chooses the stages of phase codes, and {method_name(others[0])} has none")


def check_learned_rows(method: Method) -> None:
    """Raise unless a method has what calibration fits: phase codes with learned row scales, for some layers at least.

    Raises:
        ValueError: shows a method that has.
    """
    schemes = _schemes(method)
    if not any(isinstance(s, PhaseScheme) and s.learned and s.granularity == "row" for s in schemes):
        example = json.dumps({"kind": "phase", "stages": 2, "granularity": "row", "scales": "learned"})
        names = ", ".join(map(method_name, schemes)) or "no method at all"
        raise ValueError(f"calibration needs learned row scales, as in {example}, not {names}")


def read_yaml(path: str) -> Any:
    """Return what is in a YAML file.

    Raises:
        ValueError: it is not valid YAML; names the line.
        OSError: it cannot be read.
    """
    with open(os.path.expanduser(path), encoding="utf-8") as file:
        try:
            return yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def file_suffix(path: str) -> str:
    """Return the suffix of a file in lower case, of a compressed one that of what is in it."""
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1].lower() if suffix in _COMPRESSIONS else suffix.lower()


def _text_documents(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            for document in file.read().split(DOCUMENT_SEPARATOR):
                if document.strip():
                    yield {"text": document}


def local_files(source: str) -> list[str]:
    """Return the paths of a file, a folder with all below it, or a glob; none for the name of a Hub data set.

    Raises:
        FileNotFoundError: ``source`` looks like a path and is not there, or is a folder without files.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found = sorted(name for name in glob.glob(os.path.join(path, "**"), recursive=True) if os.path.isfile(name))
        if not found:
            raise FileNotFoundError(f"the folder {path} has no files")
        return found
    found = sorted(glob.glob(path)) or ([path] if os.path.isfile(path) else [])
    named = file_suffix(source) in (".txt", *TABLES) or source.startswith((".", "/", "~")) or "*" in source
    if named and not found:
        raise FileNotFoundError(f"there is no file or folder {source}")
    return found


def read_documents(source: str, *, split: str = "train", text_column: str = "text") -> "Dataset":
    """Read documents from local files or a Hub data set.

    Args:
        source: a file, a folder or a glob of one kind of file: JSONL, JSON or parquet (one row a document), anything
            else is plain text, where a line ``<|endoftext|>`` parts documents and a file without one is a single
            document; all may be compressed (gz, xz, bz2, zst). Or a Hub data set, ``id`` or ``id:config``.
        split: split of a Hub data set.
        text_column: the column that holds the text.

    Returns:
        A datasets.Dataset with the one column "text".

    Raises:
        FileNotFoundError: ``source`` looks like a path and is not there.
        ValueError: files of several kinds or that cannot be read, no such column, or no text at all.
        ImportError: the package ``datasets`` is missing, which models alone do not need.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading texts needs the package datasets ({error}): pip install datasets") from error
    files = local_files(source)
    if files:
        kinds = {TABLES.get(file_suffix(path), "text") for path in files}
        if len(kinds) > 1:
            raise ValueError(f"{source} mixes {', '.join(sorted(kinds))} files; name those of one kind")
        kind = kinds.pop()
        if kind == "text":
            documents = datasets.Dataset.from_list(list(_text_documents(files)))
            text_column = "text"
        else:
            try:
                documents = datasets.load_dataset(kind, data_files=files, split="train")
            except StopIteration:  # what datasets makes of files without a single row
                raise ValueError(f"{source} has no text in it") from None
            except datasets.exceptions.DatasetGenerationError as error:
                raise ValueError(f"{source} cannot be read as {kind}: {error.__cause__}") from error
    else:
        name, _, config = source.partition(":")
        documents = datasets.load_dataset(name, config or None, split=split)
    if not len(documents):
        raise ValueError(f"{source} has no text in it")
    if text_column not in documents.column_names:
        raise ValueError(f"{source} has no column {text_column!r}; it has {', '.join(documents.column_names)}")
    documents = documents.select_columns([text_column])
    return documents if text_column == "text" else documents.rename_column(text_column, "text")
