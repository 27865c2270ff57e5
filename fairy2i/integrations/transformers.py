"""The transformers quantizer: QAT and packed checkpoints that `from_pretrained` reads back as what they were.

`config.json` carries

    "quantization_config": {"quant_method": "fairy2i", "format_version": 1, "mode": "qat",
                            "method": [{"scheme": {...}, "modules": [name, ... or "*"]}, ...],
                            "skip_lm_head": false, "skip_modules": [name, ...]}

written from what was really replaced, with full module names, so loading repeats the conversion and never decides anew.
The weights beside it are the master weights under their plain names (and learned ``scales``), which any tool can read.
With "mode": "packed" they are ``codes`` and ``scales``, see docs/format.md.
"""

import itertools
import os
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checksums import checksum_metadata, sort_metadata
from ..convert import ConversionReport, check_in_memory, convert_to_inference_mode, replace_modules_for_qat
from ..inspection import quantized_layers
from ..packed import PackedLinear, use_backend
from ..qat import QATLinear
from ..saving import atomic_files
from ..schemes import Scheme, resolve_method, scheme_from_dict
from .checkpoint import check_loaded, check_stored, fit_to_model, read_headers
from .remote_code import add_auto_map, has_auto_map, remove_auto_map, write_shim

FORMAT_VERSION = 1
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
MODES = ("qat", "packed")


class Fairy2iConfig(QuantizationConfigMixin):
    """The quantization config of transformers for this library.

    Args:
        method: as for replace_modules_for_qat, or the list that a saved config has.
        skip_lm_head, skip_modules: as for replace_modules_for_qat.
        mode: "qat": linear layers become QATLinear, with master weights to train; "packed": PackedLinear, to use.
        format_version: version of the checkpoint format.

    Raises:
        ValueError: unknown method, mode or format version.
    """

    def __init__(
        self,
        method: Any = "complex_phase_v2",
        skip_lm_head: bool | None = None,
        skip_modules: Any = (),
        mode: str = "qat",
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise ValueError(f"quantization_config of fairy2i has no field {', '.join(sorted(unknown))}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has fairy2i format version {format_version}, this version reads {FORMAT_VERSION}; "
                "upgrade with: pip install -U fairy2i"
            )
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r} in quantization_config. Known modes: {', '.join(MODES)}")
        self.quant_method = "fairy2i"  # type: ignore[assignment]
        self.format_version = format_version
        self.mode = mode
        self.method: dict[str, Scheme | None] = _read_method(method)
        self.skip_lm_head = skip_lm_head
        self.skip_modules = list(skip_modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form that is written to config.json."""
        return {
            "quant_method": "fairy2i",
            "format_version": self.format_version,
            "mode": self.mode,
            "method": [
                {"scheme": scheme and scheme.to_dict(), "modules": list(patterns)}
                for scheme, patterns in _runs(self.method)
            ],
            "skip_lm_head": self.skip_lm_head,
            "skip_modules": self.skip_modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return :meth:`to_dict`: every field is written."""
        return self.to_dict()


def _runs(method: dict[str, Scheme | None]) -> Iterator[tuple[Scheme | None, Iterator[str]]]:
    """Group neighbouring patterns of one scheme; their order decides and is kept."""
    return itertools.groupby(method, key=method.__getitem__)


def _read_method(method: Any) -> dict[str, Scheme | None]:
    if isinstance(method, str | Scheme):
        return {"*": resolve_method(method)}
    if isinstance(method, dict):
        return {pattern: value and resolve_method(value) for pattern, value in method.items()}
    return {
        pattern: entry["scheme"] and scheme_from_dict(entry["scheme"])
        for entry in method
        for pattern in entry["modules"]
    }


class Fairy2iQuantizer(HfQuantizer):
    """Turns a model skeleton into a QAT or packed model before transformers loads its weights."""

    requires_calibration = False
    saving: tuple[str | os.PathLike[str] | None, dict[str, Tensor] | None] = (None, None)  # see save_pretrained

    def __init__(self, quantization_config: Fairy2iConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.packs = quantization_config.mode == "packed" and not self.pre_quantized
        self.absent: set[str] = set()  # tensors of quantized layers that no file names

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        assert isinstance(config, Fairy2iConfig)
        method, skip_modules = config.method, config.skip_modules
        stored = read_headers(model, kwargs.get("checkpoint_files") or ())
        if self.pre_quantized:
            method, skip_modules = fit_to_model(model, method, skip_modules, stored)
        replace_modules_for_qat(model, method, config.skip_lm_head, skip_modules)
        if self.pre_quantized:
            if config.mode == "packed":
                convert_to_inference_mode(model)
            self.absent = check_stored(model, stored)
        self.quantization_config = model.config.quantization_config
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            check_loaded(model, self.absent)
        else:
            self._quantize_plain_weights(model)
        for layer in quantized_layers(model).values():
            if isinstance(layer, PackedLinear):
                layer.requires_grad_(False)  # transformers makes new Parameters, which ask for gradients
        return use_backend(model, "auto")

    def _quantize_plain_weights(self, model: Any) -> None:
        """Do what replace_modules_for_qat could not do before there were weights, and pack them if asked to."""
        for name, layer in quantized_layers(model).items():
            assert isinstance(layer, QATLinear)
            if layer.scales is not None:
                check_in_memory(name, layer)
            if not layer.weight.is_meta and not torch.isfinite(layer.weight).all():
                raise ValueError(f"the weight of {name} has NaN or infinite entries")
            layer.init_scales()
        if self.packs:
            convert_to_inference_mode(model)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """A QAT model saves its master weights, a packed one its codes and scales."""
        return True

    def get_state_dict_and_metadata(
        self, model: Any, *_: Any, **__: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Write the shim while save_pretrained runs, which is late enough for it to count among the files to upload.

        The metadata of a packed checkpoint are the checksums of its tensors, under the names that they are saved by.
        """
        folder, state_dict = self.saving
        if folder is not None and has_auto_map(model.config):
            write_shim(folder)
        if self.is_qat_trainable:
            return state_dict, {}
        tensors = remove_tied_weights_from_state_dict(
            dict(model.state_dict() if state_dict is None else state_dict), model
        )
        return state_dict, checksum_metadata(revert_weight_conversion(model, tensors))

    @property
    def is_trainable(self) -> bool:
        """A QAT model trains; a packed one takes adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """A QAT model trains, a packed one has no master weights to train."""
        config = self.quantization_config
        assert isinstance(config, Fairy2iConfig)
        return config.mode == "qat"

    @property
    def is_compileable(self) -> bool:
        """A QAT model compiles without graph breaks."""
        return True


if "fairy2i" not in AUTO_QUANTIZER_MAPPING:  # both functions raise on a second registration
    register_quantization_config("fairy2i")(Fairy2iConfig)
    register_quantizer("fairy2i")(Fairy2iQuantizer)


def record_conversion(model: Any, report: ConversionReport | None, mode: str | None) -> None:
    """Set or clear the quantization attributes of a transformers model, so that saving and the Trainer know it.

    Args:
        model: a PreTrainedModel, changed in place.
        report: what was replaced; None where the layers stay those of the config that the model has.
        mode: "qat", "packed", or None: the model is plain again.
    """
    if mode is None:
        HfQuantizer.remove_quantization_config(None, model)  # type: ignore[arg-type]
        remove_auto_map(model.config)
        vars(model).pop("save_pretrained", None)
        return
    if report is None:
        model.config.quantization_config.mode = mode
        return
    by_scheme: dict[Scheme, list[str]] = {}
    for layer in report.replaced:
        by_scheme.setdefault(layer.scheme, []).append(layer.name)
    default = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
    method: dict[str, Scheme | None] = {
        name: scheme for scheme, names in by_scheme.items() if scheme != default for name in names
    }
    config = Fairy2iConfig(
        method={**method, "*": default}, skip_lm_head=False, skip_modules=[name for name, _, _ in report.skipped]
    )
    model.config.quantization_config = config
    model.hf_quantizer = Fairy2iQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    model.is_quantized = True
    add_auto_map(model.config)
    model.save_pretrained = types.MethodType(save_pretrained, model)


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Stand in for the method of a converted model: do what that does, add the shim, and let no half file be seen.

    transformers asks the quantizer for the state dict while it saves, but does not say where to, and drops the state
    dict that it was given (FSDP passes the gathered one). Both go to the quantizer from here.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not is_main_process or not isinstance(quantizer, Fairy2iQuantizer):
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        return
    if push_to_hub:  # files go up from the temporary folder, whose name is not the repository's
        kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        model._upload_modified_files = types.MethodType(_upload_sorted, model)
    try:
        with atomic_files(save_directory) as folder:
            quantizer.saving = (None if getattr(model, "_hf_peft_config_loaded", False) else folder, state_dict)
            type(model).save_pretrained(model, folder, True, state_dict, push_to_hub, **kwargs)
            _sort_all(folder)
            written = os.listdir(folder)
    finally:
        quantizer.saving = (None, None)
        vars(model).pop("_upload_modified_files", None)
    if any(map(_WEIGHTS.fullmatch, written)):  # as transformers: what an earlier save wrote in other parts is not kept
        for name in os.listdir(save_directory):
            if _WEIGHTS.fullmatch(name) and name not in written:
                os.remove(os.path.join(save_directory, name))


def _sort_all(folder: str | os.PathLike[str]) -> None:
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            sort_metadata(os.path.join(folder, name))


def _upload_sorted(model: Any, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Stand in for the method that save_pretrained uploads with, so that files go up as they stay here."""
    _sort_all(folder)
    return type(model)._upload_modified_files(model, folder, *args, **kwargs)
