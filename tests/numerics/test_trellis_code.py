"""The tables of trellis codes: what they promise to kernels, and the ways to write them down."""

from __future__ import annotations

import ast
from fractions import Fraction

import pytest
import torch

from mc_cli.numerics.trellis_code import CODES, RATES, SIGNED_FROM, Tables, code_levels, lookup_tables, tables


def test_every_rate_has_a_code_of_its_own() -> None:
    assert tuple(sorted(CODES)) == RATES
    assert len({parts for parts, _ in CODES.values()}) == len(RATES)


@pytest.mark.parametrize("rate", RATES, ids=float)
def test_no_level_is_rare_or_frequent_and_every_one_has_its_negative(rate: Fraction) -> None:
    hashes = tables(rate).hashes() & (0xBF if rate >= SIGNED_FROM else 0x3F)
    frequent = hashes.bincount().float()
    frequent = frequent[frequent > 0]
    assert len(frequent) == (128 if rate >= SIGNED_FROM else 64)
    assert float(frequent.max()) < 2 * float(frequent.mean())
    assert rate >= SIGNED_FROM or float(frequent.min()) == float(frequent.max())
    negative = tables(rate).hashes() >= 128 if rate >= SIGNED_FROM else code_levels(rate) < 0
    assert int(negative.sum()) == 2048
    levels = set(code_levels(rate).tolist())
    assert levels == {-level for level in levels}


@pytest.mark.parametrize("rate", RATES, ids=float)
def test_the_lookup_tables_give_the_levels_of_all_windows(rate: Fraction) -> None:
    low, high, shifted = lookup_tables()[RATES.index(rate), 0].long()
    windows = torch.arange(4096)
    hashes = low[windows & 63] ^ high[windows >> 6]
    levels = shifted[hashes & 63] - 128
    assert torch.equal(torch.where(hashes >= 128, -levels, levels), code_levels(rate).long())


@pytest.mark.parametrize("begin", range(8))
@pytest.mark.parametrize("rate", RATES, ids=float)
def test_tables_for_windows_that_begin_within_a_byte(rate: Fraction, begin: int) -> None:
    """Six bits as native/trellis_avx512.c takes them from two bytes, from everything that may lie around them."""

    def six_bits(stream: torch.Tensor, bit: int) -> torch.Tensor:
        own, other = stream >> (bit & ~7) & 255, stream >> ((bit & ~7) + 8) & 255
        if bit % 8 < 2:
            return own >> bit % 8
        below = (1 << bit % 8 - 2) - 1
        return other & below | own >> 2 & ~below

    low, high, shifted = lookup_tables()[RATES.index(rate), 1 + begin].long()
    windows = torch.arange(4096).repeat(16)
    around = torch.randint(0, 1 << 24, windows.shape, generator=torch.Generator().manual_seed(begin))
    stream = around & ~(4095 << begin) | windows << begin
    first = six_bits(stream, begin)
    hashes = low[first & 63] ^ high[six_bits(stream, begin + 6) & 63]
    if rate < SIGNED_FROM:
        assert torch.equal(hashes & 63, (first ^ high[six_bits(stream, begin + 6) & 63]) & 63)
    levels = shifted[hashes & 63] - 128
    assert torch.equal(torch.where(hashes >= 128, -levels, levels), code_levels(rate)[windows].long())


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate < SIGNED_FROM], ids=float)
def test_narrow_codes_need_two_lookups(rate: Fraction) -> None:
    """Checks SIGNED_FROM as native/trellis_product.h takes it: the first table is none, and nothing negates."""
    low, high, _ = lookup_tables()[RATES.index(rate), 0]
    assert low.tolist() == list(range(64)) and int(high.max()) < 64


@pytest.mark.parametrize("rate", RATES, ids=float)
def test_what_is_written_is_read_back(rate: Fraction) -> None:
    assert Tables.read(*ast.literal_eval(tables(rate).written())) == tables(rate)


def test_places_become_hashes_that_stand_for_the_same_levels() -> None:
    for count in (64, 128):
        random = torch.Generator().manual_seed(count)
        parts = torch.randint(0, count, (3, 16), generator=random)
        upper = torch.arange(1, count // 2 + 1)
        found = Tables.by_places(parts.tolist(), upper)
        ascending = torch.cat([-upper.flip(0), upper])
        windows = torch.arange(4096)
        places = parts[0][windows & 15] ^ parts[1][windows >> 4 & 15] ^ parts[2][windows >> 8]
        hashes = found.hashes()
        levels = torch.tensor(found.levels)[hashes & 63]
        assert torch.equal(torch.where(hashes >= 128, -levels, levels), ascending[places])
