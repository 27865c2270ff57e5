"""The widely-linear form is a lossless, unique change of basis."""

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairy2i import from_widely_linear, to_widely_linear
from fairy2i.widely_linear import apply_widely_linear, from_parts, parts_gradient, to_parts

EPS = torch.finfo(torch.float64).eps
HALF_SIDES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def gaussian(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(n=HALF_SIDES, m=HALF_SIDES, seed=SEEDS, size=st.sampled_from([1e-30, 1.0, 1e30]))
def test_round_trip_is_lossless_to_float64_rounding(n, m, seed, size):
    r = gaussian(seed, 2 * n, 2 * m) * size
    back = from_widely_linear(*to_widely_linear(r))
    assert back.dtype == torch.float64
    # two sums of entries of one 2x2 block, each rounded once
    assert (back - r).abs().max() <= 2 * EPS * r.abs().max()


@given(n=HALF_SIDES, m=HALF_SIDES, seed=SEEDS)
def test_the_form_is_unique_so_u_and_w_come_back(n, m, seed):
    u, w = (torch.complex(gaussian(seed + k, n, m), gaussian(seed + k + 9, n, m)) for k in range(2))
    u_back, w_back = to_widely_linear(from_widely_linear(u, w))
    torch.testing.assert_close((u_back, w_back), (u, w), rtol=0, atol=4 * EPS * max(u.abs().max(), w.abs().max()))


@given(n=HALF_SIDES, m=HALF_SIDES, batch=st.integers(1, 5), seed=SEEDS)
def test_u_x_plus_w_conj_x_equals_r_x(n, m, batch, seed):
    r, x = gaussian(seed, 2 * n, 2 * m), gaussian(seed + 1, batch, 2 * m)
    u, w = to_widely_linear(r)
    torch.testing.assert_close(apply_widely_linear(x, u, w), x @ r.T, rtol=1e-13, atol=1e-13)


@given(n=HALF_SIDES, m=HALF_SIDES, seed=SEEDS)
def test_u_and_w_are_those_of_the_definition(n, m, seed):
    r = gaussian(seed, 2 * n, 2 * m)
    torch.testing.assert_close(to_widely_linear(r), naive.widely_linear(r), rtol=0, atol=4 * EPS * r.abs().max())


def test_worked_example_of_one_block():
    # A11 A12 / A21 A22 = 1 2 / 3 8: Re U = 9/2, Im U = 1/2, Re W = -7/2, Im W = 5/2
    u, w = to_widely_linear(torch.tensor([[1.0, 2.0], [3.0, 8.0]]))
    assert u.item() == 4.5 + 0.5j
    assert w.item() == -3.5 + 2.5j


@given(n=HALF_SIDES, m=HALF_SIDES, seed=SEEDS)
def test_parts_gradient_is_the_adjoint_of_from_parts(n, m, seed):
    re, im, grad = gaussian(seed, 2, n, m), gaussian(seed + 1, 2, n, m), gaussian(seed + 2, 2 * n, 2 * m)
    grad_re, grad_im = parts_gradient(grad)
    torch.testing.assert_close(
        (from_parts(re, im) * grad).sum(), (re * grad_re).sum() + (im * grad_im).sum(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_weights_are_promoted_to_complex64_and_come_back_exactly(dtype):
    r = torch.randn(8, 6).to(dtype)
    u, w = to_widely_linear(r)
    assert u.dtype == w.dtype == torch.complex64
    torch.testing.assert_close(from_widely_linear(u, w), r.float(), rtol=0, atol=2e-7 * r.abs().max().item())


def test_parts_keep_the_dtype_of_the_weight():
    assert all(part.dtype == torch.bfloat16 for part in to_parts(torch.ones(4, 4, dtype=torch.bfloat16)))


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 1), (0, 4), (4, 0), (4,), (2, 4, 4)])
def test_a_shape_that_cannot_be_paired_is_an_error_that_shows_it(shape):
    with pytest.raises(ValueError, match=r"even, nonzero sides, got shape \("):
        to_widely_linear(torch.zeros(shape))


def test_wrong_kinds_of_input_are_errors():
    with pytest.raises(TypeError, match="int64"):
        to_widely_linear(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="complex"):
        from_widely_linear(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 2\) and \(2, 3\)"):
        from_widely_linear(torch.zeros(2, 2) + 0j, torch.zeros(2, 3) + 0j)
    with pytest.raises(ValueError, match="expected 6 input features"):
        apply_widely_linear(torch.zeros(4), torch.zeros(2, 3) + 0j, torch.zeros(2, 3) + 0j)
