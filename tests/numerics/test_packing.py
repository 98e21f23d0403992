"""Bit packing against a Python-integer bit stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_cli.errors import ShapeError
from mc_cli.numerics.packing import pack_codes, unpack_codes
from tests.numerics.twins import packed_row, unpacked_row


@st.composite
def code_rows(draw):
    """(bits, rows of equally many codes)."""
    bits = draw(st.integers(1, 8))
    count = draw(st.integers(1, 41))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@given(code_rows())
@settings(max_examples=200, deadline=None)
def test_rows_are_bit_streams_and_come_back(case):
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_codes(codes, bits=bits)
    assert [bytes(row.tolist()) for row in packed] == [packed_row(row, bits) for row in rows]
    assert torch.equal(unpack_codes(packed, bits=bits, count=codes.shape[1]), codes)


@given(st.integers(1, 8), st.integers(0, 2**30))
@settings(max_examples=50, deadline=None)
def test_any_bytes_unpack_like_the_bit_stream(bits, seed):
    packed = torch.randint(0, 256, (2, 3 * bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    expected = [unpacked_row(bytes(row.tolist()), bits, 22) for row in packed]
    assert unpack_codes(packed, bits=bits, count=22).tolist() == expected


def test_three_bits_by_hand():
    # 1, 2, 3, 4, 5, 6, 7, 0 from the low end: 000 111 110 101 100 011 010 001
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 5]], dtype=torch.uint8)
    assert pack_codes(codes, bits=3).tolist() == [[0b11010001, 0b01011000, 0b00011111, 5, 0, 0]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_more_words_than_one_piece(bits, monkeypatch):
    codes = torch.randint(0, 2**bits, (3, 5, 100), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    whole = pack_codes(codes, bits=bits)
    monkeypatch.setattr("mc_cli.numerics.packing._WORDS_AT_ONCE", {"cpu": 7})
    assert torch.equal(pack_codes(codes, bits=bits), whole)
    assert torch.equal(unpack_codes(whole, bits=bits, count=100), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_views_strides_and_odd_offsets(bits):
    codes = torch.randint(0, 2**bits, (6, 4, 24), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    turned = codes.transpose(0, 1)
    packed = pack_codes(turned, bits=bits)
    assert torch.equal(packed, pack_codes(turned.contiguous(), bits=bits))
    buffer = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    buffer[1:] = packed.flatten()
    shifted = buffer[1:].view(packed.shape)
    assert torch.equal(unpack_codes(shifted, bits=bits, count=24), turned)
    assert torch.equal(unpack_codes(packed[1:, ::2], bits=bits, count=24), turned[1:, ::2])


@pytest.mark.parametrize("bits", range(1, 9))
def test_inputs_are_left_alone_and_high_bits_dropped(bits):
    codes = torch.full((2, 9), 255, dtype=torch.uint8)
    packed = pack_codes(codes, bits=bits)
    kept = packed.clone()
    assert torch.equal(unpack_codes(packed, bits=bits, count=9), codes & (2**bits - 1))
    assert torch.equal(packed, kept) and bool((codes == 255).all())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="take 6 bytes"):
        unpack_codes(torch.zeros(2, 5, dtype=torch.uint8), bits=3, count=16)
    with pytest.raises(ShapeError, match="1 to 8 bits, not 9"):
        pack_codes(torch.zeros(8, dtype=torch.uint8), bits=9)
    with pytest.raises(ShapeError, match="int64"):
        pack_codes(torch.zeros(8, dtype=torch.int64), bits=2)
