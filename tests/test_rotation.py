"""Rotation: a block-Hadamard transform that is its own inverse, and schemes that quantize inside it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import fairy2i
from fairy2i import PackedLinear, PhaseScheme, QATLinear, RealScheme, convert_to_inference_mode
from fairy2i.calibrate import calibrate_layer
from fairy2i.rotation import ROTATIONS, block_width, rotate
from fairy2i.streaming import pack_checkpoint
from tests.tiny_models import tiny_model

SCHEMES = [
    PhaseScheme(stages=2, granularity="row", scales="learned", rotation=64),
    PhaseScheme(stages=3, granularity="tile", tile=5, scales="joint", rotation=16),
    PhaseScheme(stages=1, rotation=256),
    RealScheme(levels=3, granularity="row", scales="learned", rotation=16),
    RealScheme(levels=2, rotation=4),
]


def hadamard(features: int, width: int) -> torch.Tensor:
    """The matrix by its definition, entry by entry, in blocks along the diagonal."""
    block = [[(-1.0) ** bin(j & k).count("1") / math.sqrt(width) for k in range(width)] for j in range(width)]
    return torch.block_diag(*[torch.tensor(block, dtype=torch.float64)] * (features // width))


@pytest.mark.parametrize(
    ("features", "rotation", "width"),
    [(576, 64, 64), (172, 64, 4), (2, 256, 1), (1536, 256, 256), (64, 0, 1), (48, 64, 16), (10, 4, 1)],
)
def test_the_block_is_the_widest_power_of_four_that_divides(features, rotation, width):
    assert block_width(features, rotation) == width


@given(
    st.integers(0, 3), st.sampled_from([4, 8, 12, 48, 64, 172, 256, 320]), st.sampled_from(ROTATIONS), st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_rotating_is_multiplying_by_hadamard_blocks(rows, features, rotation, seed):
    x = torch.randn(rows, 2, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = x @ hadamard(features, block_width(features, rotation))
    torch.testing.assert_close(rotate(x, rotation), expected, rtol=0, atol=1e-14 * 16)


@pytest.mark.parametrize("rotation", [4, 16, 64, 256])
def test_whole_numbers_come_back_exactly_and_strides_do_not_show(rotation):
    x = torch.randint(-99, 100, (6, 512), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(rotate(rotate(x, rotation), rotation), x)
    y = torch.randn(512, 6)
    assert torch.equal(rotate(y.T, rotation), rotate(y.T.contiguous(), rotation))
    assert rotate(x, 0) is x
    assert torch.equal(torch.compile(rotate, fullgraph=True)(y.T, rotation), rotate(y.T, rotation))


def test_a_width_that_is_no_power_of_four_is_refused():
    with pytest.raises(ValueError, match="rotation must be one of 0, 4, 16, 64, 256, got 32"):
        PhaseScheme(rotation=32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_the_rotated_weight_and_the_dense_weight_is_turned_back(scheme):
    weight = torch.randn(20, 192, generator=torch.Generator().manual_seed(1))
    plain = replace(scheme, rotation=0)
    codes, scales = plain.quantize(rotate(weight, scheme.rotation))
    assert all(map(torch.equal, scheme.quantize(weight), (codes, scales)))
    assert torch.equal(scheme.dequantize(codes, scales), rotate(plain.dequantize(codes, scales), scheme.rotation))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.learned], ids=str)
def test_gradients_are_those_through_the_rotation(scheme):
    torch.manual_seed(2)
    layer = QATLinear(64, 12, bias=False, scheme=scheme)
    x = torch.randn(7, 64)
    out = torch.randn(7, 12)
    layer(x).backward(out)
    codes, _ = layer.codes_and_scales()
    scales = layer.group_scales.detach().clone().requires_grad_()
    (x @ scheme.dequantize(codes, scales).T).backward(out)  # autograd goes through codes * scales and the rotation
    count = math.prod(scheme.code_shape(12, 64)) / scales.numel()
    torch.testing.assert_close(layer.scales.grad.view_as(scales), scales.grad / math.sqrt(count), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, out.T @ x)  # straight through: of the dense weight, as it is


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_trained(scheme, dtype):
    torch.manual_seed(3)
    layer = QATLinear(128, 36, scheme=scheme).to(dtype)
    packed = PackedLinear.from_qat(layer).eval()
    packed.backend = "reference"
    x = torch.randn(5, 128, dtype=dtype)
    assert torch.equal(packed(x), layer(x))
    packed.backend = "auto"
    torch.testing.assert_close(packed(x), layer(x), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_a_rotation_pays_where_a_few_weights_are_large():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    weight[:, ::37] *= 12
    errors = []
    for rotation in (0, 64):
        scheme = PhaseScheme(stages=2, granularity="row", scales="joint", rotation=rotation)
        errors.append(float((weight - scheme.dequantize(*scheme.quantize(weight))).square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_calibration_works_in_the_rotated_basis():
    torch.manual_seed(5)
    layer = QATLinear(64, 32, bias=False, scheme=SCHEMES[0])
    x = torch.randn(400, 64) @ torch.randn(64, 64)
    weight = layer.weight.detach().clone()
    before, after = calibrate_layer(layer, x.T @ x)

    def error() -> float:
        return float((x @ (weight - layer.quantized_weight()).T).square().sum() / (x @ weight.T).square().sum())

    assert after < 0.7 * before
    assert error() == pytest.approx(after, rel=1e-3)


def test_it_survives_saving_packing_and_packing_from_disk(tmp_path):
    model = tiny_model()
    fairy2i.replace_modules_for_qat(model, SCHEMES[0])
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "qat")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "qat")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    pack_checkpoint(tmp_path / "qat", tmp_path / "streamed")
    convert_to_inference_mode(model)
    model.save_pretrained(tmp_path / "packed")
    for folder in ("streamed", "packed"):
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert all(m.scheme == SCHEMES[0] for m in packed.modules() if isinstance(m, PackedLinear))
        with torch.no_grad():
            torch.testing.assert_close(packed(tokens).logits, expected, rtol=1e-4, atol=1e-5)
