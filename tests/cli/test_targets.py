"""Several targets of one run: which variants, folders and widths they become, and what runs once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from mc_cli.ahead.disk import Need, together
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import InputError
from mc_cli.recipe import Recipe, plan_runs, read_recipe
from tests.fake_stages import FakeStages

GIVEN = ("--model", "m", "--data", "bundled:calibration", "-w", "w", "--out", "out")
Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_stages_that_variants_share_run_once(stages: FakeStages, mc_cli: Command) -> None:
    result = mc_cli("run", *GIVEN, "--target-stored-bits", "2,2.5,3", "--push-to-hub", "me/model", "--json")
    assert result.exit_code == 0, result.stderr
    sent = [call[1].push_to_hub for call in stages.calls if call[0] == "export"]
    assert sent == ["me/model-2", "me/model-2.5", "me/model-3"]
    own = ["allocate", "quantize", "prune-eval", "export"]
    assert [call[0] for call in stages.calls] == ["calibrate", "score", *own, *own, *own]
    assert [call[1].target_stored_bits for call in stages.calls if call[0] == "allocate"] == [2, 2.5, 3]
    assert [call[1].out for call in stages.calls if call[0] == "export"] == ["out/2", "out/2.5", "out/3"]
    told = json.loads(result.stdout)["variants"]
    assert {name: len(entry["stages"]) for name, entry in told.items()} == {"2": 6, "2.5": 4, "3": 4}
    assert WorkDir(Path("w")).variants() == ["2", "2.5", "3"]
    again = json.loads(mc_cli("run", *GIVEN, "--target-stored-bits", "2,2.5,3", "--json").stdout)["variants"]
    assert not any(stage["ran"] for entry in again.values() for stage in entry["stages"])


def test_force_rebuilds_what_is_shared_once(stages: FakeStages, mc_cli: Command) -> None:
    assert mc_cli("run", *GIVEN, "--target-stored-bits", "2,3", "--force").exit_code == 0
    assert [call[0] for call in stages.calls].count("calibrate") == 1


def test_sizes_are_named_as_they_were_written(stages: FakeStages, mc_cli: Command) -> None:
    assert mc_cli("run", *GIVEN, "--target-size", "8GiB, 900MB").exit_code == 0
    asked = [call[1].target_size_bytes for call in stages.calls if call[0] == "allocate"]
    assert asked == [8 * 2**30, 900 * 10**6]
    assert WorkDir(Path("w")).variants() == ["8GiB", "900MB"]


def test_one_target_is_the_variant_main(stages: FakeStages, mc_cli: Command) -> None:
    assert mc_cli("run", *GIVEN, "--target-stored-bits", "2.5").exit_code == 0
    assert WorkDir(Path("w")).variants() == ["main"]
    assert stages.calls[-1][1].out == "out"


def test_a_dry_run_tells_every_variant(stages: FakeStages, mc_cli: Command) -> None:
    told = json.loads(mc_cli("run", *GIVEN, "--target-stored-bits", "2,3", "--dry-run", "--json").stdout)["variants"]
    assert [entry["stage"] for entry in told["3"]["stages"]] == ["allocate", "quantize", "prune-eval", "export"]
    assert [entry["stage"] for entry in told["2"]["stages"]][:2] == ["calibrate", "score"]
    assert not Path("w").exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (("--target-stored-bits", "2,2.0"), "one is there twice"),
        (("--target-stored-bits", "2,two"), "is no number"),
        (("--target-stored-bits", "2,-1"), "a target is above 0"),
        (("--target-size", "8GiB,9"), "Write the unit"),
        (("--target-stored-bits", "2,3", "--target-size", "8GiB,9GiB"), "exactly one target, 2 given"),
        (("--target-stored-bits", "2,3", "--variant", "a/b"), "a variant's name"),
    ],
)
def test_what_is_refused(stages: FakeStages, mc_cli: Command, target: tuple[str, ...], words: str) -> None:
    result = mc_cli("run", *GIVEN, *target)
    assert result.exit_code == 1
    assert words in " ".join(result.stderr.split())
    assert stages.calls == []


def test_a_recipe_lists_targets(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "work_dir: w\nvariant: trial\ncalibrate: {model: m, data: d}\nallocate: {target_stored_bits: [2, 3.6]}\n"
        "export: {out: out}\n"
    )
    plans = plan_runs(read_recipe(path))
    assert [plan.work.variant for plan in plans] == ["trial-2", "trial-3.6"]
    widths = {plan.stages["score"].bits for plan in plans}
    assert len(widths) == 1 and max(widths.pop()) == 5, "scored once, for the widest"
    assert plan_runs(Recipe(read_recipe(path).sections, "w"))[1].work.variant == "3.6"
    path.write_text("allocate: {target_stored_bits: [2, two]}\n")
    with pytest.raises(InputError, match="target_stored_bits: is a text"):
        read_recipe(path)


def test_room_for_all_variants_is_asked_for(tmp_path: Path) -> None:
    pieces = {"calibrate": 5, "quantize": 10, "score while it runs": 7, "export": 10}
    needs = [[Need(tmp_path, 0, 0, pieces)], [Need(tmp_path / "x", 0, 0, {**pieces, "quantize": 20})]]
    (found,) = together(needs)
    assert found.pieces == {"calibrate": 5, "quantize": 30, "score while it runs": 7, "export": 20}
    assert found.needed_bytes >= 62


NAMED = """
calibrate: {model: m, data: bundled:calibration}
allocate: {target_size_bytes: {small: 8GiB, large: 12GiB}}
export: {out: out}
work_dir: w
"""


def test_targets_have_the_names_that_a_recipe_gives_them(stages: FakeStages, mc_cli: Command) -> None:
    Path("named.yaml").write_text(NAMED, encoding="utf-8")
    assert mc_cli("run", "named.yaml").exit_code == 0
    assert WorkDir(Path("w")).variants() == ["large", "small"]
    assert [call[1].out for call in stages.calls if call[0] == "export"] == ["out/small", "out/large"]


@pytest.mark.parametrize("target", [(), ("--target-stored-bits", "2,3")])
def test_some_of_several_targets_are_made(stages: FakeStages, mc_cli: Command, target: tuple[str, ...]) -> None:
    Path("named.yaml").write_text(NAMED, encoding="utf-8")
    result = mc_cli("run", "named.yaml", *target, "--only", "2" if target else "small")
    assert result.exit_code == 0, result.stderr
    assert [call[1].out for call in stages.calls if call[0] == "export"] == ["out/2" if target else "out/small"]
    widths = [call[1].bits for call in stages.calls if call[0] == "score"]
    assert mc_cli("run", "named.yaml", *target).exit_code == 0
    again = [call[1].bits for call in stages.calls if call[0] == "score"]
    assert again == widths * 2, "one set of scores serves all"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--only", "tiny"), "no target is named tiny. There are small, large."),
        (("--only", "small", "--target-stored-bits", "2"), "there are not several"),
    ],
)
def test_a_name_that_no_target_has_is_refused(
    stages: FakeStages, mc_cli: Command, asked: tuple[str, ...], words: str
) -> None:
    Path("named.yaml").write_text(NAMED, encoding="utf-8")
    result = mc_cli("run", "named.yaml", *asked)
    assert result.exit_code == 1
    assert words in " ".join(result.stderr.split())
    assert not stages.calls
