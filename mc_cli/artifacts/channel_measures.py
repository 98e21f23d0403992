"""`importance/channels/layer_NNN.safetensors`: what every channel of a layer's experts did on the calibration tokens.

A channel (a micro-expert) is a row of gate, the same row of up, and a column of down. Everything that a score of
channels asks for is here, so that none needs a pass of its own.
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
_GRADIENT = "gradient_mass"  # there if there was a backward pass
_ALL_EXPERTS = "token_count"
_PER_EXPERT = "routing_count"


def channel_file(layer: int) -> str:
    """Name of a layer's file inside the importance folder."""
    return f"channels/layer_{layer:03d}.safetensors"


@dataclass(frozen=True, eq=False)
class ChannelMeasures:
    """Measures of one layer, float32 [experts, channels] unless said otherwise.

    token_count          int64 scalar: tokens that the layer saw
    routing_count        int64 [experts]: those of each expert, over which the sums and maxima below are
    square_sum           sum of squared activations: act(gate x) * (up x), what the down projection is given
    square_max           the largest of them
    weighted_square_sum  the same sum with every activation times its token's routing weight
    weighted_square_max  the largest of those
    up_square            squared norm of the channel's rows of the up projection, of gate and up together
    down_square          squared norm of its column of the down projection
    gradient_mass        d^T G d, d that column and G the second moment of the loss's gradient at the MoE output, a mean
                         over tokens; None without a backward pass
    """

    token_count: int
    routing_count: Numbers
    square_sum: Numbers
    square_max: Numbers
    weighted_square_sum: Numbers
    weighted_square_max: Numbers
    up_square: Numbers
    down_square: Numbers
    gradient_mass: Numbers | None = None

    def arrays(self) -> dict[str, Numbers]:
        """Every measure by name; the token count as a scalar."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found[_ALL_EXPERTS] = np.asarray(self.token_count, dtype=np.int64)
        return {name: array for name, array in found.items() if array is not None}

    def write(self, path: Path) -> None:
        """Writes the file in one atomic replace. Raises ArtifactError, and writes nothing, for numbers not finite."""
        write_measures(path, self.arrays(), said="{} of some channels are")

    @classmethod
    def read(cls, path: Path, *, num_experts: int, channels: int) -> ChannelMeasures:
        """Reads one layer's file. Raises ArtifactError naming all that is not as it should be."""
        found = read_arrays(path)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            field.name: ("float32", (num_experts, channels)) for field in fields(cls)
        }
        shapes |= {_ALL_EXPERTS: ("int64", ()), _PER_EXPERT: ("int64", (num_experts,))}
        problems = array_problems(found, shapes, optional=(_GRADIENT,))
        if problems:
            raise ArtifactError(f"{path} holds no measures of channels:\n{listed(problems)}\nRun score --force.")
        measures: dict[str, Any] = {**found, _ALL_EXPERTS: int(found[_ALL_EXPERTS])}
        return cls(**measures)
