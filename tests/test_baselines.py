"""The real binary and ternary quantizers against their published definitions."""

import math

import naive
import pytest
import torch

from fairy2i import METHODS, RealScheme

NAIVE = {"bitnet": naive.binary, "bitnet_1_58": naive.ternary}
SHAPES = [(1, 1), (2, 74), (7, 5), (33, 1), (64, 96)]  # odd sizes too


def quantized(weight, method):
    return METHODS[method].dequantize(*METHODS[method].quantize(weight))


def distance_to_a_tie(weight, method):
    weight = weight.double()
    if method == "bitnet":
        return (weight - weight.mean()).abs().min()
    return ((weight / weight.abs().mean()).abs() - 0.5).abs().min()


@pytest.mark.parametrize("method", NAIVE)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_agrees_with_the_published_definition(method, shape, shift):
    weight = torch.randn(shape) + shift
    assert distance_to_a_tie(weight, method) > 1e-6, "an entry is a tie to float32: the comparison says nothing"
    torch.testing.assert_close(quantized(weight, method).double(), NAIVE[method](weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", NAIVE)
def test_rows_differing_by_1000x_agree_with_the_published_definition(method):
    weight = torch.randn(41, 36) * torch.logspace(-3, 0, 41)[:, None]
    torch.testing.assert_close(quantized(weight, method).double(), NAIVE[method](weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", NAIVE)
@pytest.mark.parametrize("shape", [*SHAPES, (31, 49), (64, 1000)], ids=str)
@pytest.mark.parametrize("value", [0.1, 0.25, -0.3, 1e-3, 7.7])
def test_constant_matrices_keep_their_size(method, shape, value):
    # one bit has no zero: an entry equal to the mean goes to +1, whatever its own sign
    sign = 1.0 if method == "bitnet" else math.copysign(1, value)
    expected = torch.full(shape, sign * abs(value))
    torch.testing.assert_close(quantized(torch.full(shape, value), method), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("method", "code", "value"), [("bitnet", 1, 1e-6), ("bitnet_1_58", 1, 0.0)])
def test_all_zero_matrix_takes_the_smallest_scale(method, code, value):
    codes, scales = METHODS[method].quantize(torch.zeros(3, 4))
    assert (codes == code).all()
    assert scales.item() == pytest.approx(1e-6, rel=1e-6)
    assert (METHODS[method].dequantize(codes, scales) == torch.tensor(value)).all()


def test_binary_ties_with_the_mean_go_to_plus_one_at_every_position():
    weight = torch.tensor([[-1.0, 0.0, 1.0] * 13])  # mean exactly 0
    codes, _ = METHODS["bitnet"].quantize(weight)
    assert codes.tolist() == [[0, 1, 1] * 13]


def test_ternary_ties_round_half_to_even_at_every_position():
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5] * 9])  # mean |w| exactly 1: ratios are halves
    codes, scales = METHODS["bitnet_1_58"].quantize(weight)
    assert scales.item() == 1
    assert codes.tolist() == [[1, 1, 2, 0] * 9]


@pytest.mark.parametrize("method", NAIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_whatever_the_dtype_of_the_weight(method, dtype):
    weight = torch.randn(63, 97).to(dtype)
    codes, scales = METHODS[method].quantize(weight)
    wide_codes, wide_scales = METHODS[method].quantize(weight.float())
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float32
    assert torch.equal(codes, wide_codes)
    assert torch.equal(scales, wide_scales)


@pytest.mark.parametrize("levels", [2, 3])
def test_row_granularity_equals_each_row_by_itself(levels):
    weight = torch.randn(7, 33) * torch.logspace(-3, 0, 7)[:, None]
    codes, scales = RealScheme(levels=levels, granularity="row").quantize(weight)
    for r in range(7):
        alone_codes, alone_scales = RealScheme(levels=levels).quantize(weight[r : r + 1])
        assert torch.equal(codes[r : r + 1], alone_codes)
        torch.testing.assert_close(scales[r], alone_scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", [2, 3])
def test_tile_granularity_equals_each_tile_by_itself(levels):
    weight, tile = torch.randn(9, 14), 4  # 4 divides neither side
    codes, scales = RealScheme(levels=levels, granularity="tile", tile=tile).quantize(weight)
    assert scales.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            block = slice(i * tile, i * tile + tile), slice(j * tile, j * tile + tile)
            alone_codes, alone_scales = RealScheme(levels=levels).quantize(weight[block])
            assert torch.equal(codes[block], alone_codes)
            torch.testing.assert_close(scales[i, j], alone_scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", NAIVE)
def test_strides_of_the_weight_do_not_matter(method):
    weight = torch.randn(24, 40)
    torch.testing.assert_close(quantized(weight.T.contiguous().T, method), quantized(weight, method), rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", [2, 3])
def test_given_scales_are_used_as_they_are_and_small_ones_clamped(levels):
    weight, given = torch.randn(3, 8), torch.tensor([0.5, 2.0, -1.0])
    scheme = RealScheme(levels=levels, granularity="row", scales="learned")
    codes, scales = scheme.quantize(weight, given)
    assert torch.equal(scales, given.clamp(min=1e-6))
    if levels == 3:  # ternary codes follow the scale: those of a row are its nearest levels
        assert torch.equal(codes[1].float() - 1, (weight[1] / 2).round().clamp(-1, 1))


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile"])
@pytest.mark.parametrize("levels", [2, 3])
def test_scale_gradient_is_that_of_autograd_through_dequantize(levels, granularity):
    scheme = RealScheme(levels=levels, granularity=granularity, tile=3)
    codes, scales = scheme.quantize(torch.randn(7, 10))
    grad = torch.randn(7, 10)
    scales.requires_grad_()
    (scheme.dequantize(codes, scales) * grad).sum().backward()
    torch.testing.assert_close(scheme.scale_gradient(grad, codes), scales.grad, rtol=1e-5, atol=1e-5)
