"""Settings that a late stage would refuse after hours are refused before the first forward, all of it at once."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mc_cli import cli
from mc_cli.ahead import disk, texts
from mc_cli.artifacts.packed import read_layout
from mc_cli.errors import InputError
from mc_cli.models import tensor_files
from tests import sparse_models
from tests.conftest import TinyModel
from tests.stage_process import run_command

Run = Callable[..., Result]
SECONDS = 15.0  # what should take 3: `make bench-estimates` measures that; here a slow machine must not fail


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral-8x7B of 93 GB, all of it holes."""
    return sparse_models.mixtral(tmp_path_factory.mktemp("large") / "model")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor fails."""

    def refused(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(tensor_files.TensorFiles, "reading", refused)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def whole_run(
    model: Path, folder: Path, *more: object, target: tuple[str, str] = ("--target-stored-bits", "2.5")
) -> Any:
    places = ("-w", folder / "work", "--out", folder / "out")
    return invoke("run", "--model", model, "--data", "bundled:calibration", *target, *places, *more)


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


# Large models


def test_a_dry_run_of_93_gb_takes_no_time_and_tells_what_it_takes(
    large: Path, tmp_path: Path, no_weights: None, much_room: None
) -> None:
    whole_run(large, tmp_path, "--dry-run")  # imports
    began, used = time.monotonic(), time.process_time()
    result = whole_run(large, tmp_path, "--dry-run", "--json")
    assert min(time.monotonic() - began, time.process_time() - used) < SECONDS
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [entry["state"] for entry in found["stages"]] == ["new", *["waiting"] * 5]
    outlook = found["outlook"]
    assert outlook["model_bytes"] == 93_405_585_408
    assert outlook["expert_weights"] == 32 * 8 * 3 * 4096 * 14336
    assert outlook["predicted_expert_bytes"] == outlook["expert_weights"] * 2.5 / 8
    [place] = outlook["disk"]
    assert place["needed_bytes"] > 2 * outlook["predicted_stored_bytes"]  # packed, and exported
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()
    assert "predicted stored bytes" in whole_run(large, tmp_path, "--dry-run").stdout


def test_everything_that_is_wrong_is_told_at_once(large: Path, tmp_path: Path, no_weights: None) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "eval.jsonl").write_text('{"number": 1}\n')
    wrong = ("--format", "ggml", "--policy", "otter", "--tasks", "arc_easyy", "--eval-data", tmp_path / "eval.jsonl")
    wrong += ("--out", tmp_path / "file" / "out", "--method", "best", "--length", 10**6, "--quantizer", "awq")
    for dry in (("--dry-run",), ()):
        result = whole_run(large, tmp_path, *wrong, *dry)
        assert result.exit_code == 1 and not result.stdout
        for words in (
            "Unknown export format 'ggml'",
            "Unknown skipping policy 'otter'",
            "unknown to lm-eval: arc_easyy (did you mean arc_easy?)",
            "eval.jsonl",
            "file is a file",
            "Unknown allocation method 'best'",
            "--length 1000000: the model has 32768 positions",
            "'awq'",
        ):
            assert words in said(result), result.stderr
    assert not (tmp_path / "work" / "calibration").exists()


BUDGETS = {
    ("--target-stored-bits", "0.5"): r"cannot be met.*the experts take 1\.003 to 4\.002 stored bits",
    ("--target-bits", "0.9"): r"cannot be met.*the experts take 1\.000 to 4\.000 code bits",
    ("--target-size", "2GB"): r"cannot be met.* \([0-9,]+ to [0-9,]+ with the rest of the model\)",
    ("--target-size", "100MB"): "leaves nothing for the experts, everything else takes",
}


@pytest.mark.parametrize("target", BUDGETS, ids=" ".join)
def test_a_budget_out_of_reach_says_what_can_be_met(
    large: Path, tmp_path: Path, no_weights: None, much_room: None, target: tuple[str, str]
) -> None:
    for dry in (("--dry-run",), ()):
        result = whole_run(large, tmp_path, "--no-cuts", *dry, target=target)
        assert result.exit_code == 1 and re.search(BUDGETS[target], said(result)), result.stderr


@pytest.mark.parametrize("method", ["pmq", "uniform", "layerwise", "frequency"])
def test_every_method_knows_its_reach(large: Path, tmp_path: Path, much_room: None, method: str) -> None:
    bits = ("--bits", "1,2,3", "--method", method)
    refused = whole_run(large, tmp_path, "--dry-run", *bits, target=("--target-bits", "0.7"))
    assert refused.exit_code == 1 and "cannot be met" in refused.stderr
    assert whole_run(large, tmp_path, "--dry-run", *bits, target=("--target-bits", "2.5")).exit_code == 0


def test_a_budget_beyond_the_widest_is_a_warning(large: Path, tmp_path: Path, much_room: None) -> None:
    result = whole_run(large, tmp_path, "--dry-run", target=("--target-size", "80GB"))
    assert result.exit_code == 0 and "more than the widest candidate takes" in said(result)


@pytest.mark.parametrize("free", [10**6, 10**10, 4 * 10**10])
def test_too_little_disk_is_refused(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None, free: int
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=2 * free))
    for dry in (("--dry-run",), ()):
        result = whole_run(large, tmp_path, *dry)
        assert result.exit_code == 1
        assert f"{tmp_path / 'work'} has {free:,} bytes free, and about " in said(result), result.stderr
    assert not (tmp_path / "work" / "calibration").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system of Linux")
def test_no_disk_is_not_a_full_disk() -> None:
    with pytest.raises(InputError, match="/proc/out cannot be made: the file system of /proc holds no bytes at all"):
        disk.check_disk(disk.Need(Path("/proc/out"), needed_bytes=1000, free_bytes=0, pieces={"export": 1000}))


@pytest.mark.parametrize("value", ["16", "2.5", "999999"])
@pytest.mark.parametrize("flag", ["--target-size", "--shard-size"])
def test_a_size_without_its_unit_is_refused(tmp_path: Path, flag: str, value: str) -> None:
    more = () if flag == "--target-size" else (flag, value)
    target = (flag, value) if flag == "--target-size" else ("--target-bits", "2")
    result = whole_run(tmp_path, tmp_path, *more, target=target)
    assert result.exit_code == 1 and f"for example {value}GiB" in said(result)
    recipe = tmp_path / "recipe.yaml"
    field = {"--target-size": "allocate: {target_size_bytes: ", "--shard-size": "export: {shard_bytes: "}[flag]
    recipe.write_text(f"{field}{value}}}\n")
    assert f"for example {value}GiB" in said(invoke("run", recipe, "-w", tmp_path / "w"))


def test_missing_flags_are_named_together(tmp_path: Path) -> None:
    for arguments, missing in (
        (("calibrate",), ["--model", "--data", "--work-dir"]),
        (("calibrate", "--data", "x"), ["--model", "--work-dir"]),
        (("prune-eval",), ["--data", "--work-dir"]),
        (("export",), ["--out", "--work-dir"]),
        (("allocate",), ["--work-dir", "one of --target-stored-bits, --target-bits, --target-size"]),
        (("generate",), ["DIR", "--prompt"]),
        (("run",), ["--model", "--data", "--out", "--work-dir", "one of --target-stored-bits"]),
        (("run", "--model", "m", "--out", "o"), ["--data", "--work-dir", "one of --target-stored-bits"]),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and not result.stdout
        assert all(name in said(result) for name in missing), result.stderr
        assert "--help" not in said(result)


def test_all_that_the_settings_refuse_is_told_at_once(tmp_path: Path) -> None:
    wrong = (
        "--dtype",
        "int4",
        "--device",
        "tpu",
        "--rates",
        "x",
        "--stride",
        "-1",
        "--damping",
        "3",
        "--target-bits",
        "2",
    )
    result = invoke("run", "-w", tmp_path, *wrong)
    for words in (
        "--dtype 'int4'",
        "--device 'tpu'",
        "--rates 'x'",
        "--stride -1",
        "--damping 3.0",
        "--model",
        "--out",
    ):
        assert words in said(result)
    assert result.exit_code == 2 and "one of --target" not in said(result)
    both = invoke("allocate", "-w", tmp_path, "--target-bits", "-2", "--router-bits", "12")
    assert both.exit_code == 1 and "--target-bits -2.0" in said(both) and "--router-bits 12" in said(both)


# Tiny models, and what stages of their own look at


def test_the_forecast_is_near_what_is_written(chain: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    packed = sum(path.stat().st_size for path in (chain / "work" / "packed").glob("*.safetensors"))
    plain = ("--bits", "1,2,3")
    result = whole_run(
        tiny_model("mixtral"), tmp_path, "--dry-run", "--json", *plain, target=("--target-stored-bits", "3")
    )
    predicted = json.loads(result.stdout)["outlook"]["predicted_stored_bytes"]
    assert 0.98 * packed < predicted < 1.6 * packed  # headers are most of so small a file
    shutil.copytree(chain / "work", tmp_path / "work", ignore=shutil.ignore_patterns("packed"))
    stage = json.loads(invoke("quantize", "-w", tmp_path / "work", "--dry-run", "--json").stdout)
    assert 0.98 * packed < stage["outlook"]["predicted_stored_bytes"] < 1.6 * packed
    assert read_layout(chain / "work" / "packed").experts


def test_plans_are_validated_by_a_dry_run(chain: Path, tmp_path: Path) -> None:
    work = shutil.copytree(chain / "work", tmp_path / "work", ignore=shutil.ignore_patterns("packed"))
    plan = yaml.safe_load((work / "plan" / "plan.yaml").read_text())
    plan["expert_bits"][0] = plan["expert_bits"][0][:-1]
    plan["role_bits"]["attention"] = 0
    plan["family"] = "affine"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plan))
    for dry in (("--dry-run",), ()):
        result = invoke("quantize", "-w", work, "--plan", tmp_path / "mine.yaml", *dry)
        assert result.exit_code == 1
        for words in ("layer 0: plan has", "affine encodings", "attention has 0 bits"):
            assert words in said(result), result.stderr
    assert not (work / "packed").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "--format", "gguff", "--out", "{new}"), "Unknown export format 'gguff'"),
        (("export", "--out", "{work}/packed/x"), "which is read"),
        (
            ("prune-eval", "--data", "bundled:heldout", "--tasks", "no_such_task_7"),
            "unknown to lm-eval: no_such_task_7",
        ),
        (("prune-eval", "--data", "bundled:heldout", "--policy", "odd"), "Unknown skipping policy 'odd'"),
        (("prune-eval", "--data", "{new}/none.jsonl"), "no such file or folder"),
        (("allocate", "--target-bits", "0.5"), "cannot be met"),
        (("allocate", "--target-bits", "2", "--bits", "2,6"), "importance.json lacks 6"),
        (("calibrate", "--model", "{new}/m", "--data", "{new}/none.jsonl"), "no such directory"),
    ],
    ids=str,
)
def test_each_stage_looks_ahead_alone(chain: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    filled = [each.format(new=tmp_path, work=chain / "work") for each in arguments]
    for dry in (("--dry-run",), ("--force",)):
        result = invoke(filled[0], "-w", chain / "work", *filled[1:], *dry)
        assert result.exit_code == 1 and words in said(result), result.stderr
    if filled[0] == "calibrate":
        assert "none.jsonl" in said(result)  # both


def test_what_is_done_is_not_looked_at_again(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    result = invoke("allocate", "-w", chain / "work", "--target-stored-bits", "3.0")
    assert result.exit_code == 0 and "already done" in result.stderr
    dry = json.loads(
        invoke("allocate", "-w", chain / "work", "--target-stored-bits", "3", "--dry-run", "--json").stdout
    )
    assert dry["stages"][0]["state"] == "done" and "outlook" not in dry


def test_the_solver_says_nothing(chain: Path, tmp_path: Path) -> None:
    """In a process of its own, since the solver writes to the descriptor and not to sys.stdout."""
    work = shutil.copytree(chain / "work", tmp_path / "work")
    for more in ((), ("--json",)):
        asked = ["allocate", "-w", str(work), "--target-stored-bits", "2.2", "--force", *more]
        done = run_command(asked, tmp_path)
        assert done.status == 0
        assert "HiGHS" not in done.err and "THIRD_PARTY" not in done.out + done.err
        assert "Running" not in done.out
    assert json.loads(done.out)["stage"] == "allocate"


@pytest.mark.parametrize("out", ["", "packed", "calibration/x", "pruning", ".."])
def test_an_export_into_what_is_read_is_refused_before_it_is_there(large: Path, tmp_path: Path, out: str) -> None:
    work = tmp_path / "runs" / "work"
    result = whole_run(large, tmp_path, "--dry-run", "-w", work, "--out", work / out)
    assert result.exit_code == 1 and "which is read. Name a directory elsewhere" in said(result)


def test_a_large_text_without_the_field_is_refused_by_its_beginning(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, much_room: None
) -> None:
    monkeypatch.setattr(texts, "_READ_WHOLE", 1000)
    data = tmp_path / "large.jsonl"
    data.write_text('{"text": "one"}\n' * 99 + '{"content": "another"}\n' * 9)
    result = whole_run(large, tmp_path, "--dry-run", "--eval-data", data)
    assert result.exit_code == 1 and f"{data}, line 100" in said(result)
    data.write_text('{"text": "one"}\n' * 99)
    assert whole_run(large, tmp_path, "--dry-run", "--eval-data", data).exit_code == 0


def test_a_dry_run_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (asked.append(k), fetch(*a, **k))[1])
    result = whole_run(Path("nobody/nothing-7b"), tmp_path, "--dry-run")
    assert result.exit_code == 1 and "a dry run fetches nothing" in said(result)
    assert asked and all(each["local_files_only"] for each in asked)


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_a_work_directory_that_cannot_be_is_refused(
    tiny_model: TinyModel, tmp_path: Path, place: str, dry: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("mine")
    asked = ("--model", tiny_model("mixtral"), "--data", "bundled:calibration", "-w", tmp_path / place)
    result = invoke("calibrate", *asked, *dry)
    assert result.exit_code == 1 and "is a file" in said(result) and "defect" not in said(result)
    assert (tmp_path / "file").read_text() == "mine"
