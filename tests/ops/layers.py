"""What the tests of kernels share: layers of random codes, and the devices that Triton's kernels run on."""

import importlib.util

import pytest
import torch

from fairy2i import PackedLinear, RealScheme
from fairy2i.packing import pack_codes

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
_HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_both = pytest.mark.parametrize("device", [pytest.param("cpu", marks=_HERE), _GPU])
on_gpu = pytest.mark.parametrize("device", [_GPU])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def exact_weight(layer):
    """The dense weight in float64: that in float32 is itself rounded."""
    codes, scales = layer.codes_and_scales()
    return layer.scheme.dequantize(codes, scales.double())


def random_layer(scheme, out_features, in_features, backend="auto", bias=False, **kind):
    """A layer of random codes and scales, none of which a quantizer need ever make."""
    layer = PackedLinear(in_features, out_features, bias, scheme=scheme, **kind).eval()
    levels = scheme.levels if isinstance(scheme, RealScheme) else 4
    codes = torch.randint(0, levels, scheme.code_shape(out_features, in_features), dtype=torch.uint8)
    layer.codes.copy_(pack_codes(codes, scheme.code_width))
    layer.scales.uniform_(0.1, 1.0)
    if bias:
        layer.bias.data.normal_()
    layer.backend = backend
    return layer
