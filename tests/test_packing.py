"""Codes in bytes, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.kernels import pack, unpack

WIDTHS = range(1, 9)


@settings(max_examples=150, deadline=None)
@given(
    n_bits=st.integers(1, 8),
    rows=st.integers(1, 3),
    n=st.integers(0, 70),
    seed=st.integers(0, 2**31),
)
def test_unpack_gives_back_what_was_packed(n_bits, rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**n_bits, (rows, n), generator=generator)
    packed = pack(codes, n_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-n * n_bits // 8))  # no bit of waste but in the last byte
    assert torch.equal(unpack(packed, n_bits, n), codes.to(torch.uint8))


@pytest.mark.parametrize("n_bits", WIDTHS)
def test_the_bytes_are_one_little_endian_bit_stream(n_bits):
    codes = torch.randint(0, 2**n_bits, (37,), generator=torch.Generator().manual_seed(n_bits))
    stream = sum(int(code) << (n_bits * i) for i, code in enumerate(codes))
    assert bytes(pack(codes, n_bits).tolist()) == stream.to_bytes(-(-37 * n_bits // 8), "little")


def test_layouts_by_hand():
    assert pack(torch.tensor([0x1, 0x2, 0x3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([0, 1, 2, 3]), 2).tolist() == [0b11100100]
    # eight codes of three bits in three bytes: 111 110 101 100 011 010 001 000 from the highest bit
    assert pack(torch.arange(8), 3).tolist() == [0b10001000, 0b11000110, 0b11111010]
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_is_packed_alike(dtype):
    codes = torch.tensor([[5, 0, 7], [1, 2, 3]])
    assert torch.equal(pack(codes.to(dtype), 3), pack(codes, 3))


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_the_bytes_of_transposed_codes_lie_side_by_side(n_bits):
    codes = torch.randint(0, 2**n_bits, (8, 24)).T
    packed = pack(codes, n_bits)
    assert packed.stride() == (packed.shape[1], 1)
    assert pack(codes[:1, :7], n_bits).stride()[0] == pack(codes[:1, :7], n_bits).shape[1]
    assert torch.equal(packed, pack(codes.contiguous(), n_bits))


def test_leading_dimensions_are_kept():
    codes = torch.randint(0, 8, (2, 3, 5))
    assert torch.equal(unpack(pack(codes, 3), 3, 5), codes.to(torch.uint8))


@pytest.mark.parametrize("code", [-1, 8])
def test_a_code_out_of_range_is_refused(code):
    with pytest.raises(ValueError, match=rf"code {code} does not fit into 3 bits \(0..7\)"):
        pack(torch.tensor([1, code]), 3)


@pytest.mark.parametrize("n_bits", [0, 9, -1, 3.0])
def test_other_widths_are_refused(n_bits):
    with pytest.raises(ValueError, match=f"n_bits {n_bits} must be a whole number from 1 to 8"):
        pack(torch.tensor([0]), n_bits)
    with pytest.raises(ValueError, match=f"n_bits {n_bits} must be a whole number from 1 to 8"):
        unpack(torch.zeros(1, dtype=torch.uint8), n_bits, 1)


def test_what_is_no_codes_is_refused():
    with pytest.raises(TypeError, match=r"integers, got torch.float32"):
        pack(torch.tensor([1.0]), 4)
    with pytest.raises(TypeError, match=r"integers, got torch.bool"):
        pack(torch.tensor([True]), 4)
    with pytest.raises(ValueError, match="got a scalar"):
        pack(torch.tensor(1), 4)
    with pytest.raises(TypeError, match=r"uint8, got torch.int32"):
        unpack(torch.zeros(2, dtype=torch.int32), 4, 4)


def test_bytes_that_are_missing_or_too_many_are_refused():
    packed = pack(torch.arange(8), 3)
    for n in (5, 9, 11):
        with pytest.raises(ValueError, match=rf"{n} codes of 3 bits are"):
            unpack(packed, 3, n)
