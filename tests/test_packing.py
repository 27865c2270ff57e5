"""The bit layout: a worked byte, what goes in comes out, and where each code sits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairy2i.packing import pack_codes, packed_columns, unpack_codes

BITS = st.sampled_from([1, 2])
SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 35))


def random_codes(shape, bits, seed=0):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_worked_byte_is_c6():
    packed = pack_codes(torch.tensor([2, 1, 0, 3], dtype=torch.uint8), 2)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0xC6]
    assert unpack_codes(torch.tensor([0xC6], dtype=torch.uint8), 4, 2).tolist() == [2, 1, 0, 3]


def test_the_first_of_eight_one_bit_codes_is_the_lowest_bit():
    assert pack_codes(torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [0x89, 0x01]


@given(shape=SHAPES, bits=BITS, seed=st.integers(0, 2**32))
def test_what_is_packed_unpacks_to_the_same_codes(shape, bits, seed):
    codes = random_codes(shape, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_columns(shape[-1], bits))
    back = unpack_codes(packed, shape[-1], bits)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@given(rows=st.integers(1, 3), columns=st.integers(1, 35), bits=BITS, seed=st.integers(0, 2**32))
def test_each_code_sits_where_the_format_says_and_all_other_bits_are_zero(rows, columns, bits, seed):
    codes = random_codes((rows, columns), bits, seed)
    per_byte = 8 // bits
    expected = [[0] * ((columns + per_byte - 1) // per_byte) for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            expected[i][j // per_byte] += int(codes[i, j]) * 2 ** (bits * (j % per_byte))
    assert pack_codes(codes, bits).tolist() == expected


@given(columns=st.integers(1, 35), bits=BITS)
def test_padding_bits_are_zero_where_every_code_is_full(columns, bits):
    packed = pack_codes(torch.full((columns,), 2**bits - 1, dtype=torch.uint8), bits)
    assert int.from_bytes(bytes(packed.tolist()), "little") == 2 ** (columns * bits) - 1


@pytest.mark.parametrize("bits", [1, 2])
def test_strides_of_codes_do_not_matter(bits):
    codes = random_codes((9, 6), bits)
    assert torch.equal(pack_codes(codes.T, bits), pack_codes(codes.T.contiguous(), bits))


def test_packing_leaves_the_codes_as_they_were():
    codes = random_codes((3, 8), 2)
    before = codes.clone()
    pack_codes(codes, 2)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(("code", "bits"), [(2, 1), (4, 2), (255, 2)])
def test_a_code_that_does_not_fit_is_an_error_that_names_it(code, bits):
    with pytest.raises(ValueError, match=f"a code of {code} does not fit into {bits} bits"):
        pack_codes(torch.tensor([0, code, 0], dtype=torch.uint8), bits)


@pytest.mark.parametrize("length", [2, 4])
def test_rows_of_another_length_are_an_error_that_says_what_they_need(length):
    with pytest.raises(ValueError, match=f"rows of 10 codes of 2 bits have 3 bytes, got {length}"):
        unpack_codes(torch.zeros(5, length, dtype=torch.uint8), 10, 2)
