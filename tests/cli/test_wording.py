"""Messages name settings as whoever asked does: flags of the command, keys of the recipe, parameters from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import mc_cli as door
from mc_cli.door import _by_name
from mc_cli.errors import InputError, reworded_text
from mc_cli.flags import SECTIONS, STAGES, flags_of, flags_of_command, run_flags, run_option
from mc_cli.recipe import Recipe, plan_run, read_recipe
from mc_cli.wording import FLAGS, PYTHON, PYTHON_STAGE, RUN, Words, keys_of
from tests.fake_stages import FakeStages

Command = Callable[..., Result]
MESSAGE = "the rows have no field 'text'. Name another with --text-field, or a smaller --length."
GIVEN = ("--target-bits", 2, "--out", "o")
RECIPE = """
work_dir: {work}
calibrate: {{model: m, data: "bundled:calibration", length: 64}}
score: {{bits: [2, 3], group_size: 64}}
allocate: {{target_bits: 2.5, cuts: false}}
prune-eval: {{text_field: text, max_sequences: 4}}
export: {{out: o}}
"""


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_name_for_everyone(section: str) -> None:
    for flag in flags_of(section):
        assert Words(FLAGS).names(section) == {}
        assert Words(RUN).text(section, f"{flag.name} 3: no.") == f"{run_option(section, flag)} 3: no."
        everything = keys_of({name: {each.field: 0 for each in flags_of(name)} for name in SECTIONS}, [])
        assert Words(RUN, everything).text(section, f"Give {flag.name}.") == f"Give {section}.{flag.field}."
        name = Words(PYTHON).text(section, flag.name)
        assert name.isidentifier() and (section, flag.field) in [
            (place, each.field)
            for place, each in (*_by_name(run_flags())[name], *((section, each) for each in flags_of("allocate")))
        ]
    for stage, flag in flags_of_command("prune-eval"):
        names = _by_name({each.field: [(place, each)] for place, each in flags_of_command("prune-eval")})
        assert names[Words(PYTHON_STAGE).text(stage, flag.name)] == [(stage, flag)]


def test_flags_of_other_stages_and_what_denies_them() -> None:
    keys = keys_of({"allocate": {"cuts": False}, "score": {"sweeps": 2}}, ["work_dir"])
    assert (
        Words(PYTHON).text("export", "allocate with --no-cuts; --target-size")
        == "allocate with cuts=False; target_size"
    )
    assert Words(PYTHON).text("quantize", "Use --force, or another --variant.") == "Use force=True, or another variant."
    assert Words(PYTHON).text("allocate", "--for mlx") == "engine mlx"
    assert Words(RUN, keys).text("quantize", "--sweeps, --no-cuts, --work-dir, --force") == (
        "score.sweeps, allocate.cuts: false, work_dir, --force"
    )


def test_commands_that_a_message_tells_to_run_keep_their_flags() -> None:
    names = {"--data": "data", "--force": "force=True", "--halves": "halves"}
    for told in (
        "Run `mc-cli prune-eval --data x --force` first.",
        "Other formats: mc-cli export --list.",
        "Run score --force.",
        "allocate --method reap --data 0.25 --force drops them.",
    ):
        assert reworded_text(told, names) == told
    assert (
        reworded_text("Run allocate with --halves, then quantize.", names) == "Run allocate with halves, then quantize."
    )
    assert reworded_text("--data-field, x--data and --data.", names) == "--data-field, x--data and data."


def test_warnings_of_a_run_name_its_flags(stages: FakeStages, mc_cli: Command, tmp_path: Path) -> None:
    stages.warnings = dict.fromkeys(("calibrate", "prune-eval"), MESSAGE)
    asked = ("run", "--model", "m", "--data", "bundled:calibration", *GIVEN, "-w", tmp_path / "w")
    for again in (False, True):
        said = " ".join(mc_cli(*asked).stderr.split())
        assert "Name another with --text-field, or a smaller --length." in said, again
        assert "Name another with --eval-text-field, or a smaller --eval-length." in said, again
    stages.failures = {"prune-eval": InputError(MESSAGE)}
    failed = mc_cli(*asked, "--force")
    assert failed.exit_code == 1 and "--eval-text-field, or a smaller --eval-length" in " ".join(failed.stderr.split())


def test_warnings_of_a_recipe_name_its_keys(stages: FakeStages, mc_cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(work=tmp_path / "w"))
    stages.warnings = dict.fromkeys(("calibrate", "prune-eval"), MESSAGE)
    said = " ".join(mc_cli("run", path, "--length", 32).stderr.split())
    assert "another with --text-field, or a smaller --length." in said
    assert "another with prune-eval.text_field, or a smaller --eval-length." in said


def test_refusals_of_a_recipe_name_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(work="w") + "quantize: {quantizer: rtn, sweeps: 2}\n")
    with pytest.raises(
        InputError, match=r"^quantize.sweeps changes nothing with quantize.quantizer rtn. Leave it out.$"
    ):
        plan_run(read_recipe(path))
    over = read_recipe(path).override([("quantize", "sweeps", 3)], None)
    with pytest.raises(InputError, match=r"^--sweeps changes nothing with quantize.quantizer rtn. Leave it out.$"):
        plan_run(over)


def test_refusals_from_python_name_parameters(tmp_path: Path) -> None:
    asked = {"data": "bundled:calibration", "out": tmp_path / "o", "target_stored_bits": 2.5}
    for settings, words in (
        ({"quantizer": "rtn", "sweeps": 4}, "^sweeps changes nothing with quantizer rtn"),
        ({"effort": "slow"}, "^effort 'slow': known are"),
        ({"max_memory": 3}, "^max_memory: '3' is 3 bytes"),
        ({"floor": "3:0"}, "^floor '3:0': it asks for 0 experts"),
        ({"floor": "3:1", "floors": "3:1"}, "^floor and floors are one setting. Give one of them.$"),
        ({"eval_length": 99999}, "^eval_length 99999: the model has"),
        ({"eval_split": "x"}, "^eval_split x changes nothing with eval_data bundled:heldout"),
    ):
        with pytest.raises(InputError, match=words):
            door.compress("bundled:demo-moe", **{**asked, **settings})
    with pytest.raises(
        InputError, match=r"^run lacks 1 setting:\n  one of target_stored_bits, target_bits, target_size,"
    ):
        door.compress("bundled:demo-moe", data="bundled:calibration", out=tmp_path / "o")
    with pytest.raises(InputError, match=r"^device 'tpu': known are"):
        door.load(tmp_path, device="tpu")
    with pytest.raises(InputError, match=r"^target_rate changes nothing without policy, for example policy odp"):
        door.evaluate(tmp_path, data="bundled:heldout", target_rate=0.2)


@pytest.mark.parametrize(
    ("allocate", "handed"),
    [
        ({"cut_ratio": 0.2}, True),
        ({"drop_ratio": 0.25}, True),
        ({"method": "camera-q", "target_bits": 3}, True),
        ({"method": "pmq", "target_bits": 3}, True),
        ({"target_bits": 3}, False),
    ],
)
def test_the_widths_of_a_run_are_those_of_its_plan(allocate: dict[str, object], handed: bool) -> None:
    """allocate chooses among what is scored; where it would not, it is handed what `run --bits` says."""
    bits = (0, 4) if "method" not in allocate else (2, 3, 4)
    given = [("calibrate", "model", "m"), ("calibrate", "data", "d"), ("export", "out", "o"), ("score", "bits", bits)]
    plan = plan_run(Recipe().override([*given, *(("allocate", *each) for each in allocate.items())], "w"))
    assert plan.stages["score"].bits == bits and plan.stages["allocate"].bits == (bits if handed else None)
    assert tuple(plan.stages) == STAGES
