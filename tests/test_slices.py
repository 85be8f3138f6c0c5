"""Packing by slices: the bytes of the hqq package, round trips, and what is refused."""

import pytest
import torch
from hqq.core.bitpack import BitPack
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.kernels import pack_slices, unpack_slices
from course_utils.kernels.slices import PER_WORD

THEIRS = {
    8: (BitPack.pack_8bit_u8, BitPack.unpack_8bit_u8),
    4: (BitPack.pack_4bit_u8, BitPack.unpack_4bit_u8),
    3: (BitPack.pack_3bit_32, BitPack.unpack_3bit_32),
    2: (BitPack.pack_2bit_u8, BitPack.unpack_2bit_u8),
    1: (BitPack.pack_1bit_u8, BitPack.unpack_1bit_u8),
}


@given(
    st.sampled_from(tuple(PER_WORD)), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31)
)
@settings(max_examples=80, deadline=None)
def test_words_are_those_of_hqq_and_come_back(n_bits, rows, n, seed):
    """At 3 bits any number of rows; otherwise whole slices."""
    rows = rows if n_bits == 3 else rows * PER_WORD[n_bits]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**n_bits, (rows, n), generator=generator, dtype=torch.uint8)
    words, (pack, unpack) = pack_slices(codes, n_bits), THEIRS[n_bits]
    assert words.dtype == pack(codes).dtype and torch.equal(words, pack(codes))
    assert torch.equal(unpack_slices(words, n_bits, rows), codes)
    assert torch.equal(unpack(words)[:rows], codes)


def test_the_first_slice_is_in_the_highest_bits():
    codes = torch.tensor([[1], [2], [3], [4]])
    assert pack_slices(codes, 4).tolist() == [[0x13], [0x24]]  # not 0x12, 0x34: no neighbours
    assert pack_slices(codes % 4, 2).tolist() == [[0b01_10_11_00]]


def test_three_bits_take_3_2_and_leave_the_sign_alone():
    codes = torch.full((100, 4), 7)
    words = pack_slices(codes, 3)
    assert 8 * words.nbytes / codes.numel() == 3.2
    assert (words == 2**30 - 1).all()


def test_refusals():
    good = torch.zeros(8, 2, dtype=torch.uint8)
    for call, error, text in (
        (lambda: pack_slices(good, 5), ValueError, "n_bits 5: slices are packed at 8, 4, 3, 2, 1"),
        (lambda: pack_slices(good.float(), 4), TypeError, "codes to pack are integers"),
        (lambda: pack_slices(good[0], 4), ValueError, r"are \[rows, n\], got \(2,\)"),
        (lambda: pack_slices(good + 16, 4), ValueError, "code 16 does not fit into 4 bits"),
        (lambda: pack_slices(good[:6], 2), ValueError, "6 rows are no multiple of 4"),
        (lambda: unpack_slices(good, 3, 80), TypeError, "are torch.int32, got torch.uint8"),
        (lambda: unpack_slices(good, 4, 8), ValueError, r"are \[4, n\] words, got \(8, 2\)"),
    ):
        with pytest.raises(error, match=text):
            call()
