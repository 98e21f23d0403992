"""The arrays of a file of measures: written if they are finite, and checked, with all that is wrong told at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.artifacts.files import write_arrays
from mc_cli.errors import ArtifactError

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def write_measures(path: Path, arrays: Mapping[str, npt.NDArray[Any]], *, said: str) -> None:
    """Writes the file in one atomic replace. Raises ArtifactError, and writes nothing, for numbers not finite.

    said  what they are, for the error, up to its "not finite"; {} stands for the names of those that are not
    """
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if bad:
        raise ArtifactError(
            f"{path}: {said.format(', '.join(bad))} not finite, so nothing was written. Run score with --dtype "
            "float32, or look for such numbers in the checkpoint."
        )
    write_arrays(path, arrays)


def array_problems(
    found: Mapping[str, npt.NDArray[Any]],
    shapes: Shapes,
    *,
    optional: Collection[str] = (),
    signed: Collection[str] = (),
) -> list[str]:
    """One line for each array that is missing, unknown, of another dtype or shape, or has numbers that it cannot have.

    shapes    dtype and shape of every array by name
    optional  names of those that may be missing
    signed    names of those in which numbers below 0 are none of the faults; all numbers are finite
    """
    problems = [f"{name[:60]}: not a measure" for name in sorted(found.keys() - shapes.keys())]
    for name, (dtype, shape) in shapes.items():
        array = found.get(name)
        if array is None:
            problems += [] if name in optional else [f"{name}: missing"]
        elif (str(array.dtype), array.shape) != (dtype, shape):
            problems.append(f"{name}: {array.dtype} of shape {list(array.shape)}, not {dtype} of {list(shape)}")
        elif not np.isfinite(array).all():
            problems.append(f"{name}: some numbers are not finite")
        elif name not in signed and (array < 0).any():
            problems.append(f"{name}: negative numbers")
    return problems
