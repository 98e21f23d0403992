"""The quick trellis search: against a twin in numpy, against the full search, and on every path of the processor."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mc_cli import native
from mc_cli.errors import ShapeError
from mc_cli.kernels.compiled import PATHS, best_path
from mc_cli.numerics.trellis import decode, encode, encode_panel, encode_together, offsets
from mc_cli.numerics.trellis_code import code_values

LENGTH = 64
compiled = pytest.mark.skipif(native.library() is None, reason="the quick search is compiled")


def drawn(rings: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Targets and weights of rings, some of the targets beyond all levels."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(rings, length, generator=generator)
    targets[:, 5] = 4.0
    return targets, torch.randn(rings, length, generator=generator).exp()


class Twin:
    """One ring's search as native/trellis_quick.c describes it, with whole numbers of any size."""

    def __init__(self, rate: Fraction, targets: np.ndarray, weights: np.ndarray) -> None:
        states = np.arange(4096)
        windows = sum(((states >> bit) & 1) << (11 - bit) for bit in range(12))
        self.values = code_values(rate).numpy()[windows]
        start = offsets(len(targets) + 1, rate).numpy()
        self.steps = np.diff(start)
        self.targets, self.weights = targets, weights
        usual = 1.12 * 4.0 ** -float(rate) + 0.0005
        self.units = 3 / (usual * weights.mean())

    def metric(self, place: int) -> np.ndarray:
        target, weight = self.targets[place], self.weights[place]
        nearest = np.clip(target, self.values.min(), self.values.max())
        cost = weight * ((self.values - target) ** 2 - (nearest - target) ** 2)
        whole = np.floor(self.units * cost + 0.5).astype(np.int64)
        return np.minimum(np.where(whole > 96, 96 + (whole - 96 >> 3), whole), 224)

    def ring(self) -> np.ndarray | None:
        """The values of the best path, from states as 48 weights before the seam leave them, to one that closes.

        None where none is found, and the full search serves.
        """
        length, last, states = len(self.targets), self.steps[-1], np.arange(4096)
        places = [*range(length - 48, length), *range(length)]
        cost, floor, choices = self.metric(places[0]), 0, []
        for before, place in pairwise(places):
            step = self.steps[before]
            each = cost.reshape(1 << step, -1)
            choices.append((step, each.argmin(0)))
            reached = each.min(0) - floor
            floor = reached.min()
            cost = np.minimum(255, np.repeat(reached, 1 << step) + self.metric(place))
        steps = choices[1 - length :]
        found = self.traced(int(cost.argmin()), steps)
        for _ in range(4):
            overlap = found[0] >> last
            ends = states & ((4096 >> last) - 1) == overlap
            found = self.traced(int(np.where(ends, cost, 1000).argmin()), steps)
            if found[0] >> last == overlap:
                return np.asarray(self.values[found])
        return None

    def traced(self, state: int, choices: list[tuple[int, np.ndarray]]) -> list[int]:
        """The states of the path that leads to this one."""
        found = [state]
        for step, choice in reversed(choices):
            group = found[-1] >> step
            found.append(int(choice[group] * (4096 >> step) + group))
        return found[::-1]


@compiled
@pytest.mark.parametrize("rate", [Fraction(1), Fraction(3, 2), Fraction(2), Fraction(3), Fraction(5)])
def test_it_finds_what_its_twin_finds(rate: Fraction) -> None:
    targets, weights = drawn(6)
    codes, values = encode(targets, rate, weights, quick=True)
    assert torch.equal(decode(codes, rate), values)
    twins = [Twin(rate, *ring).ring() for ring in zip(targets.double().numpy(), weights.double().numpy(), strict=True)]
    closed = [ring for ring, twin in enumerate(twins) if twin is not None]
    assert len(closed) >= 3
    # Metrics are rounded from float32 here and from float64 there: a tie may go to another level.
    assert (values.numpy()[closed] == np.stack([twins[ring] for ring in closed])).mean() > 0.97


@compiled
@pytest.mark.parametrize("rate", [Fraction(3, 2), Fraction(5, 2), Fraction(5)])
def test_every_path_gives_the_same_codes(rate: Fraction) -> None:
    targets, weights = drawn(4)
    fed = torch.triu(0.05 * torch.randn(4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)), 1)
    found = []
    for path in range(min(best_path(), len(PATHS) - 1) + 1):
        codes = torch.empty((4, 1, 1, int(LENGTH * rate) // 8), dtype=torch.uint8)
        encode_panel(
            targets[:, None],
            0,
            rate,
            factor=None,
            scales=None,
            members=torch.arange(LENGTH)[None],
            rings=1,
            weights=weights[:, None],
            feedback=fed[:, None],
            codes=codes,
            values=torch.empty((4, 1, LENGTH)),
            errors=None,
            path=path,
            quick=True,
        )
        found.append(codes)
    assert all(torch.equal(found[0], other) for other in found)


@compiled
@pytest.mark.parametrize("rate", [Fraction(1), Fraction(2), Fraction(4)])
def test_errors_are_little_larger_than_the_full_searchs(rate: Fraction) -> None:
    targets, weights = drawn(16, 256)

    def error(quick: bool) -> float:
        values = encode_together(targets[:, None], rate, weights[:, None], None, quick=quick)[1][:, 0]
        return float((weights * (values - targets).square()).sum())

    assert error(True) < 1.02 * error(False)
    assert error(True) != error(False)


@compiled
def test_tables_of_many_values_are_refused() -> None:
    table = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ShapeError, match="up to 128"):
        encode(drawn(1)[0], Fraction(2), table=table, quick=True)
