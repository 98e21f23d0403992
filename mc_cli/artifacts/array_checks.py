"""Checks the arrays of a file of measures, and tells all that is wrong at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


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
