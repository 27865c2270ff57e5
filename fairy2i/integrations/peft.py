"""LoRA adapters (package `peft`) on packed layers.

    model = get_peft_model(model, with_packed_layers(LoraConfig(r=8, target_modules=["q_proj", "v_proj"])))
    model.save_pretrained(adapter)
    model = PeftModel.from_pretrained(base, adapter, config=with_packed_layers(LoraConfig.from_pretrained(adapter)))

The codes stay as they are and the adapter trains beside them. It cannot be merged into codes; the same adapter merges
into the QAT model or the dequantized one, whose layers PEFT knows as it is.
"""

from typing import Any, NoReturn

from ..packed import PackedLinear

try:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as error:
    raise ImportError(f"adapters need the package peft ({error}); install it with: pip install peft") from error

_STARTS = (True, False, "gaussian", "orthogonal")  # the other ones change the weight that the adapter is added to


class PackedLora(LoraLinear):
    """LoRA's low-rank term beside a PackedLinear."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT says the same, with a warning about an unknown layer

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an adapter cannot be merged into packed codes; keep it beside them, or put it on the QAT model or on "
            "convert_to_inference_mode(model, packed=False) and merge it there"
        )

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: DoRA and its like compute with the dense weight in each forward."""
        return {(): None}


def with_packed_layers(config: LoraConfig) -> LoraConfig:
    """Let a LoraConfig apply to packed layers too; it is changed in place and returned.

    Raises:
        ValueError: its ``init_lora_weights`` would change the weights of the layers.
    """
    if config.init_lora_weights not in _STARTS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weights of the layers, and packed ones are "
            f"fixed; use one of {', '.join(map(repr, _STARTS))}"
        )
    config._register_custom_module({PackedLinear: PackedLora})
    return config
