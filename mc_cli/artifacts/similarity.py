"""`importance/similarity/layer_NNN.safetensors`: how alike a layer's experts are, on a sample of its tokens.

Clusters are found from these: k-means asks for nothing but inner products, so no output has to be kept.
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
_SCALAR, _COUNTS = "token_count", "routing_count"
_SQUARES = ("output_products", "output_cosine", "weight_products")


def similarity_file(layer: int) -> str:
    """Name of a layer's file inside the importance folder."""
    return f"similarity/layer_{layer:03d}.safetensors"


@dataclass(frozen=True, eq=False)
class ExpertSimilarity:
    """Measures of one layer, float64 [experts, experts] unless said otherwise.

    token_count      int64 scalar: tokens of the sample, on which every expert was run
    routing_count    int64 [experts]: calibration tokens that the router sends to each, in the whole text
    output_products  mean over the sample of the inner product of two experts' outputs, before the routing weight
    output_cosine    mean over the sample of the cosine between them
    weight_products  inner product of two experts' up projections (gate and up) as one vector
    """

    token_count: int
    routing_count: Numbers
    output_products: Numbers
    output_cosine: Numbers
    weight_products: Numbers

    def write(self, path: Path) -> None:
        """Writes the file in one atomic replace. Raises ArtifactError, and writes nothing, for numbers not finite."""
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        arrays[_SCALAR] = np.asarray(self.token_count, dtype=np.int64)
        write_measures(path, arrays, said="{} of some experts are")

    @classmethod
    def read(cls, path: Path, *, num_experts: int) -> ExpertSimilarity:
        """Reads one layer's file. Raises ArtifactError naming all that is not as it should be."""
        found = read_arrays(path)
        square = ("float64", (num_experts, num_experts))
        shapes: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(_SQUARES, square)
        shapes |= {_SCALAR: ("int64", ()), _COUNTS: ("int64", (num_experts,))}
        problems = array_problems(found, shapes, signed=_SQUARES)
        if problems:
            raise ArtifactError(f"{path} does not say how alike experts are:\n{listed(problems)}\nRun score --force.")
        measures: dict[str, Any] = {**found, _SCALAR: int(found[_SCALAR])}
        return cls(**measures)
