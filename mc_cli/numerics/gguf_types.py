"""The block types of GGUF that weights can be coded in: sizes, factors of scales, levels. Imports no torch.

A weight is `step * unit - minimum`. A block of 256 weights (32 in the small types) has a float16 `d`, and every run of
`run` weights in it a small integer, so that step = d * factors[integer]. The K types with minimums have a second pair,
minimum = dmin * integer. A unit is a level of a list, one code a weight; or a point of a table with a sign for every
weight, one code for 8 or 4 neighbours (gguf_points.py). Points of the IQ1 types have signs of their own.
Source of the format: ggml's quantization types, as the Python package `gguf` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class GgufType:
    """One block type.

    bits         the width that a plan gives: of K types and Q8_0 the bits of a code, of IQ types all stored bits
    code_bits    bits of codes and signs alone, per weight
    block        weights of a block;  size_bytes   what it takes
    number       by which GGUF files name the type
    run          weights that share a step
    factors      by the stored integer of a run; (1.0,) where a block has one step
    minimums     how many integers a minimum can be; 0: the type has none
    levels       units of one weight each, rising; empty for the types of points
    vector       weights of a point; 1 for levels
    even         whether 8 signs have to hold an even number of minuses, so that 7 are stored
    signed       whether points have signs of their own, and none are stored
    halved       whether a run's points are all of one half of the table: its integer says which, above all factors
    """

    name: str
    bits: float
    code_bits: float
    block: int
    size_bytes: int
    number: int
    run: int
    factors: tuple[float, ...]
    minimums: int = 0
    levels: tuple[int, ...] = ()
    vector: int = 1
    even: bool = False
    signed: bool = False
    halved: bool = False

    @property
    def label(self) -> str:
        """The name as llama.cpp writes it."""
        return self.name.upper()


def _whole(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


def _halves(scale: float) -> tuple[float, ...]:
    return tuple((0.5 + number) * scale for number in range(16))


_ONE = (1.0,)
_ODD = tuple(range(1, 16, 2))
TYPES = {
    kind.name: kind
    for kind in (
        GgufType("iq1_s", 1.5625, 1.375, 256, 50, 19, 32, _ODD + _ODD, vector=8, signed=True, halved=True),
        GgufType("iq1_m", 1.75, 1.5, 256, 56, 29, 16, _ODD, vector=8, signed=True),
        GgufType("q2_k", 2, 2, 256, 84, 10, 16, _whole(0, 15), minimums=16, levels=_whole(0, 3)),
        GgufType("iq2_xxs", 2.0625, 1.875, 256, 66, 16, 32, _halves(0.25), vector=8, even=True),
        GgufType("iq2_xs", 2.3125, 2, 256, 74, 17, 16, _halves(0.25), vector=8, even=True),
        GgufType("iq2_s", 2.5625, 2.25, 256, 82, 22, 16, _halves(0.25), vector=8),
        GgufType("q3_k", 3, 3, 256, 110, 11, 16, _whole(-32, 31), levels=_whole(-4, 3)),
        GgufType("iq3_xxs", 3.0625, 2.875, 256, 98, 18, 32, _halves(0.5), vector=4, even=True),
        GgufType("iq3_s", 3.4375, 3.25, 256, 110, 21, 32, tuple(range(1, 32, 2)), vector=4),
        GgufType("q4_k", 4, 4, 256, 144, 12, 32, _whole(0, 63), minimums=64, levels=_whole(0, 15)),
        GgufType("iq4_xs", 4.25, 4, 256, 136, 23, 32, _whole(-32, 31), levels=_IQ4_LEVELS),
        GgufType("iq4_nl", 4.5, 4, 32, 18, 20, 32, _ONE, levels=_IQ4_LEVELS),
        GgufType("q5_k", 5, 5, 256, 176, 13, 32, _whole(0, 63), minimums=64, levels=_whole(0, 31)),
        GgufType("q6_k", 6, 6, 256, 210, 14, 16, _whole(-128, 127), levels=_whole(-32, 31)),
        GgufType("q8_0", 8, 8, 32, 34, 8, 32, _ONE, levels=_whole(-128, 127)),
    )
}
WIDTHS = tuple(sorted(kind.bits for kind in TYPES.values()))


def type_at(bits: float, in_features: int) -> GgufType | None:
    """The type of a width for rows of `in_features` weights; None where there is no such width, or none fits.

    Rows that are no multiple of 256 get a type of blocks of 32 that is no narrower: IQ4_NL up to 4.5 bits, else Q8_0.
    """
    found = next((kind for kind in TYPES.values() if kind.bits == bits), None)
    if found is None or in_features % found.block == 0:
        return found
    small = TYPES["iq4_nl" if bits <= TYPES["iq4_nl"].bits else "q8_0"]
    return small if in_features % small.block == 0 else None
