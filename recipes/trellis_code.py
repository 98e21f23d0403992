"""Looks for the code of one rate: the tables of `mc_cli/numerics/trellis_code.py`, by their error on normal weights.

Half of the weights matter alike, as those of down projections do. Of the others every second one matters much and its
neighbours little, as `coding/channel_order.py` deals the rows of up projections: there a code is used as if it had
twice the rate. What is minimised is a mean of the errors on both.

A code starts from a structure that is good in itself. Sort its levels; their places are bits, the highest one first.
The bits of a window that the next one loses, oldest first, and those that it is the first to have, newest first, both
choose the highest bits of the place. So paths that part, and paths that meet, have values far from each other; the
lower bits are random. From the best of many such starts on, single entries of the tables are changed at random, and a
change stays where it lowers the error; between them the levels are fitted to what was coded with them (Lloyd's
iteration). Prints the entry for `CODES`, and the errors on weights that were not used before.

    python recipes/trellis_code.py --rate 2 --seed 0
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from mc_cli.numerics.trellis import decode_windows, encode
from mc_cli.numerics.trellis_code import SIGNED_FROM, UNIT, Tables, by_windows

LENGTH = 256
NIBBLE = torch.arange(16)
MUCH, SPREAD = 1.3, 1.2  # of the logarithms of what uneven weights matter, as in the middle layers of a trained model
LEAST_GAIN = 3e-4  # of the error, that a change must bring: smaller ones are chance


@dataclass(frozen=True)
class Trial:
    """A code by places: that of a window is the xor of three entries, one for each four of its bits.

    The second is itself the xor of what its two low and its two high bits give, so that tables of six bits will do.
    """

    bits: int  # of a place
    parts: tuple[Tensor, Tensor, Tensor]  # int64 [16] each
    levels: Tensor  # float64 [2^bits] by place, ascending, odd, in units of the weights' standard deviation

    def places(self) -> Tensor:
        """int64 [4096]"""
        return by_windows(self.parts)

    def rounded(self) -> Tensor:
        """int64 [2^bits]: the levels as they are stored."""
        return (self.levels / UNIT).round().clamp(-127, 127).long()

    def values(self) -> Tensor:
        """float32 [4096]"""
        return (self.rounded() * UNIT).float()[self.places()]

    def tables(self) -> Tables:
        return Tables.by_places(tuple(part.tolist() for part in self.parts), self.rounded()[len(self.levels) // 2 :])


@dataclass(frozen=True)
class Sample:
    """Weights to code, and what a squared error of each matters: 1 in the first half of the rings."""

    targets: Tensor  # float32 [rings, LENGTH]
    weights: Tensor

    @classmethod
    def drawn(cls, rings: int, random: torch.Generator) -> Sample:
        weights = torch.ones(rings, LENGTH)
        between = torch.where(torch.arange(LENGTH) % 2 == 0, MUCH, -MUCH)
        uneven = weights[rings // 2 :]
        uneven.copy_(torch.exp(between + SPREAD * torch.randn(uneven.shape, generator=random)))
        return cls(torch.randn(rings, LENGTH, generator=random), weights / weights.mean(1, keepdim=True))

    def errors(self, values: Tensor) -> tuple[float, float]:
        """Mean squared errors of both halves, weighted."""
        squared = self.weights * (values - self.targets).square()
        half = len(squared) // 2
        return float(squared[:half].mean()), float(squared[half:].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=Fraction, required=True, help="bits per weight, 1 to 5 in half steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=32)
    parser.add_argument("--trials", type=int, default=1500, help="changes of single entries")
    arguments = parser.parse_args()
    rate, random = arguments.rate, torch.Generator().manual_seed(arguments.seed)
    trial = min(
        (fitted(start(rate, random), rate, random, rounds=4, rings=400) for _ in range(arguments.starts)),
        key=lambda found: found[1],
    )[0]
    for number in range(arguments.trials):
        if number % 200 == 0:
            trial, error = fitted(trial, rate, random, rounds=2, rings=1000)
            print(f"# {number} changes tried: {error:.5f}", flush=True)
            sample = Sample.drawn(400, random)
            best = error_of(trial, rate, sample)
        changed = change(trial, random)
        error = error_of(changed, rate, sample)
        if error < best * (1 - LEAST_GAIN):
            trial, best = changed, error
    trial, _ = fitted(trial, rate, random, rounds=4, rings=3000)
    unseen = Sample.drawn(4096, torch.Generator().manual_seed(99))
    even, uneven = unseen.errors(coded(trial, rate, unseen)[1])
    entry = f"Fraction({rate.numerator}, {rate.denominator}): {trial.tables().written()}"
    print(f"    {entry},  # {even:.5f}, {uneven:.5f}")


def coded(trial: Trial, rate: Fraction, sample: Sample) -> tuple[Tensor, Tensor]:
    return encode(sample.targets, rate, sample.weights, trial.values())


def mean(even: float, uneven: float) -> float:
    """Geometric; two of three weights of an expert are of its up projections."""
    return even ** (1 / 3) * uneven ** (2 / 3)


def error_of(trial: Trial, rate: Fraction, sample: Sample) -> float:
    return mean(*sample.errors(coded(trial, rate, sample)[1]))


def start(rate: Fraction, random: torch.Generator) -> Trial:
    bits = 7 if rate >= SIGNED_FROM else 6
    parting = -(-rate.numerator // rate.denominator)  # bits that part paths, at a longer step
    turned = sum((NIBBLE >> bit & 1) << (bits - 1 - bit) for bit in range(4))  # the oldest bit becomes the highest
    turned = torch.as_tensor(turned)
    first, second = turned, (NIBBLE & 1) << (bits - 5) | (NIBBLE >> 1 & 1) << (bits - 6)
    if bits == 7:  # six bits leave one of a place open
        first = first | torch.randint(0, 2, (16,), generator=random)
        second = second | torch.randint(0, 2, (4,), generator=random)[NIBBLE & 3]
    third = torch.zeros_like(NIBBLE)
    for bit in range(4):  # the newest bit chooses the highest one of the place, the older ones how
        older = NIBBLE & ((1 << (3 - bit)) - 1)
        turn = torch.randint(0, 2, (16,), generator=random)[older]
        third |= ((NIBBLE >> (3 - bit) & 1) ^ turn) << (bits - 1 - bit)
    # with uneven weights two steps are as one
    nested = parting if torch.rand(1, generator=random) < 0.5 else 2 * parting
    free = bits - min(nested, 4)
    third = third >> free << free | torch.randint(0, 1 << free, (16,), generator=random)
    beside = torch.randint(0, 1 << bits, (4,), generator=random)  # by the two bits between the old and the new ones
    if parting == 5:
        beside = beside & ~(1 << (bits - 5)) | (torch.arange(4) >> 1) << (bits - 5)
    quantiles = (torch.arange(1 << bits).double() + 0.5) / (1 << bits)
    return Trial(bits, (first, second ^ beside[NIBBLE >> 2], third), torch.special.ndtri(quantiles))


def fitted(trial: Trial, rate: Fraction, random: torch.Generator, *, rounds: int, rings: int) -> tuple[Trial, float]:
    """(the trial with levels that are the means of what was coded with them, the error before the last round)."""
    places, count = trial.places(), len(trial.levels)
    for _ in range(rounds):
        sample = Sample.drawn(rings, random)
        codes, values = coded(trial, rate, sample)
        even, uneven = sample.errors(values)
        weights = sample.weights.double()
        weights[rings // 2 :] *= 2 * even / uneven  # of a geometric mean, relative changes count
        chosen = places[decode_windows(codes, rate).flatten().long()]
        sums = torch.zeros(count).double().index_add_(0, chosen, (weights * sample.targets).flatten())
        numbers = torch.zeros(count).double().index_add_(0, chosen, weights.flatten())
        sums, numbers = sums - sums.flip(0), numbers + numbers.flip(0)  # levels are odd: two see the same
        trial = replace(trial, levels=(sums + 10 * trial.levels) / (numbers + 10))
    return trial, mean(even, uneven)


def change(trial: Trial, random: torch.Generator) -> Trial:
    """One entry changed, or two exchanged."""

    def number(end: int) -> int:
        return int(torch.randint(0, end, (1,), generator=random))

    parts = [part.clone() for part in trial.parts]
    entry, other, kind = number(16), number(16), number(5 if trial.bits == 7 else 4)
    if kind == 0:
        parts[2][entry] = number(1 << trial.bits)
    elif kind == 1:
        parts[2][[entry, other]] = parts[2][[other, entry]]
    elif kind == 2:
        parts[2][entry] ^= 1 << number(trial.bits)
    elif kind == 3:  # what the first six bits mean stays as it is
        parts[1] ^= torch.where(entry % 4 == NIBBLE >> 2, 1 << number(trial.bits), 0)
    elif other % 2:
        parts[0][entry] ^= 1 << number(3)
    else:
        parts[1] ^= torch.where(entry % 4 == NIBBLE & 3, 1 << number(3), 0)
    return replace(trial, parts=tuple(parts))


if __name__ == "__main__":
    main()
