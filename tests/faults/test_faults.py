"""A small share of `make faults`: a few seeds of each part, in one process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.faults import __main__ as faults
from tests.faults.chain import STAGES
from tests.faults.fields import changed_fields
from tests.faults.justified import JUSTIFIED, justification
from tests.faults.mutators import mutate
from tests.faults.trees import compare, tree_of
from tests.faults.trial import random_of

ROOT = Path(__file__).parent.parent.parent
SEED, TRIALS = 7, 24
needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="stands between a process and Linux's C library",
)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a short run of all parts."""
    path = tmp_path_factory.mktemp("faults") / "counts.json"
    words = ["all", "--trials", str(TRIALS), "--seed", str(SEED), "--processes", "2", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


@needs_compiler
@pytest.mark.parametrize("part", faults.PARTS)
def test_every_trial_ends_as_it_should(counts: dict[str, Any], part: str) -> None:
    found = counts["parts"][part]
    assert found["trials"] > 0
    assert found["failing"] == []


@needs_compiler
def test_calls_do_fail(counts: dict[str, Any]) -> None:
    verdicts = counts["parts"]["calls"]["verdicts"]
    assert verdicts.get("refused, the file named", 0) > 0


def test_a_damaged_file_differs_and_the_same_seed_damages_it_alike(tmp_path: Path) -> None:
    content = json.dumps({"a": [1, 2.5, {"b": "text"}], "c": None}).encode()
    for number in range(200):
        left = []
        for name in ("first", "second"):
            folder = tmp_path / f"{number}" / name
            folder.mkdir(parents=True)
            (folder / "x.json").write_bytes(content)
            (folder / "y.json").write_bytes(b"{}")
            before = tree_of(folder)
            mutate(folder, "x.json", random_of("test", 0, number))
            left.append(tree_of(folder))
            assert compare(before, left[-1]), f"number {number} changed nothing"
        assert left[0] == left[1]


def test_only_what_is_listed_is_justified() -> None:
    assert justification("input", "model/config.json", ["rope_theta"])
    assert justification("export", "o/model.safetensors", ["data.lm_head.codes"])
    assert not justification("export", "o/model.safetensors", ["data.lm_head.codes", "header.lm_head.codes"])
    assert not justification("artifact", "w/packed/rest.safetensors", ["data.lm_head.codes"])
    assert justification("export", "o/model.safetensors", ["floats.model.norm.weight"])
    assert not justification("export", "o/model.safetensors", ["floats.lm_head.scales"])
    assert justification("export", "d/model.safetensors", ["data.model.norm.weight", "gone.model.norm.weight"])
    assert not justification("export", "o/model.safetensors", ["data.model.norm.weight", "gone.model.norm.weight"])
    assert not justification("export", "d/model.safetensors", ["data.model.norm.weight", "header.model.norm.weight"])
    assert justification("export", "o/config.json", ["rms_norm_eps"])
    assert not justification("export", "o/config.json", ["rms_norm_eps", "quantization_config.encodings.0"])


def test_the_same_bits_as_another_float_are_told_from_another_tensor(tmp_path: Path) -> None:
    ones = torch.ones(4, 2)
    (tmp_path / "x.safetensors").write_bytes(save({"a": ones.half(), "b": ones.half(), "c": ones.half()}))
    before = save({"a": ones.bfloat16(), "b": ones[:2].half(), "c": ones.to(torch.int16)})
    kinds = [name for name in changed_fields(before, tmp_path / "x.safetensors") if not name.startswith("data.")]
    assert kinds == ["floats.a", "header.b", "header.c"]
    (tmp_path / "x.safetensors").write_bytes(save({"a": ones.half()}))
    assert changed_fields(save({"a": ones.half(), "b": ones.half()}), tmp_path / "x.safetensors") == [
        "data.b",
        "gone.b",
    ]


def test_the_list_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert [entry.reason for entry in JUSTIFIED if f"| {entry.reason} |" not in page] == []


def test_stages_are_all_of_a_run() -> None:
    from mc_cli.flags import STAGES as ALL

    assert set(ALL) <= set(STAGES)
