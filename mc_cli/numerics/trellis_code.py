"""What a window of a trellis code stands for: a level, found by look-ups in small tables.

A window's 12 bits are looked up four by four; the xor of what is found is its hash. The low six bits of that choose a
level, and the highest one negates it. So a processor needs tables of 16 bytes, or of 64 where those are in reach, and
one table of levels. Below 3 bits, where the look-ups are what takes the time, no hash negates, and the first six bits
of a window enter it as they are: two look-ups in tables of 64.

The tables are from `recipes/trellis_code.py`, with its defaults, for one rate after the other. What makes them better
than tables at random: paths that part, and paths that meet, have levels far from each other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

STATE_BITS = 12
WINDOWS = 1 << STATE_BITS
UNIT = 3.0378 / 127  # of a level, where the weights have variance 1
RATES = tuple(Fraction(half, 2) for half in range(2, 11))
SIGNED_FROM = 3  # bits per weight: from here on hashes negate; as in native/trellis_product.c
_NEGATIVE, _LEVEL = 0x80, 0x3F  # of a hash


@dataclass(frozen=True)
class Tables:
    """The code of one rate.

    parts   [3][16]: what each four bits of a window, the lowest ones first, give to its hash
    levels  [64], by the low six bits of a hash
    """

    parts: tuple[tuple[int, ...], ...]
    levels: tuple[int, ...]

    @classmethod
    def by_places(cls, parts: Sequence[Iterable[int]], positive: Iterable[int]) -> Tables:
        """From places of levels in ascending order, instead of hashes; `positive`: the upper half of those levels.

        With 128 levels a hash is a sign and the place among the positive ones; with 64 it is the place, its bits in
        reverse order, so that the low bits of a window stand for themselves.
        """
        upper = tuple(int(level) for level in positive)
        if len(upper) == 64:
            signed = [[_NEGATIVE | (p ^ _LEVEL) & _LEVEL if p >> 6 else p for p in part] for part in parts]
            signed[0] = [hash_ ^ _NEGATIVE ^ _LEVEL for hash_ in signed[0]]  # place 0 is the most negative level
            return cls(tuple(map(tuple, signed)), upper)
        turned = tuple(tuple(_turned(place) for place in part) for part in parts)
        levels = tuple(-level for level in reversed(upper)) + upper
        return cls(turned, tuple(levels[_turned(hash_)] for hash_ in range(64)))

    @classmethod
    def read(cls, parts: str, levels: str) -> Tables:
        """From what `written` gives."""
        entries = bytes.fromhex(parts)
        signed = (level - 256 if level > 127 else level for level in bytes.fromhex(levels))
        return cls(tuple(tuple(entries[16 * part : 16 * part + 16]) for part in range(3)), tuple(signed))

    def written(self) -> str:
        """Python text of a tuple of two strings."""
        parts = bytes(entry for part in self.parts for entry in part)
        return f'("{parts.hex()}", "{bytes(level & 0xFF for level in self.levels).hex()}")'

    def hashes(self) -> Tensor:
        """int64 [4096], by window."""
        windows = torch.arange(WINDOWS)
        first, second, third = torch.tensor(self.parts)
        return first[windows & 15] ^ second[windows >> 4 & 15] ^ third[windows >> 8]


def _turned(place: int) -> int:
    """Six bits in reverse order."""
    return int(f"{place:06b}"[::-1], 2)


CODES = {  # by rate: parts and levels of its tables, and the squared error on normal weights of variance 1
    Fraction(1, 1): (  # 0.27089
        "000102030405060708090a0b0c0d0e0f0d1d2d3d12023222140434242e3e0e1e220a130b1d31212c1b3b023e1012280d",
        "a702e91ad60df42ec807ec23e014f73bc105ea20dd12f532d30cf129e516fc49"
        "b704ea1bd70ff42dce0bee23e016fb3fc509ec20dd14f938d20cf32ae617fe59",
    ),
    Fraction(3, 2): (  # 0.13833
        "000102030405060708090a0b0c0d0e0f2d3d0d1d203000101c0c3c2c3b2b1b0b1c2c39093f171c060d3d30182e1a272f",
        "9a00e71dd20df431c407ed26dc15fa42b804e922d812f736cb0af02be018fe4d"
        "b302e820d510f635ca09ee28de17fc48be06eb24da13f93ccf0cf32ee3190066",
    ),
    Fraction(2, 1): (  # 0.06996
        "000102030405060708090a0b0c0d0e0f2535051510003020342414040b1b2b3b3c080d1b0f1b1f060d192c1c2e1a2239",
        "9401e51ed00ff432c207ec26db16fa44b304e822d613f739cb0bf02ce019fe51"
        "af02e720d410f535c709ed2ade18fc4dbc06ea25da14f93ece0cf130e21bff6c",
    ),
    Fraction(5, 2): (  # 0.03623
        "000102030405060708090a0b0c0d0e0f091929393b2b1b0b1c0c3c2c28380818301e36223b070f29091d24282a0c0d1f",
        "9001e51dd10ef433c007ec26dc15fa43b304e922d712f739cb0bf02ce119fe57"
        "a902e71fd410f535c709ee29de17fc4dbd06eb24da14f940cd0cf22fe31bff70",
    ),
    Fraction(3, 1): (  # 0.01816
        "bf059e21af118e30b3089628a218863b888f8b8b2d2a2e2ea6a1a5a58c8b8f8f198a0a1e9e3c8e0ca7a8b72c3b9d28b3",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4344484d5157667f",
    ),
    Fraction(7, 2): (  # 0.00947
        "bf019f21ae118e35b2089628a719873832373134a3a6a0a527222421b7b2b4b101b09b0d30812138a89010a28e28bf19",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4145484c5158677f",
    ),
    Fraction(4, 1): (  # 0.00504
        "be009f21af108d31b7089628a7198638a2a5a1a42b2c282d868185801c1b1f1aa19db4b82e103e8d1a372006098496ad",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4144484c525b697f",
    ),
    Fraction(9, 2): (  # 0.00288
        "be019f20af118e30b7089629a71886399e9b9d983c393f3a1d181e1ba0a5a3a6abbb06949eb7a2319a8e112d3a83220a",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4144484c535d6b7f",
    ),
    Fraction(5, 1): (  # 0.00174
        "be009e21af118f31b7089628a61887383a3f393da6a3a5a19c999f9b838680841080010c20a28c9089392c9b309eb218",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4144484d545e6b7f",
    ),
}


@functools.cache
def tables(rate: Fraction) -> Tables:
    """The tables of a rate of RATES."""
    return Tables.read(*CODES[rate])


@functools.cache
def code_levels(rate: Fraction) -> Tensor:
    """int8 [4096]: the level of every window."""
    hashes = tables(rate).hashes()
    levels = torch.tensor(tables(rate).levels)[hashes & _LEVEL]
    return torch.where(hashes >= _NEGATIVE, -levels, levels).to(torch.int8)


@functools.cache
def code_values(rate: Fraction) -> Tensor:
    """float32 [4096]: the levels in units of the weights' standard deviation."""
    return code_levels(rate).float() * UNIT


@functools.cache
def lookup_tables() -> Tensor:
    """uint8 [rates, 3, 64]: by the low and the high six bits of a window, whose xor is the hash; 128 + level by it."""
    six, found = torch.arange(64), []
    for rate in RATES:
        hashes = tables(rate).hashes()
        found.append(torch.stack([hashes[six] ^ hashes[0], hashes[six << 6], torch.tensor(tables(rate).levels) + 128]))
    return torch.stack(found).to(torch.uint8)
