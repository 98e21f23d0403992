"""`importance/channels/cuts_NNN.safetensors`: what it costs to cut each expert of a layer down to fewer channels.

Costs are measured on what several channels give together, not summed up over channels: the outputs of channels of one
expert add up at a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.artifacts.array_checks import array_problems, write_measures
from mc_cli.artifacts.files import read_arrays
from mc_cli.errors import ArtifactError, listed

Numbers = npt.NDArray[Any]
_ORDER, _KEPT, _LOSS, _LEFT = "order", "kept", "loss", "share_left"
_CODED = _UP, _DOWN = "coded_up", "coded_down"


def cut_file(layer: int) -> str:
    """Name of a layer's file inside the importance folder."""
    return f"channels/cuts_{layer:03d}.safetensors"


@dataclass(frozen=True, eq=False)
class CutMeasures:
    """The cost of cutting the experts of one layer.

    order       int32 [experts, channels]: each expert's channels, the most important first
    kept        int64 [borders], rising: how many of the first channels are kept; 0 is there, all of them is not
    loss        float32 [experts, borders]: expected rise of the loss in nats per token with this expert alone cut to
                them, the other weights as they are, in the unit of predicted_loss_by_bits
    share_left  float32 [borders]: what is left of it where the down projection makes good for the cut, measured on one
                expert of the layer; ones where it does not
    coded_up    float32 [experts, borders]: what coding the up projection of what is left costs over that of the whole
                expert at the same width; coded_down likewise; 1 at borders where nothing is coded
    """

    order: Numbers
    kept: Numbers
    loss: Numbers
    share_left: Numbers
    coded_up: Numbers
    coded_down: Numbers

    def write(self, path: Path) -> None:
        """Writes the file in one atomic replace. Raises ArtifactError, and writes nothing, for numbers not finite."""
        arrays = {_ORDER: self.order, _KEPT: self.kept, _LOSS: self.loss, _LEFT: self.share_left}
        arrays |= {_UP: self.coded_up, _DOWN: self.coded_down}
        write_measures(path, arrays, said="what cutting some experts costs is")

    @classmethod
    def read(cls, path: Path, *, num_experts: int, channels: int) -> CutMeasures:
        """Reads one layer's file. Raises ArtifactError naming all that is not as it should be."""
        found = read_arrays(path)
        borders = found[_KEPT].size if _KEPT in found else 0
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            _ORDER: ("int32", (num_experts, channels)),
            _KEPT: ("int64", (borders,)),
            _LOSS: ("float32", (num_experts, borders)),
            _LEFT: ("float32", (borders,)),
            **dict.fromkeys(_CODED, ("float32", (num_experts, borders))),
        }
        problems = array_problems(found, shapes) or _content_problems(found, channels)
        if problems:
            raise ArtifactError(
                f"{path} does not hold what cuts cost:\n{listed(problems)}\nRun score --unit channel --force."
            )
        return cls(**found)


def _content_problems(found: dict[str, Numbers], channels: int) -> list[str]:
    """The faults of arrays that have the right shapes, one line each."""
    kept, problems = found[_KEPT], []
    if (np.diff(kept, prepend=-1) <= 0).any() or (kept >= channels).any():
        problems.append(f"{_KEPT}: {kept.tolist()[:8]}, not rising numbers of 0 to {channels - 1} channels")
    wrong = np.flatnonzero((np.sort(found[_ORDER], axis=1) != np.arange(channels)).any(axis=1))
    problems += [f"{_ORDER}: the row of expert {expert} does not name every channel once" for expert in wrong.tolist()]
    return problems
