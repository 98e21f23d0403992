"""`importance/similarity/pairs_NNN.safetensors`: what it costs to store one expert in place of two, pair by pair.

Every pair is measured with all other experts as they are. allocate chooses among pairs that share no expert.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.artifacts.array_checks import array_problems, write_measures
from mc_cli.artifacts.files import read_arrays
from mc_cli.errors import ArtifactError, listed

Numbers = npt.NDArray[Any]
_PAIRS = "pairs"


def pair_file(layer: int) -> str:
    """Name of a layer's file inside the importance folder."""
    return f"similarity/pairs_{layer:03d}.safetensors"


@dataclass(frozen=True, eq=False)
class PairMeasures:
    """The cost of merging some pairs of one layer's experts.

    pairs       int64 [pairs, 2]: two experts each, the lower number first; no pair twice
    loss        float32 [pairs]: expected rise of the loss in nats per token where one expert of 16 bits, made by the
                method that score's manifest names, runs in both slots; in the unit of predicted_loss_by_bits
    share_left  float32 [pairs]: what is left of it where the down projection makes good for the merging; ones where it
                does not
    coded_up    float32 [pairs]: what coding the up projection of the merged expert costs over what coding those of both
                experts costs together, at the same width; coded_down likewise
    """

    pairs: Numbers
    loss: Numbers
    share_left: Numbers
    coded_up: Numbers
    coded_down: Numbers

    def write(self, path: Path) -> None:
        """Writes the file in one atomic replace. Raises ArtifactError, and writes nothing, for numbers not finite."""
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        write_measures(path, arrays, said="what merging some experts costs is")

    @classmethod
    def read(cls, path: Path, *, num_experts: int) -> PairMeasures:
        """Reads one layer's file. Raises ArtifactError naming all that is not as it should be."""
        found = read_arrays(path)
        count = len(found[_PAIRS]) if _PAIRS in found and found[_PAIRS].ndim else 0
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {_PAIRS: ("int64", (count, 2))}
        shapes |= {field.name: ("float32", (count,)) for field in fields(cls) if field.name != _PAIRS}
        problems = array_problems(found, shapes)
        if not problems:
            problems = _pair_problems(found[_PAIRS], num_experts)
        if problems:
            raise ArtifactError(
                f"{path} does not say what merging experts costs:\n{listed(problems)}\nRun score --force."
            )
        return cls(**found)


def _pair_problems(pairs: Numbers, num_experts: int) -> list[str]:
    named = [tuple(pair) for pair in pairs.tolist()]
    wrong = [pair for pair in named if not 0 <= pair[0] < pair[1] < num_experts]
    found = [f"pairs: {wrong[0]}, not two of {num_experts} experts, the lower first"] if wrong else []
    return found + ([f"pairs: {len(named) - len(set(named))} are there twice"] if len(set(named)) < len(named) else [])
