"""Figures of a plan, and the numbers behind them: where energy lies, which channels stay, which experts became one.

Numbers go into `figures.json` always; the pictures are drawn where matplotlib is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mc_cli.allocators.channel_score import ScoreAsked, channel_score_named
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.plan import Plan, mean_bits
from mc_cli.parts import ModelInventory
from mc_cli.reports.drawing import require_matplotlib, write_png
from mc_cli.reports.plan import merged_groups

FIGURES = "figures.json"
SPECTRUM, WIDTHS, CHANNELS, MERGED = "spectrum.png", "widths.png", "channels.png", "merged.png"
_SCORE = "camera-p"
_POINTS = 65  # of a spectrum, evenly over a layer's channels
_UNITS = {
    "energy_spectrum": f"share of a layer's energy ({_SCORE}) in the channels of most energy, at equal steps of their "
    "share from 0 to 1, all experts of the layer together",
    "channels_kept": "channels of each expert that are stored; 0 where it is dropped or runs another's",
    "bits": "mean width of each stored expert over its channels and projections, bits per weight",
    "merged": "experts of a layer that became one, or share magnitudes",
}


def figures_of(plan: Plan, inventory: ModelInventory, measures: Mapping[int, ChannelMeasures]) -> dict[str, Any]:
    """Plain JSON values of all figures; a spectrum for the layers whose channels were measured."""
    blocks = {block.layer: block for block in inventory.expert_blocks}
    kept, bits = {}, {}
    for layer, block in blocks.items():
        parts = [plan.blocks_of(layer, expert, block.channels) for expert in range(block.num_experts)]
        kept[str(layer)] = [sum(part.channels for part in found if not part.cut) for found in parts]
        bits[str(layer)] = [mean_bits(entry) for entry in plan.expert_bits[layer]]
    found: dict[str, Any] = {"units": _UNITS, "channels_kept": kept, "bits": bits}
    found["merged"] = {str(layer): [list(group) for group in merged_groups(plan, layer)] for layer in blocks}
    found["energy_spectrum"] = {str(layer): spectrum(entry) for layer, entry in measures.items()}
    return found


def spectrum(measures: ChannelMeasures) -> list[float]:
    """The share of a layer's energy that its channels of most energy hold, at _POINTS steps from none to all."""
    energy = np.sort(channel_score_named(_SCORE).of(measures, ScoreAsked(0)).ravel())[::-1]
    total = np.concatenate([[0.0], energy.cumsum()])
    places = np.linspace(0, len(energy), _POINTS).round().astype(int)
    return [float(share) for share in total[places] / max(total[-1], np.finfo(np.float64).tiny)]


def draw(folder: Path, numbers: Mapping[str, Any], title: str) -> list[str]:
    """Writes the pictures for which there are numbers; their names. Raises MissingDependencyError."""
    drawn = [WIDTHS]
    _grid(folder / WIDTHS, numbers["bits"], title=f"{title}: mean bits per weight of each expert", bar="bits")
    cut = {layer: row for layer, row in numbers["channels_kept"].items() if len(set(row) - {0}) > 1}
    if cut:
        _grid(folder / CHANNELS, numbers["channels_kept"], title=f"{title}: channels kept", bar="channels")
        drawn.append(CHANNELS)
    if any(numbers["merged"].values()):
        _grid(folder / MERGED, _cluster_numbers(numbers), title=f"{title}: experts of one number are one", bar="")
        drawn.append(MERGED)
    if numbers["energy_spectrum"]:
        _curves(folder / SPECTRUM, numbers["energy_spectrum"], title=f"{title}: energy of channels")
        drawn.append(SPECTRUM)
    return drawn


def _cluster_numbers(numbers: Mapping[str, Any]) -> dict[str, list[float]]:
    """Per layer and expert the number of its cluster, from 1; not a number for experts that stayed by themselves."""
    rows = {}
    for layer, row in numbers["bits"].items():
        places = [float("nan")] * len(row)
        for number, group in enumerate(numbers["merged"][layer], start=1):
            for expert in group:
                places[expert] = number
        rows[layer] = places
    return rows


def _figure(height: float) -> Any:
    return require_matplotlib().figure.Figure(figsize=(7, height), dpi=150, layout="constrained")


def _grid(path: Path, rows: Mapping[str, Sequence[float]], *, title: str, bar: str) -> None:
    """A field for each layer (down) and expert (across), with its number in it where there is room."""
    widest = max(map(len, rows.values()))
    values = np.full((len(rows), widest), np.nan)
    for place, row in enumerate(rows.values()):
        values[place, : len(row)] = row
    figure = _figure(min(12.0, 1.5 + 0.35 * len(rows)))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis" if bar else "tab20", interpolation="nearest")
    if bar:
        figure.colorbar(image, label=bar)
    if widest <= 32:
        for (layer, expert), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(expert, layer, f"{value:.3g}", ha="center", va="center", fontsize=5, color="white")
    axes.set(xlabel="expert", ylabel="layer", title=title)
    axes.set_yticks(range(len(rows)), list(rows))
    write_png(path, figure)


def _curves(path: Path, spectra: Mapping[str, Sequence[float]], *, title: str) -> None:
    figure = _figure(4.5)
    axes = figure.add_subplot()
    for layer, shares in spectra.items():
        axes.plot(np.linspace(0, 100, len(shares)), 100 * np.asarray(shares), label=f"layer {layer}", linewidth=1)
    axes.set(xlabel="channels of most energy, %", ylabel="their share of the layer's energy, %", title=title)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.grid(alpha=0.3)
    if len(spectra) <= 16:
        axes.legend(fontsize=7)
    write_png(path, figure)
