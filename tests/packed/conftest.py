"""Exports that the tests of packed models share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TinyModel
from tests.exported_models import FAMILIES, exported


@pytest.fixture(scope="session")
def exports(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exports(model_type)`: an export of the family's tiny model, made once, read only; `work/packed` beside it."""
    made: dict[str, Path] = {}

    def folder_of(model_type: str) -> Path:
        if model_type not in made:
            config = FAMILIES[model_type]
            folder = tmp_path_factory.mktemp(model_type)
            made[model_type] = exported(tiny_model(model_type, **config), folder, tied=bool(config))
        return made[model_type]

    return folder_of
