"""Requirements: little for loading and serving, one transformers alone for the stages, each said in one place."""

from __future__ import annotations

import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from mc_cli import chain
from mc_cli.errors import MissingDependencyError
from mc_cli.models.model_folder import BELOW_TRANSFORMERS, LEAST_TRANSFORMERS
from tests.installation.environments import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def needs(lines: list[str]) -> dict[str, Requirement]:
    return {found.name: found for found in map(Requirement, lines)}


def test_the_base_is_what_loading_and_serving_need() -> None:
    base = needs(PROJECT["dependencies"])
    others = {"tokenizers", "huggingface-hub", "typer", "rich", "PyYAML"}
    assert base.keys() == {"torch", "transformers", "safetensors", "numpy"} | others
    found = {version: version in base["transformers"].specifier for version in ("5.16.0", "5.16.1", "5.19.2", "5.23.0")}
    assert found == {"5.16.0": False, "5.16.1": True, "5.19.2": True, "5.23.0": True}
    least, below = (".".join(map(str, each)) for each in (LEAST_TRANSFORMERS, BELOW_TRANSFORMERS))
    assert str(base["transformers"].specifier) == f"<{below},>={least}"


def test_the_extra_for_stages_pins_what_they_check() -> None:
    extra = needs(EXTRAS["compress"])
    assert extra.keys() == chain.COMPRESS.keys()
    for name, wanted in chain.COMPRESS.items():
        pinned = [str(each) for each in extra[name].specifier if each.operator == "=="]
        assert pinned == ([] if wanted is None else [f"=={wanted}"])
    assert {"compress", "serve"} <= needs(EXTRAS["dev"])["mixture-compressor"].extras
    assert "vllm" not in needs(EXTRAS["dev"])["mixture-compressor"].extras
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert make.count("install --quiet -e '.[") == make.count("-e '.[compress") + make.count("-e '.[dev]'")


def test_vllm_finds_the_plug_in() -> None:
    (entry,) = PROJECT["entry-points"]["vllm.general_plugins"].items()
    found = metadata.EntryPoint(*entry, group="vllm.general_plugins").load()
    assert callable(found)


def test_stages_name_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    chain.require_compress()
    monkeypatch.setitem(chain.COMPRESS, "transformers", "5.22.9")
    monkeypatch.setitem(chain.COMPRESS, "no-such-solver", None)
    for stage in ("calibrate", "allocate", "export"):
        with pytest.raises(MissingDependencyError) as told:
            chain.stage_module(stage)
        for words in ("tested with 5.22.9 alone", "no-such-solver is not installed", "mixture-compressor[compress]"):
            assert words in str(told.value)
