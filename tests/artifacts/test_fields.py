"""Widths in bits as names in JSON objects: sixteenths, as block types of llama.cpp have them, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mc_cli.artifacts.fields import FieldError, read_as


def test_widths_are_sixteenths() -> None:
    found = read_as(Mapping[float, int], {"2": 1, "2.5": 2, "2.0625": 3, "3.4375": 4})
    assert found == {2: 1, 2.5: 2, 2.0625: 3, 3.4375: 4}


@pytest.mark.parametrize("name", ["2.3", "2.05", "2.06", "2.50", "-2", "2,5", "1e1", "nan", "200", ""])
def test_other_names_are_no_widths(name: str) -> None:
    with pytest.raises(FieldError, match="not a width in bits"):
        read_as(Mapping[float, int], {name: 1})
