"""fairy2i: quantization-aware training of causal language models with weights in {+1, -1, +i, -i}.

    from fairy2i import replace_modules_for_qat
    report = replace_modules_for_qat(model, "complex_phase_v2")   # in place; then train as usual

Importing the package also teaches `transformers` to load what it saved.
"""

from ._version import __version__
from .convert import ConversionReport, convert_to_inference_mode, replace_modules_for_qat
from .integrations.transformers import Fairy2iConfig
from .packed import PackedLinear
from .qat import QATLinear
from .schemes import METHODS, PhaseScheme, RealScheme, Scheme
from .widely_linear import from_widely_linear, to_widely_linear

__all__ = [
    "METHODS",
    "ConversionReport",
    "Fairy2iConfig",
    "PackedLinear",
    "PhaseScheme",
    "QATLinear",
    "RealScheme",
    "Scheme",
    "__version__",
    "convert_to_inference_mode",
    "from_widely_linear",
    "replace_modules_for_qat",
    "to_widely_linear",
]
