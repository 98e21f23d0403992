"""Figures of plans: numbers against direct counts, pictures read back by matplotlib's own reader."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.plan import BlockBits, Plan
from mc_cli.errors import MissingDependencyError
from mc_cli.parts import ExpertBlock, ModelInventory, Projection
from mc_cli.reports.figures import CHANNELS, MERGED, SPECTRUM, WIDTHS, draw, figures_of, spectrum

PARTS = (Projection("gate_up_proj", 64, 16), Projection("down_proj", 16, 32))
INVENTORY = ModelInventory(
    "mixtral",
    2,
    tuple(ExpertBlock(layer, f"layers.{layer}.experts", f"layers.{layer}.gate", 4, 2, PARTS) for layer in (0, 1)),
    (),
    tied_head=False,
)
PLAN = Plan(
    "mixtral",
    "mine",
    {
        0: (4, 0, {"gate_up_proj": 2, "down_proj": 3}, 16),
        1: ((BlockBits(24, 4), BlockBits(8, 0)), 2, 0, 2),
    },
    {},
    slots={0: (0, 0, 2, 3), 1: (0, 1, 1, 3)},
    merging=Merging("average"),
)


def measures(seed: int) -> ChannelMeasures:
    generator = np.random.default_rng(seed)
    values = generator.exponential(size=(6, 4, 32)).astype(np.float32)
    return ChannelMeasures(100, np.full(4, 50), *values)


def test_numbers_are_those_of_the_plan() -> None:
    found = figures_of(PLAN, INVENTORY, {})
    assert found["channels_kept"] == {"0": [32, 0, 32, 32], "1": [24, 32, 0, 32]}
    assert found["bits"] == {"0": [4, 0, 2.5, 16], "1": [3, 2, 0, 2]}
    assert found["merged"] == {"0": [[0, 1]], "1": [[1, 2]]}
    assert found["energy_spectrum"] == {}
    pairs = Plan("mixtral", "mine", {0: (16,) * 4, 1: (16,) * 4}, {}, merging=Merging("puzzle", 0.4, {1: ((0, 3),)}))
    assert figures_of(pairs, INVENTORY, {})["merged"] == {"0": [], "1": [[0, 3]]}


def test_a_spectrum_is_the_energy_of_the_best_channels() -> None:
    layer = measures(1)
    mean = layer.weighted_square_sum.astype(np.float64) / 100
    energy = ((0.1 * mean + 0.9 * layer.weighted_square_max) * layer.down_square).ravel()
    found = spectrum(layer)
    assert len(found) == 65 and found[0] == 0 and found[-1] == pytest.approx(1)
    for place in (1, 16, 40):
        best = sorted(energy.tolist(), reverse=True)[: 2 * place]
        assert found[place] == pytest.approx(sum(best) / energy.sum())
    assert (np.diff(np.diff(found)) < 1e-9).all()  # each step adds no more than the one before


def test_pictures_are_drawn_for_what_there_is(tmp_path: Path) -> None:
    numbers = figures_of(PLAN, INVENTORY, {0: measures(0), 1: measures(1)})
    assert draw(tmp_path, numbers, "mixtral") == [WIDTHS, CHANNELS, MERGED, SPECTRUM]
    for name in (WIDTHS, CHANNELS, MERGED, SPECTRUM):
        picture = imread(tmp_path / name)
        assert picture.shape[1] == 1050 and len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20
    plain = Plan("mixtral", "mine", {0: (2,) * 4, 1: (3,) * 4}, {})
    (tmp_path / "plain").mkdir()
    assert draw(tmp_path / "plain", figures_of(plain, INVENTORY, {}), "mixtral") == [WIDTHS]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *given: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingDependencyError, match="figures"):
        draw(tmp_path, figures_of(PLAN, INVENTORY, {}), "mixtral")
    assert not list(tmp_path.iterdir())
