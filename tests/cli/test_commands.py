"""Exit statuses, paragraphs, what goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from typer.testing import Result

from mc_cli.cli import prepare_libraries
from mc_cli.errors import InputError
from mc_cli.failures import error_message
from mc_cli.flags import STAGES
from mc_cli.settings import CalibrateSettings
from tests.fake_stages import FakeStages

Invoke = Callable[..., Result]
WHOLE_RUN = ("run", "--model", "m", "--data", "bundled:calibration", "--target-stored-bits", "2.25", "--out", "o")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from mc_cli.cli import main\n"
        "sys.argv = ['mc-cli', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pulp', 'numpy', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["run", "--help"], ["quantize", "-h"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_what_libraries_read_from_the_environment_is_set_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"THP_MEM_ALLOC_ENABLE": "0"}
    monkeypatch.setattr(os, "environ", mine)
    prepare_libraries(debug=True)
    assert mine == {"THP_MEM_ALLOC_ENABLE": "0", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    prepare_libraries(debug=False)
    assert (mine["THP_MEM_ALLOC_ENABLE"], mine["TRANSFORMERS_VERBOSITY"]) == ("0", "error")

    mine = {"OMP_WAIT_POLICY": "ACTIVE"}
    monkeypatch.setattr(os, "environ", mine)
    prepare_libraries(debug=True)
    assert mine == {"OMP_WAIT_POLICY": "ACTIVE", "THP_MEM_ALLOC_ENABLE": "1"}


@pytest.mark.parametrize("command", [*STAGES, "run", "status", "generate", "bench"])
def test_every_command_explains_itself(mc_cli: Invoke, command: str) -> None:
    result = mc_cli(command, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [("calibrate",), ("score", "-w", "x", "--loss-tokens", "many"), ("nonsense",), ("status", "-w", "x", "--nonsense")],
)
def test_wrong_usage_exits_2(mc_cli: Invoke, arguments: tuple[str, ...]) -> None:
    result = mc_cli(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert not result.stdout


def test_a_stage_gets_its_settings_and_prints_its_facts(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    stages.summaries["calibrate"] = {
        "facts": {"model bytes": 2048, "unforeseen": {"a": 1.5}},
        "tables": [
            {
                "title": "Counts",
                "columns": [{"name": "layer"}, {"name": "size", "unit": "bytes"}],
                "rows": [[0, 1234567]],
            }
        ],
        "unknown": [1],
    }
    result = mc_cli(
        "calibrate", "--model", "m", "--data", "d", "-w", tmp_path, "--sequences", 3, "--device", "cpu", "--force"
    )
    assert result.exit_code == 0, result.stderr
    [(stage, settings, compute, force)] = stages.calls
    assert (stage, settings.sequences, settings.model, compute.device, force) == ("calibrate", 3, "m", "cpu", True)
    for words in ("2,048 (2.0 KiB)", "a: 1.5", "Counts", "size [bytes]", "1,234,567"):
        assert words in result.stdout
    assert "calibrate: 2/2 layers in" in result.stderr
    assert "finished" in result.stderr


def test_json_is_one_document(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    stages.summaries["calibrate"] = {"value": float("nan"), "path": Path("x"), "rows": [(1, 2)]}
    stages.warnings["calibrate"] = "thin text"
    arguments = ("calibrate", "--model", "m", "--data", "d", "-w", tmp_path, "--json")
    result = mc_cli(*arguments)
    content = json.loads(result.stdout)
    assert content["summary"] == {"value": None, "path": "x", "rows": [[1, 2]]}
    assert (content["ran"], content["warnings"]) == (True, ["thin text"])
    assert result.stderr.count("Warning: thin text") == 1
    again = mc_cli(*arguments)
    assert json.loads(again.stdout)["ran"] is False
    assert "already done" in again.stderr
    assert again.stderr.count("Warning: thin text") == 1


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("what, where, what to do."), 1, ["Error: what, where, what to do."]),
        (
            OSError(errno.ENOSPC, "No space left on device", "x/y"),
            1,
            ["Error: The disk is full while writing x/y", "free some space"],
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, ["Error: The disk is full"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ["not enough memory", "--batch-tokens"]),
        (KeyError("lost"), 1, ["Error: mc-cli has a defect: KeyError: 'lost'", "--debug"]),
        (KeyboardInterrupt(), 130, ["Stopped. Finished layers are kept in", "the same command continues"]),
    ],
)
def test_how_things_end(
    mc_cli: Invoke, stages: FakeStages, tmp_path: Path, error: BaseException, status: int, words: list[str]
) -> None:
    stages.failures["calibrate"] = error
    result = mc_cli("calibrate", "--model", "m", "--data", "d", "-w", tmp_path)
    assert result.exit_code == status
    assert not result.stdout
    assert "Traceback" not in result.stderr
    for part in words:
        assert part in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_debug_adds_the_traceback(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    stages.failures["calibrate"] = KeyError("lost")
    result = mc_cli("calibrate", "--model", "m", "--data", "d", "-w", tmp_path, "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_values_the_settings_refuse_are_one_paragraph(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    result = mc_cli("allocate", "-w", tmp_path)
    assert result.exit_code == 2  # a flag is missing
    assert "Error: allocate needs exactly one target, 0 given" in result.stderr
    assert mc_cli("score", "-w", tmp_path, "--bits", "a").exit_code == 1
    assert mc_cli("calibrate", "--model", "m", "--data", "d", "-w", tmp_path, "--device", "tpu").exit_code == 1
    assert stages.calls == []


def test_a_stage_too_early_names_the_one_before(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    result = mc_cli("score", "-w", tmp_path)
    assert result.exit_code == 1
    assert f"Run `mc-cli calibrate -w {tmp_path}` first" in result.stderr


def test_quantize_follows_what_score_used(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    mc_cli("calibrate", "--model", "m", "--data", "d", "-w", tmp_path)
    mc_cli("score", "-w", tmp_path, "--quantizer", "gptq", "--group-size", 32)
    mc_cli("allocate", "-w", tmp_path, "--target-bits", 2)
    assert mc_cli("quantize", "-w", tmp_path, "--damping", 0.2).exit_code == 0
    quantizer = stages.calls[-1][1].quantizer
    assert (quantizer.quantizer, quantizer.group_size, quantizer.damping) == ("gptq", 32, 0.2)
    told = mc_cli("quantize", "-w", tmp_path, "--quantizer", "rtn", "--sweeps", 4)
    assert told.exit_code == 1 and "--sweeps changes nothing with --quantizer rtn. Leave it out." in told.stderr


def test_dry_run_tells_all_four_states_and_does_nothing(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    plain = ("calibrate", "--model", "m", "--data", "d", "-w", tmp_path)
    assert mc_cli(*plain, "--dry-run").stdout.startswith("calibrate: new: would run")
    assert stages.calls == []
    folder = stages.folder("calibrate", CalibrateSettings(model="m", data="d"), tmp_path)
    folder.begin(force=False)
    folder.path("layer_000.json").write_text("{}", encoding="utf-8")
    assert mc_cli(*plain, "--dry-run").stdout.startswith("calibrate: begun: would continue")
    mc_cli(*plain)
    assert mc_cli(*plain, "--dry-run").stdout.startswith("calibrate: done: nothing to do")
    stale = mc_cli(*plain, "--sequences", 7, "--dry-run")
    assert stale.stdout.startswith("calibrate: stale: would stop with an error")
    assert "setting sequences: made with 128, asked for 7" in stale.stdout
    forced = json.loads(mc_cli(*plain, "--sequences", 7, "--dry-run", "--force", "--json").stdout)
    assert forced["stages"][0]["action"].startswith("would be rebuilt")
    assert len(stages.calls) == 1


def test_run_does_all_stages_then_none(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    first = mc_cli(*WHOLE_RUN, "-w", tmp_path)
    assert first.exit_code == 0, first.stderr
    assert [call[0] for call in stages.calls] == list(STAGES)
    assert first.stdout.split("\n\n")[:3] == [f"{stage}\nanswer  42" for stage in ("allocate", "prune-eval", "export")]
    second = json.loads(mc_cli(*WHOLE_RUN, "-w", tmp_path, "--json").stdout)
    assert [stage["ran"] for stage in second["stages"]] == [False] * len(STAGES)


def test_a_second_target_is_a_variant_over_the_same_scores(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    assert mc_cli(*WHOLE_RUN, "-w", tmp_path).exit_code == 0
    smaller = (*WHOLE_RUN, "-w", tmp_path, "--target-stored-bits", "2", "--variant", "small")
    planned = json.loads(mc_cli(*smaller, "--dry-run", "--json").stdout)["stages"]
    assert [entry["state"] for entry in planned] == ["done", "done", "new", "waiting", "waiting", "waiting"]
    second = json.loads(mc_cli(*smaller, "--json").stdout)
    assert [stage["ran"] for stage in second["stages"]] == [False, False, True, True, True, True]
    assert second["stages"][2]["folder"] == str(tmp_path / "variants" / "small" / "plan")
    again = ("allocate", "-w", tmp_path, "--target-stored-bits", 2, "--variant")
    alone = json.loads(mc_cli(*again, "small", "--json").stdout)
    assert not alone["ran"] and alone["folder"] == second["stages"][2]["folder"]
    shown = mc_cli("status", "-w", tmp_path).stdout
    assert shown.count("quantize") == 2 and "small" in shown and "(all)" in shown
    only = json.loads(mc_cli("status", "-w", tmp_path, "--variant", "small", "--json").stdout)["stages"]
    assert {entry["variant"] for entry in only} == {None, "small"}
    for name in ("../small", "packed"):
        refused = mc_cli(*again, name)
        assert refused.exit_code == 1 and "a variant's name has" in refused.stderr
    assert mc_cli("score", "-w", tmp_path, "--variant", "small").exit_code == 2, "scores are of all variants"


def test_run_stops_at_what_is_stale_and_force_from_rebuilds_from_there(
    mc_cli: Invoke, stages: FakeStages, tmp_path: Path
) -> None:
    mc_cli(*WHOLE_RUN, "-w", tmp_path)
    changed = (*WHOLE_RUN, "-w", tmp_path, "--target-stored-bits", "2")
    stopped = mc_cli(*changed)
    assert stopped.exit_code == 1
    assert "setting target_stored_bits: made with 2.25, asked for 2.0" in stopped.stderr
    stages.calls.clear()
    rebuilt = mc_cli(*changed, "--force-from", "allocate")
    assert rebuilt.exit_code == 0
    assert [force for *_, force in stages.calls] == [False, False, True, True, True, True]
    assert mc_cli(*changed, "--force-from", "nothing").exit_code == 1
    both = mc_cli(*changed, "--force", "--force-from", "allocate")
    assert both.exit_code == 1 and "give one of them" in both.stderr


def test_run_dry_run_waits_behind_what_is_not_done(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    fresh = json.loads(mc_cli(*WHOLE_RUN, "-w", tmp_path, "--dry-run", "--json").stdout)["stages"]
    assert [entry["state"] for entry in fresh] == ["new", *["waiting"] * 5]
    assert stages.calls == []
    mc_cli(*WHOLE_RUN, "-w", tmp_path)
    done = mc_cli(*WHOLE_RUN, "-w", tmp_path, "--dry-run").stdout.splitlines()
    assert [line.split(": ")[1] for line in done] == ["done"] * 6


def test_run_takes_a_recipe_and_flags_over_it(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "calibrate: {model: m, data: d, seed: 5, length: 16}\nallocate: {target_bits: 2}\nexport: {out: o}\n",
        encoding="utf-8",
    )
    result = mc_cli("run", recipe, "-w", tmp_path / "w", "--seed", 9, "--target-size", "1MB", "--eval-length", 32)
    assert result.exit_code == 0, result.stderr
    asked = {stage: settings for stage, settings, *_ in stages.calls}
    assert (asked["calibrate"].seed, asked["allocate"].seed, asked["calibrate"].length) == (9, 9, 16)
    assert (asked["allocate"].target_bits, asked["allocate"].target_size_bytes) == (None, 10**6)
    assert asked["prune-eval"].length == 32


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_an_error_about_a_recipe_s_settings_names_the_recipe(
    mc_cli: Invoke, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"calibrate: {{model: {tmp_path / 'empty'}, data: 'bundled:calibration'}}\n"
        "allocate: {target_bits: 2}\nexport: {out: o}\n",
        encoding="utf-8",
    )
    result = mc_cli("run", recipe, "-w", tmp_path / "w", *flags)
    assert result.exit_code == 1
    assert f"The settings are those of {recipe}." in " ".join(result.stderr.split())


def test_run_names_what_it_lacks(mc_cli: Invoke, stages: FakeStages) -> None:
    result = mc_cli("run", "--model", "m")
    assert result.exit_code == 2
    assert "run lacks 4 settings" in result.stderr
    assert stages.calls == []


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--eval-data", "{folder}/none.jsonl", "--eval-data .*none.jsonl: no such file"),
        ("--out", "{folder}/file", "is a file"),
        ("--out", "{folder}/foreign", "is not empty, and mc-cli export did not make it"),
        ("--out", "/dev/shm", "is a mount point"),
        ("--out", "{folder}/locked/new", "locked cannot be written to"),
        ("--target-stored-bits", "-1", "--target-stored-bits -1.0: a target is above 0"),
        ("--target-stored-bits", "nan", "--target-stored-bits nan: a target is above 0"),
    ],
)
def test_run_refuses_at_once_what_a_late_stage_would_refuse(
    mc_cli: Invoke,
    stages: FakeStages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    value: str,
    words: str,
) -> None:
    if words == "is a mount point" and not Path(value).is_mount():
        pytest.skip("this system has no such place")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # the tests' user may be root
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine").write_text("")
    result = mc_cli(*WHOLE_RUN, "-w", tmp_path / "work", flag, value.format(folder=tmp_path))
    assert result.exit_code == 1 and re.search(words, " ".join(result.stderr.split())), result.stderr
    assert stages.calls == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/there/x.partial"), "/there/x.partial: Read-only file system."),
        (PermissionError(errno.EACCES, "Permission denied", "/there"), "/there: Permission denied."),
        (SafetensorError("incomplete metadata"), r"damaged or cut short \(incomplete metadata\)"),
    ],
)
def test_what_the_system_refuses_is_no_defect_of_ours(error: Exception, words: str) -> None:
    message = error_message(error)
    assert re.search(words, message) and "defect" not in message


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\nfrom types import SimpleNamespace\nfrom mc_cli import chain, cli\n"
        # a shell that runs the tests in the background has children ignore the signal
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def run(*a, **k):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "chain.stage_module = lambda stage: SimpleNamespace(run=run)\n"
        "chain.check_stage = lambda *a, **k: None\n"
        "cli.main()\n"
    )
    arguments = ["calibrate", "--model", "m", "--data", "d", "-w", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (
        said.strip()
        == f"Stopped. Finished layers are kept in {tmp_path}; the same command continues after the last of them."
    )


@pytest.mark.parametrize(
    "where",
    [
        "typer.Typer",
        "typer.core.TyperCommand.make_context",
        "mc_cli.cli.running.prepare_libraries",
        "mc_cli.chain.check_stage",
    ],
)
def test_ctrl_c_at_any_moment_is_one_line(where: str, tmp_path: Path) -> None:
    """While the command line is imported, while flags are read, before a library is imported, and later."""
    script = (
        "import sys, pkgutil\n"
        "module, _, name = sys.argv.pop(1).rpartition('.')\n"
        "def stopped(*_, **__):\n    raise KeyboardInterrupt\n"
        "setattr(pkgutil.resolve_name(module), name, stopped)\n"
        "from mc_cli.__main__ import main\nmain()\n"
    )
    arguments = ["calibrate", "--model", "m", "--data", "d", "-w", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", script, where, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert re.fullmatch(r"Stopped\.( Finished layers are kept in [^\n]*)?\n", done.stderr), done.stderr
