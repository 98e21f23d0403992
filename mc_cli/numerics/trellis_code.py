"""The level that a window of a trellis code stands for, found by look-ups in small tables.

A window's 12 bits are looked up four by four; the xor of what is found is its hash. The low six bits of that choose a
level, and the highest one negates it. So a processor needs tables of 16 bytes, or of 64 where those are in reach, and
one table of levels. Up to 2 bits, where the look-ups are what takes the time, no hash negates, and the first six bits
of a window enter it as they are: two look-ups in tables of 64.

The tables are from `recipes/trellis_code.py`, with its defaults, for one rate after the other. They are better
than tables at random because paths that part, and paths that meet, have levels far from each other.
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
UNIT = 3.0378 / 127  # step of a level for weights of variance 1
RATES = tuple(Fraction(half, 2) for half in range(2, 11))
SIGNED_FROM = 2.5  # bits per weight: from here on hashes negate; as in native/trellis_product.h
_NEGATIVE, _LEVEL = 0x80, 0x3F  # bits of a hash


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
        """Tables from places of levels in ascending order, not hashes; `positive`: the upper half of those levels.

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
        """Tables from the two texts that `written` gives."""
        entries = bytes.fromhex(parts)
        signed = (level - 256 if level > 127 else level for level in bytes.fromhex(levels))
        return cls(tuple(tuple(entries[16 * part : 16 * part + 16]) for part in range(3)), tuple(signed))

    def written(self) -> str:
        """Python text of a tuple of two strings."""
        parts = bytes(entry for part in self.parts for entry in part)
        return f'("{parts.hex()}", "{bytes(level & 0xFF for level in self.levels).hex()}")'

    def hashes(self) -> Tensor:
        """int64 [4096], by window."""
        return by_windows(torch.tensor(self.parts))


def by_windows(parts: Iterable[Tensor]) -> Tensor:
    """int64 [4096]: for every window the xor of what three tables, int64 [16], give for each four of its bits."""
    windows = torch.arange(WINDOWS)
    first, second, third = parts
    return first[windows & 15] ^ second[windows >> 4 & 15] ^ third[windows >> 8]


def _turned(place: int) -> int:
    """Six bits in reverse order."""
    return int(f"{place:06b}"[::-1], 2)


# Per rate: parts and levels of its tables. The comment on a line gives the error on normal weights of variance 1 where
# all matter alike, and where every second one matters much, weighted, as the recipe draws them.
CODES = {
    Fraction(1, 1): (  # 0.27134, 0.08881
        "000102030405060708090a0b0c0d0e0f372717072d3d0d1d2333031324340414282f1f3621182515331e0e273e113404",
        "9a01e61ad40ef42cc707ee24de14f93dbd02ea1fdc11f834cf0af028e317fe4f"
        "b102e91dd810f631cc08ef24e116fe43c307ec22dc12f939d40cf22ce61aff66",
    ),
    Fraction(3, 2): (  # 0.13867, 0.04117
        "000102030405060708090a0b0c0d0e0f3525150508182838031323331b0b3b2b301f173e032a251d112c260f220d3428",
        "9101e61dd10ef432c307ec26dc15fa43b604e922d712f739cb0bf02be119fe57"
        "a902e71fd510f535c709ee29de17fc4abd06eb24da14f93dce0cf22fe31aff6f",
    ),
    Fraction(2, 1): (  # 0.07022, 0.02047
        "000102030405060708090a0b0c0d0e0f1f0f3f2f2a3a0a1a3525150506162636032f360b2a1d0539110e3722000c3428",
        "8c01e51dd10ef432c207ec26dc15fa45b204e922d712f739cb0bf02ce119fe5c"
        "a402e71fd410f535c709ee29de17fc4ebb06eb24da14f93ece0cf22fe31bff74",
    ),
    Fraction(5, 2): (  # 0.03580, 0.01029
        "bb009e20af108c30b60a9229a618863914101610a6a2a4a20f0b0d0b999d9b9db6a23b9b0a8c192c2a188cba9339bc0c",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4145484d535c687f",
    ),
    Fraction(3, 1): (  # 0.01823, 0.00557
        "bd009e20ae118c31b6099628a7188439181c1e1ab6b2b0b493979591b0b4b6b296ba3395bc8e1aa20e258c122038a103",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4144484d545d6a7f",
    ),
    Fraction(7, 2): (  # 0.00934, 0.00319
        "bf019e21ae118a31b60a9729a71b8639aaaaadaf939394960a0a0d0f8f8f888a90a839100e8d2825b50086b91b31a398",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4145484d545e6c7f",
    ),
    Fraction(4, 1): (  # 0.00495, 0.00205
        "be009e21af108e31b7099729a6188739808781871512141204030503bcbbbdbbaf2539bc0e9232071e8288b5a0982810",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4144484d545e6c7f",
    ),
    Fraction(9, 2): (  # 0.00280, 0.00146
        "bf009e21af108e31b7089629a6188639a6a2a4a00206000480848286babeb8bc243fa0331e8c9680b210b90c2c07ad39",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4144484e56606c7f",
    ),
    Fraction(5, 1): (  # 0.00168, 0.00118
        "bf009e21af108e31b7089629a7188339a7a3a4a00206010525212622aaaea9ad99ab0da12597bc1e10b20780328a3bad",
        "0001020304050506070809090a0b0c0d0e0f0f101112131415161718191a1b1c"
        "1d1e1f20212223242627282a2b2c2e2f31333436383a3c3f4144484e56606c7f",
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
    """uint8 [rates, 9, 3, 64]: for products with codes of every rate.

    [:, 0]      by the low and by the high six bits of a window, whose xor is the hash; 128 + level by the hash
    [:, 1 + b]  the same for windows whose low bits begin at bit b of a byte, and their high ones six bits later, for
                processors that take six bits from two bytes without bringing them in order: see `_turn`. Up to 2 bits,
                where the low bits enter the hash as they are, that is in their order
    """
    six, found = torch.arange(64), []
    for rate in RATES:
        hashes = tables(rate).hashes()
        low, high, levels = hashes[six] ^ hashes[0], hashes[six << 6], torch.tensor(tables(rate).levels) + 128
        found.append(torch.stack([low, high, levels]))
        for begin in range(8):
            own, later = _turn(begin), _turn((begin + 6) % 8)
            order = 0 if rate >= SIGNED_FROM else own  # its place in a hash
            turned = torch.empty((3, 64), dtype=torch.int64)
            turned[0, _rotated(six, own)] = _rotated(low, order)
            turned[1, _rotated(six, later)] = _rotated(high, order)
            turned[2, _rotated(six, order)] = levels
            found.append(turned)
    return torch.stack(found).to(torch.uint8).view(len(RATES), 9, 3, 64)


def _turn(begin: int) -> int:
    """Places by which six bits are rotated that begin at this bit of a byte.

    Bits of the first byte come down by two places, and those of the second stay at the lowest ones.
    """
    return max(begin - 2, 0)


def _rotated(entries: Tensor, places: int) -> Tensor:
    """The low six bits, rotated towards higher places; the other two stay."""
    low = entries & 63
    return (entries & ~63) | (low << places | low >> (6 - places)) & 63
