"""Every settings field has one flag, every flag sets a field, and one name means one thing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import typer

from mc_cli import settings as s
from mc_cli.artifacts.work_dir import SHARED
from mc_cli.cli import app
from mc_cli.errors import InputError
from mc_cli.flags import (
    COMPUTE,
    RUN_LEAVES_OUT,
    SECTIONS,
    STAGES,
    build,
    flags_of,
    parsed,
    run_flags,
    run_option,
)
from mc_cli.settings.written import parse_floors

GROUP: Any = typer.main.get_command(app)
WORDS = {"work_dir", "force", "dry_run", "json", "debug", "log_file"}


def leaf_fields(cls: type) -> set[str]:
    """Field names of a settings dataclass, those of nested ones in place of the field that holds them."""
    names: set[str] = set()
    for field in fields(cls):
        nested = field.default if is_dataclass(field.default) else None
        names |= leaf_fields(type(nested)) if nested is not None else {field.name}
    return names


def test_every_settings_class_is_in_a_section() -> None:
    classes = {cls for cls in vars(s).values() if isinstance(cls, type) and issubclass(cls, s.Settings)}
    nested = {s.QuantizerSettings, s.PruneSettings}
    assert classes - {s.Settings, s.StageSettings} == set(SECTIONS.values()) | nested


@pytest.mark.parametrize("section", SECTIONS)
def test_fields_take_their_own_defaults(section: str) -> None:
    """A default outside the declared limits would refuse settings that nobody has changed."""
    for flag in flags_of(section):
        value = next(entry.default for cls in _classes(section) for entry in fields(cls) if entry.name == flag.field)
        assert flag.refusal(value) == ""


def _classes(section: str) -> list[Any]:
    cls: Any = SECTIONS[section]
    return [cls, *(type(entry.default) for entry in fields(cls) if is_dataclass(entry.default))]


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        (s.Flag("", "", field="few", least=8), 7, "--few 7: at least 8."),
        (s.Flag("", "", field="few", least=8), 2**31 + 1, "--few 2147483649: at most 2,147,483,648."),
        (s.Flag("", "", field="one", known=("a", "b")), "c", "--one 'c': known are a, b."),
        (s.Flag("", "", option="--gap", fits=lambda value: value < 1, says="below 1."), 1.5, "--gap 1.5: below 1."),
        (s.Flag("", "", field="a_b"), float("nan"), "--a-b nan: give a finite number of at most 63 bits."),
        (s.Flag("", "", field="a_b"), 2**63, f"--a-b {2**63}: give a finite number of at most 63 bits."),
        (s.Flag("", "", field="few", least=8), None, ""),
        (s.Flag("", "", field="few", least=8), 8, ""),
    ],
)
def test_what_a_flag_refuses(flag: s.Flag, value: Any, said: str) -> None:
    assert flag.refusal(value) == said
    if said:
        with pytest.raises(InputError, match=r"^--"):
            flag.checked(value)
    else:
        assert flag.checked(value) is value


def test_all_that_settings_refuse_is_told_at_once() -> None:
    with pytest.raises(
        InputError, match=r"--protect 1\.0: a share[\s\S]*--otp-batch 0: at least 1[\s\S]*nothing without --policy"
    ):
        s.PruneSettings(protect=1.0, otp_batch=0, sweep=True)
    with pytest.raises(InputError) as refused:  # the width of dense MLPs follows, but nobody gave it
        s.AllocateSettings(target_bits=2.0, shared_bits=9)
    assert "--shared-bits 9" in str(refused.value) and "--dense-bits" not in str(refused.value)


@pytest.mark.parametrize("section", SECTIONS)
def test_flags_are_the_fields(section: str) -> None:
    assert {flag.field for flag in flags_of(section)} == leaf_fields(SECTIONS[section])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_offers_its_fields_and_nothing_unused(stage: str) -> None:
    asked = {parameter.name for parameter in GROUP.commands[stage].params}
    jobs = {"workers", "job_threads"}  # that score and quantize hand out
    unread = {"calibrate": jobs, "prune-eval": jobs, "export": {*jobs, "batch_tokens"}}
    computing = {flag.field for flag in flags_of(COMPUTE)} - unread.get(stage, set())
    compute = computing if stage != "allocate" else set()
    place = WORDS if stage in SHARED else WORDS | {"variant"}
    listing = {"list"} if stage == "export" else set()  # of the formats; nothing is done
    assert asked == leaf_fields(SECTIONS[stage]) | compute | place | listing


def test_run_sets_every_field_of_every_stage() -> None:
    asked = {parameter.name for parameter in GROUP.commands["run"].params}
    assert asked == set(run_flags()) | WORDS | {"recipe", "force_from", "effort", "variant", "only"}
    reached = {(section, flag.field) for targets in run_flags().values() for section, flag in targets}
    everything = {(section, flag.field) for section in SECTIONS for flag in flags_of(section)}
    assert everything - reached == RUN_LEAVES_OUT


def test_flags_that_run_merges_mean_the_same() -> None:
    for targets in run_flags().values():
        assert len({(run_option(section, flag), flag.help) for section, flag in targets}) == 1


def test_one_flag_has_one_meaning_in_every_command() -> None:
    texts: dict[str, set[str]] = {}
    for command in GROUP.commands.values():
        for parameter in command.params:
            for name in (*parameter.opts, *parameter.secondary_opts):
                if name.startswith("-"):
                    texts.setdefault(name, set()).add(re.split(r" \[default| Several, ", parameter.help)[0])
    texts.pop("--data")  # text to calibrate on, and text to evaluate on: their help says which
    texts.pop("--length")  # the same, tokens per sequence or window
    texts.pop("--seed")
    texts.pop("--dtype")  # `auto` is the model's own for a server, whatever the machine
    texts.pop("--out")  # a directory, a figure, a page
    texts.pop("--variant")  # the one that a stage writes, and the one that is shown
    assert {name: found for name, found in texts.items() if len(found) > 1} == {}


def test_help_shows_the_default_of_the_dataclass() -> None:
    for parameter in GROUP.commands["calibrate"].params:
        if parameter.name == "sequences":
            assert f"[default: {s.CalibrateSettings().sequences}]" in parameter.help


def test_defaults_come_from_the_dataclasses() -> None:
    assert build("score", {}) == s.ScoreSettings()
    assert build(COMPUTE, {}) == s.RunSettings()


def test_nested_settings_take_flat_values() -> None:
    built = build("quantize", {"quantizer": "rtn", "group_size": 64, "plan": "p.yaml"})
    assert built == s.QuantizeSettings(quantizer=s.QuantizerSettings(quantizer="rtn", group_size=64), plan="p.yaml")


@pytest.mark.parametrize(("texts", "floors"), [(["3:1", "2:4"], ((3, 1), (2, 4))), (["3"], ((3, 1),)), (["none"], ())])
def test_floors(texts: list[str], floors: tuple[tuple[int, int], ...]) -> None:
    assert parse_floors(texts) == floors


def test_floors_that_are_none() -> None:
    with pytest.raises(InputError, match=r"--floor 'three:1'.*for example 3:1"):
        parse_floors(["three:1"])
    with pytest.raises(InputError, match=r"--floor '3:1 2:-1': it asks for -1 experts of width 2.*at least 1 expert"):
        parse_floors(["3:1", "2:-1"])


def test_parsed_values() -> None:
    flags = {flag.field: flag for flag in (*flags_of("allocate"), *flags_of("prune-eval"))}
    assert parsed(flags["target_size_bytes"], "16GiB") == 16 * 2**30
    assert parsed(flags["tasks"], "arc_easy, piqa") == ("arc_easy", "piqa")
    assert parsed(flags["stride"], 4) == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: s.PruneSettings(otp_steps=5), "--otp-steps changes nothing without --policy, for example"),
        (lambda: s.PruneSettings(policy=("odp",), otp_batch=2), "--otp-batch changes nothing without --policy otp"),
        (lambda: s.PruneSettings(policy=("otp",), protect=0.1), "--protect changes nothing without --policy odp"),
        (lambda: s.PruneSettings(policy=("all",)), "--policy all skips no calls, and drops no experts without"),
        (
            lambda: s.PruneSettings(policy=("all",), drop_experts=0.2, target_rate=0.1),
            "--target-rate changes nothing",
        ),
        (
            lambda: s.PruneSettings(policy=("odp",), drop_by="frequency"),
            "--drop-by changes nothing without",
        ),
        (
            lambda: s.PruneSettings(policy=("all",), drop_experts=0.2, fit_sequences=8),
            "--fit-sequences changes nothing with --policy all",
        ),
        (lambda: s.EvaluateSettings(data="d", task_limit=4), "--task-limit changes nothing without --tasks"),
        (lambda: s.RunSettings(job_threads=2), "--job-threads changes nothing without --workers"),
        (
            lambda: s.CalibrateSettings("m", data="d", gradient_tokens=0, gradient_samples=2, choice_costs=False),
            "--gradient-samples, --no-choice-costs change nothing with --gradient-tokens 0",
        ),
        (lambda: s.ScoreSettings((2, 4), all_widths=True), "--all-widths changes nothing with --bits 2,4"),
        (
            lambda: s.ScoreSettings(
                engine="llama.cpp", quantizer=s.QuantizerSettings(quantizer="gguf"), all_widths=True
            ),
            "--all-widths changes nothing with --for llama.cpp",
        ),
        (lambda: s.ExportSettings("gguf", "o", shard_bytes=10**6), "--shard-size changes nothing with --format gguf"),
        (lambda: s.AllocateSettings(cut_ratio=0.2, gap=0.1), "--gap changes nothing where scores alone say"),
        (lambda: s.AllocateSettings(cut_ratio=0.2, time_limit_s=1), "--time-limit changes nothing where"),
        (lambda: s.AllocateSettings(drop_ratio=0.2, hedge=0.1), "--hedge changes nothing where scores alone"),
        (lambda: s.AllocateSettings(drop_ratio=0.2, target_bits=2, beta=1.0), "--beta changes nothing with --drop"),
        (lambda: s.AllocateSettings(method="camera-q", target_bits=2, gamma=1.0), "--gamma changes nothing with"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()
