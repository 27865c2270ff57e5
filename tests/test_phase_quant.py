"""PhaseQuant against the published definition, at ties and edges, and the joint fit against its promises."""

import itertools
import math

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairy2i import METHODS, PhaseScheme, from_widely_linear
from fairy2i.phase_quant import phase_dequantize, phase_encode, phase_quantize, phase_units

PAPER = [f"complex_phase_v{t}" for t in (1, 2, 3, 4)]
SHAPES = [(2, 6), (2, 74), (74, 2), (6, 10), (34, 62), (64, 96), (130, 66)]  # (2, k): one pair of rows
# 1, i, -1, -i and the four ties of the half-open sectors; codes 0 = -1, 1 = +1, 2 = -i, 3 = +i
SECTORS = {
    1 + 0j: 1,
    1 + 1j: 3,
    0 + 1j: 3,
    -1 + 1j: 0,
    -1 + 0j: 0,
    -1 - 1j: 2,
    0 - 1j: 2,
    1 - 1j: 1,
    0 + 0j: 1,
}


def relative(error, reference):
    return (error.norm() / reference.norm()).item()


def relative_mse(weight, scheme):
    return relative(scheme.dequantize(*scheme.quantize(weight)) - weight, weight) ** 2


def matrix_of(values, shape):
    """Real (2n, 2m) matrix whose U and W are both filled with complex values, over and over."""
    n, m = shape[0] // 2, shape[1] // 2
    z = torch.tensor(values, dtype=torch.complex64)
    full = z.repeat(-(-n * m // len(z)))[: n * m].reshape(n, m)
    return from_widely_linear(full, full)


# The published definition


def assert_agrees_with_definition(weight, stages):
    codes, scales = METHODS[f"complex_phase_v{stages}"].quantize(weight)
    dense = METHODS[f"complex_phase_v{stages}"].dequantize(codes, scales)
    true_codes, true_scales, true_dense, margin = naive.phase_quant(weight, stages)
    assert margin > 2e-7 * weight.abs().max(), "an entry is a tie to float32: the comparison says nothing"
    assert torch.equal(codes, true_codes)
    torch.testing.assert_close(scales.double(), true_scales, rtol=1e-6, atol=0)
    assert (dense - true_dense).abs().max() <= 1e-6 * true_dense.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_v1_to_v4_agree_with_the_published_definition(stages, shape):
    assert_agrees_with_definition(torch.randn(shape), stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["shifted", "laplace", "tiny", "huge"])
def test_other_distributions_agree_with_the_published_definition(stages, kind):
    gaussian = torch.randn(32, 48)
    weight = {
        "shifted": gaussian + 1.5,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((32, 48)),
        "tiny": gaussian * 1e-2,
        "huge": gaussian * 1e4,
    }[kind]
    assert_agrees_with_definition(weight, stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_rows_differing_by_1000x_agree_with_the_published_definition(stages):
    weight = torch.randn(40, 36) * torch.logspace(-3, 0, 40)[:, None]
    assert_agrees_with_definition(weight, stages)


@pytest.mark.parametrize("method", PAPER)
@pytest.mark.parametrize("value", [0.25, -0.5, 2.0])
def test_constant_matrices_agree_with_the_published_definition(method, value):
    weight = torch.full((6, 10), value)  # a power of two, so that its float32 mean is exact
    codes, scales = METHODS[method].quantize(weight)
    true_codes, true_scales, true_dense, _ = naive.phase_quant(weight, METHODS[method].stages)
    assert torch.equal(codes, true_codes)
    torch.testing.assert_close(scales.double(), true_scales, rtol=1e-6, atol=0)
    assert (METHODS[method].dequantize(codes, scales) - true_dense).abs().max() <= 1e-6 * abs(value)


@pytest.mark.parametrize("method", PAPER)
@pytest.mark.parametrize("value", [0.1, -0.3])
@pytest.mark.parametrize("shape", [(2, 2), (6, 14), (62, 98)], ids=str)
def test_constant_matrices_come_back_to_within_the_smallest_scale(method, value, shape):
    weight = torch.full(shape, value)
    dense = METHODS[method].dequantize(*METHODS[method].quantize(weight))
    # a stage with nothing left to do still adds its clamped scale of 1e-6, in each of U and W
    assert (dense - weight).abs().max() <= 2e-6 * METHODS[method].stages


@pytest.mark.parametrize("method", PAPER)
def test_all_zero_matrix_takes_code_one_and_the_smallest_scales(method):
    codes, scales = METHODS[method].quantize(torch.zeros(4, 6))
    assert (codes[0] == 1).all()
    assert (scales == 1e-6).all()
    assert METHODS[method].dequantize(codes, scales).abs().max() <= 2e-6


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_single_block_is_exact_from_two_stages_on(stages):
    # one entry a matrix: the first stage takes one axis, the second the other, the rest add clamped scales
    weight = torch.randn(2, 2)
    codes, scales = phase_quantize(weight, stages=stages)
    assert (phase_dequantize(codes, scales) - weight).abs().max() <= 2e-6 * (stages - 2) + 1e-6 * weight.abs().max()


# Sectors, ties and zeros


@pytest.mark.parametrize(("z", "code"), SECTORS.items(), ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20, 0.1])
def test_sectors_are_half_open_and_zero_goes_to_one(z, code, size):
    z = torch.tensor([z * size], dtype=torch.complex64)
    assert phase_encode(z.real, z.imag).item() == code


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("other", [0.0, -0.0])
def test_the_sign_of_zero_does_not_matter(zero, other):
    assert phase_encode(torch.tensor([zero]), torch.tensor([other])).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("z", "code"), SECTORS.items(), ids=str)
def test_codes_of_ties_do_not_depend_on_position(z, code, dtype):
    # 37 entries: vectorised loops and their scalar tails see the same value
    for shape in ((2, 74), (74, 2), (14, 22)):
        codes, _ = phase_quantize(matrix_of([z], shape).to(dtype), stages=1)
        assert (codes == code).all()


def test_one_last_bit_beside_a_tie_decides():
    one, below = torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert phase_encode(one, below).item() == 1
    assert phase_encode(below, one).item() == 3


def test_sectors_of_random_directions_are_those_of_the_angle():
    z = torch.randn(10_000, dtype=torch.complex128)
    true_codes, _, _, margin = naive.phase_stage(z)
    assert margin > 1e-9
    assert torch.equal(phase_encode(z.real, z.imag), true_codes)


def test_codes_stand_for_minus_one_one_minus_i_i():
    re, im = phase_units(torch.arange(4, dtype=torch.uint8))
    assert torch.complex(re, im).tolist() == [-1, 1, -1j, 1j]


# Codes and scales as values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [*map(METHODS.get, PAPER), PhaseScheme(scales="joint", granularity="row")], ids=str)
def test_statistics_are_float32_whatever_the_dtype_of_the_weight(scheme, dtype):
    weight = torch.randn(64, 96).to(dtype)
    codes, scales = scheme.quantize(weight)
    wide_codes, wide_scales = scheme.quantize(weight.float())
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float32
    assert torch.equal(codes, wide_codes)
    assert torch.equal(scales, wide_scales)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    ("granularity", "group"), [("tensor", ()), ("row", (5,)), ("tile", (2, 3))], ids=["tensor", "row", "tile"]
)
def test_codes_and_scales_have_the_documented_shapes_and_values(stages, granularity, group):
    scheme = PhaseScheme(stages=stages, granularity=granularity, tile=3)
    codes, scales = scheme.quantize(torch.randn(10, 14))
    assert codes.shape == (stages, 2, 5, 7)
    assert codes.max() <= 3
    assert scales.shape == scheme.scale_shape(10, 14) == (stages, 2, 2, *group)
    assert (scales >= 1e-6).all()


@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v2"], PhaseScheme(scales="joint", granularity="tile")])
def test_strides_of_the_weight_do_not_matter(scheme):
    weight = torch.randn(24, 40)
    views = {
        "transposed": weight.T.contiguous().T,
        "every other": torch.randn(24, 80).index_copy_(1, torch.arange(0, 80, 2), weight)[:, ::2],
    }
    codes, scales = scheme.quantize(weight)
    for name, view in views.items():
        assert not view.is_contiguous()
        view_codes, view_scales = scheme.quantize(view)
        assert torch.equal(view_codes, codes), name
        # sums may run in another order
        torch.testing.assert_close(view_scales, scales, rtol=1e-6, atol=0)


def test_the_weight_is_not_changed():
    weight = torch.randn(8, 12)
    before = weight.clone()
    phase_quantize(weight, stages=3, refits=4)
    assert torch.equal(weight, before)


def test_given_scales_are_used_as_they_are_and_small_ones_clamped():
    weight = torch.randn(8, 12)
    given = torch.rand(2, 2, 2) + 0.5
    given[1, 0, 1] = -3.0
    codes, scales = phase_quantize(weight, stages=2, scales=given)
    assert torch.equal(scales, given.clamp(min=1e-6))
    # the first stage's codes depend on no scale; the second's are those of what the first left over
    assert torch.equal(codes[:1], phase_quantize(weight, stages=1)[0])
    rest = weight - phase_dequantize(codes[:1], scales[:1])
    assert torch.equal(codes[1:], phase_quantize(rest, stages=1)[0])


@pytest.mark.parametrize("method", PAPER)
def test_quantizing_with_its_own_mean_scales_changes_nothing(method):
    weight = torch.randn(16, 24)
    codes, scales = METHODS[method].quantize(weight)
    again_codes, again_scales = METHODS[method].quantize(weight, scales)
    assert torch.equal(again_codes, codes)
    assert torch.equal(again_scales, scales)


@pytest.mark.parametrize("shape", [(3, 4), (4, 5)], ids=str)
def test_odd_sides_are_an_error(shape):
    with pytest.raises(ValueError, match="even, nonzero sides"):
        phase_quantize(torch.zeros(shape), stages=1)


# Granularity


@pytest.mark.parametrize("scales", ["mean", "joint"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_row_granularity_equals_each_pair_of_rows_by_itself(stages, scales):
    weight = torch.randn(12, 40) * torch.logspace(-3, 0, 12)[:, None]
    codes, row_scales = PhaseScheme(stages=stages, granularity="row", scales=scales).quantize(weight)
    for r in range(6):
        alone_codes, alone_scales = PhaseScheme(stages=stages, scales=scales).quantize(weight[[r, r + 6]])
        assert torch.equal(codes[:, :, r : r + 1], alone_codes)
        torch.testing.assert_close(row_scales[..., r], alone_scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scales", ["mean", "joint"])
@pytest.mark.parametrize("shape", [(16, 24), (14, 22), (6, 50)], ids=str)  # 4 divides 8 and 12, not 7, 11, 3 or 25
def test_tile_granularity_equals_each_tile_by_itself(shape, scales):
    weight, tile = torch.randn(shape), 4
    n, m = shape[0] // 2, shape[1] // 2
    codes, tile_scales = PhaseScheme(stages=2, granularity="tile", tile=tile, scales=scales).quantize(weight)
    for i in range(math.ceil(n / tile)):
        for j in range(math.ceil(m / tile)):
            rows = torch.arange(i * tile, min(n, i * tile + tile))
            cols = torch.arange(j * tile, min(m, j * tile + tile))
            block = weight[torch.cat((rows, rows + n))][:, torch.cat((cols, cols + m))]
            alone_codes, alone_scales = PhaseScheme(stages=2, scales=scales).quantize(block)
            assert torch.equal(codes[:, :, rows][:, :, :, cols], alone_codes)
            torch.testing.assert_close(tile_scales[..., i, j], alone_scales, rtol=2e-6, atol=0)


def test_a_tile_larger_than_the_matrix_equals_tensor_granularity():
    weight = torch.randn(10, 14)
    codes, scales = PhaseScheme(granularity="tile", tile=64).quantize(weight)
    tensor_codes, tensor_scales = PhaseScheme(granularity="tensor").quantize(weight)
    assert torch.equal(codes, tensor_codes)
    torch.testing.assert_close(scales.flatten(), tensor_scales.flatten(), rtol=1e-6, atol=0)


def test_per_row_scales_lower_the_error_of_rows_of_different_size():
    weight = torch.randn(256, 256) * torch.exp(0.3 * torch.randn(256))[:, None]
    assert relative_mse(weight, PhaseScheme(granularity="row")) < 0.9 * relative_mse(weight, PhaseScheme())


# The joint fit


@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    stages=st.integers(1, 4),
    granularity=st.sampled_from(["tensor", "row", "tile"]),
    tails=st.sampled_from(["gaussian", "cauchy", "sparse", "few values"]),
    seed=st.integers(0, 2**31),
)
def test_joint_scales_never_have_a_larger_squared_error_than_mean_scales(n, m, stages, granularity, tails, seed):
    torch.manual_seed(seed)
    weight = torch.randn(2 * n, 2 * m)
    if tails == "cauchy":
        weight = weight / torch.randn_like(weight)
    elif tails == "sparse":
        weight = weight * (torch.rand_like(weight) < 0.3)
    elif tails == "few values":
        weight = weight.round()
    errors = {}
    for scales in ("mean", "joint"):
        scheme = PhaseScheme(stages=stages, granularity=granularity, tile=4, scales=scales)
        dense = scheme.dequantize(*scheme.quantize(weight))
        errors[scales] = (dense.double() - weight.double()).norm()
    # float32 decides which of two equal errors is smaller
    assert errors["joint"] <= errors["mean"] + 1e-6 * weight.norm()


@pytest.mark.parametrize("seed", range(40))
def test_a_refit_that_would_raise_the_error_is_not_kept(seed):
    # new codes are greedy and can be worse ones: one in twenty of such small matrices of few values shows it
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).round()
    mean, joint = (PhaseScheme(stages=4, scales=scales) for scales in ("mean", "joint"))
    errors = [(scheme.dequantize(*scheme.quantize(weight)) - weight).double().norm() for scheme in (joint, mean)]
    assert errors[0] <= errors[1] + 1e-6 * weight.norm()


@pytest.mark.parametrize("granularity", ["row", "tile"])
def test_joint_scales_are_not_worse_in_any_group(granularity):
    weight = torch.randn(32, 32) / torch.randn(32, 32)
    errors = {}
    for scales in ("mean", "joint"):
        scheme = PhaseScheme(stages=3, granularity=granularity, tile=4, scales=scales)
        squared = (scheme.dequantize(*scheme.quantize(weight)) - weight).double().square()
        blocks = squared.reshape(2, 16, 2, 16).sum((0, 2))  # of each 2x2 block: U and W entry (i, j) together
        errors[scales] = blocks.sum(1) if granularity == "row" else blocks.reshape(4, 4, 4, 4).sum((1, 3))
    assert (errors["joint"] <= errors["mean"] * (1 + 1e-5)).all()
    assert errors["joint"].sum() < errors["mean"].sum()


@pytest.mark.parametrize(
    ("stages", "scales", "expected"),
    [
        (1, "mean", 0.364),
        (1, "joint", 0.364),
        (2, "mean", 0.1305),
        (3, "mean", 0.0585),
        (4, "mean", 0.033),
        (2, "joint", 0.1175),
        (3, "joint", 0.037),
    ],
)
def test_relative_error_on_gaussian_weights_is_the_known_one(stages, scales, expected):
    # expected: measured values of three digits; the sampling error of a million weights is a few times 1e-4
    error = relative_mse(torch.randn(1024, 1024), PhaseScheme(stages=stages, scales=scales))
    assert error == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_joint_fit_is_stationary_under_least_squares(stages):
    # at a least-squares fit the error of U (and W) on an axis is orthogonal to every stage's units on that axis
    weight = torch.randn(64, 64)
    scheme = PhaseScheme(stages=stages, scales="joint")
    codes, scales = scheme.quantize(weight)
    slope = scheme.scale_gradient(scheme.dequantize(codes, scales) - weight, codes)
    mean_codes, mean_scales = PhaseScheme(stages=stages).quantize(weight)
    mean_slope = scheme.scale_gradient(scheme.dequantize(mean_codes, mean_scales) - weight, mean_codes)
    assert slope.abs().max() < 1e-4 * mean_slope.abs().max()


def test_more_stages_lower_the_error():
    weight = torch.randn(64, 64)
    errors = [relative_mse(weight, PhaseScheme(stages=t, scales="joint")) for t in range(1, 7)]
    assert all(after < before for before, after in itertools.pairwise(errors))


# Gradient of the scales


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile"])
@pytest.mark.parametrize("stages", [1, 3])
def test_scale_gradient_is_that_of_autograd_through_dequantize(stages, granularity):
    scheme = PhaseScheme(stages=stages, granularity=granularity, tile=3)
    codes, scales = scheme.quantize(torch.randn(10, 16))
    grad = torch.randn(10, 16)
    scales.requires_grad_()
    (scheme.dequantize(codes, scales) * grad).sum().backward()
    torch.testing.assert_close(scheme.scale_gradient(grad, codes), scales.grad, rtol=1e-5, atol=1e-5)
