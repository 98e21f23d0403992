"""`channels.safetensors`, beside a plan: which channels of every expert its blocks hold.

One tensor `layers.N` per MoE layer, int32 [experts, channels]: for every expert its channels in the order in which the
plan's blocks take them, so that the first block of 384 channels holds the first 384 of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.artifacts.files import read_arrays, write_arrays
from mc_cli.errors import PlanError, listed

_PREFIX = "layers."
_REMEDY = "Run allocate again, or leave channel_order out of the plan: blocks are then in the checkpoint's order."


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """layers: decoder layer -> int32 [experts, channels], each row a permutation of 0 to channels - 1."""

    layers: Mapping[int, npt.NDArray[np.int32]]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ChannelOrder)
            and self.layers.keys() == other.layers.keys()
            and all(np.array_equal(rows, other.layers[layer]) for layer, rows in self.layers.items())
        )

    __hash__ = None  # type: ignore[assignment]  # as that of other values that hold mappings

    def write(self, path: Path) -> None:
        """Writes the file in one atomic replace; equal orders give equal bytes."""
        write_arrays(path, {f"{_PREFIX}{layer}": rows.astype(np.int32) for layer, rows in self.layers.items()})

    @classmethod
    def read(cls, path: Path, rows: Mapping[int, Sequence[Any]]) -> ChannelOrder:
        """Reads the file of a plan that has one entry of `rows` for every expert.

        Raises PlanError naming all that is wrong, ArtifactError where the file is missing or no safetensors file.
        """
        found = read_arrays(path)
        names = {f"{_PREFIX}{layer}": layer for layer in rows}
        problems = [f"{name[:60]}: the plan has no such layer" for name in sorted(found.keys() - names.keys())]
        for name, layer in names.items():
            problems += _problems(name, found.get(name), len(rows[layer]))
        if problems:
            raise PlanError(
                f"{path} does not say in which order the plan's blocks take channels:\n{listed(problems)}\n{_REMEDY}"
            )
        return cls({layer: found[name] for name, layer in names.items()})

    def problems(self, layer: int, num_experts: int, channels: int) -> list[str]:
        """Where the order does not fit a layer of a model, one line each."""
        shape = self.layers[layer].shape if layer in self.layers else None
        if shape == (num_experts, channels):
            return []
        told = "is missing" if shape is None else f"is of {' x '.join(map(str, shape))}"
        return [f"layer {layer}: the order of channels {told}, the model has {num_experts} experts of {channels}"]


def _problems(name: str, rows: npt.NDArray[Any] | None, experts: int) -> list[str]:
    if rows is None:
        return [f"{name}: missing"]
    if rows.dtype != np.int32 or rows.ndim != 2 or len(rows) != experts or not rows.size:
        return [f"{name}: {rows.dtype} of shape {list(rows.shape)}, not int32 with a row for each of {experts} experts"]
    wrong = np.flatnonzero((np.sort(rows, axis=1) != np.arange(rows.shape[1])).any(axis=1))
    return [f"{name}: the row of expert {expert} does not name every channel once" for expert in wrong.tolist()]
