"""Texts that are too short, or chats that no template takes, are refused before the first forward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mc_cli.ahead import texts
from tests.ahead.conftest import invoke, small_run
from tests.conftest import TinyModel

_CHAT = {"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]}
_LONG = "a word and another one " * 40


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder of texts that cannot be used, each in its way."""
    (tmp_path / "short.txt").write_text("hello\n")
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(_CHAT)}\n")
    (tmp_path / "mixed.jsonl").write_text(f"{json.dumps({'text': _LONG})}\n{json.dumps(_CHAT)}\n")
    (tmp_path / "refusing.jinja").write_text("{{ raise_exception('no') }}")
    return tmp_path


TOO_SHORT = {
    ("--data", "short.txt"): "--data holds 5 tokens, less than one sequence of --length 64",
    ("--eval-data", "short.txt"): "--eval-data holds no domain with 64 tokens (short 5). Give more text or a smaller "
    "--eval-length.",
    ("--policy", "odp", "--fit-data", "short.txt"): "--fit-data holds 5 tokens, less than one sequence of 64",
    ("--data", "chat.jsonl"): "--data {}chat.jsonl, line 1: a row with messages needs a chat template",
    ("--data", "mixed.jsonl"): "--data {}mixed.jsonl, line 2: a row with messages needs a chat template",
    ("--eval-data", "mixed.jsonl"): "--eval-data {}mixed.jsonl, line 2: a row with messages needs a chat template",
    ("--policy", "odp", "--fit-data", "chat.jsonl"): "--fit-data {}chat.jsonl, line 1: a row with messages needs",
    ("--eval-data", "mixed.jsonl", "--chat-template", "refusing.jinja"): "The chat template refuses all 1 rows",
}


@pytest.mark.parametrize("flags", TOO_SHORT, ids=" ".join)
def test_a_run_refuses_texts_that_are_not_enough(given: Path, flags: tuple[str, ...]) -> None:
    filled = [str(given / each) if (given / each).is_file() else each for each in flags]
    for dry in (("--dry-run",), ()):
        status, said = small_run(given, *filled, *dry)
        assert status == 1 and TOO_SHORT[flags].format(f"{given}/") in said
    assert not (given / "work" / "calibration").exists()


def test_what_is_too_short_in_several_ways_is_told_at_once(given: Path) -> None:
    short = given / "short.txt"
    wrong = ("--data", short, "--eval-data", short, "--policy", "odp", "--fit-data", short, "--eval-text-field", "no")
    status, said = small_run(given, *wrong, "--dry-run")
    assert status == 1 and "3 things stand against this" in said
    status, said = small_run(given, "--eval-data", given / "chat.jsonl", "--no-chat-template")
    assert status == 1 and "--eval-data holds no domain" in said


IDLE = {
    ("--split", "validation"): "--split validation changes nothing with --data bundled:calibration, which is no",
    ("--eval-split", "train"): "--eval-split train changes nothing with --eval-data bundled:heldout, which is no",
    (
        "--data",
        "long.txt",
        "--text-field",
        "body",
    ): "--text-field body changes nothing with --data {}long.txt: no row has",
    ("--eval-data", "rows.jsonl", "--eval-text-field", "body"): "(read were 2 by chat: messages)",
}


@pytest.mark.parametrize("flags", IDLE, ids=" ".join)
def test_splits_and_fields_that_say_nothing_of_the_text_are_refused(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "long.txt").write_text(_LONG)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(_CHAT)}\n" * 2)
    filled = [str(tmp_path / each) if (tmp_path / each).is_file() else each for each in flags]
    status, said = small_run(tmp_path, *filled, "--dry-run")
    assert status == 1 and IDLE[flags].format(f"{tmp_path}/") in said


def test_names_of_datasets_and_large_texts_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_READ_WHOLE", 10_000)
    (tmp_path / "long.txt").write_bytes(_LONG.encode() * 20 + b"\xff")
    long, name = ("--eval-data", tmp_path / "long.txt"), ("--eval-data", "nobody/has-this", "--eval-split", "test")
    for flags, words in ((long, "cannot be read as UTF-8 (byte"), (name, "neither a file here nor a dataset")):
        status, said = small_run(tmp_path, *flags)
        assert status == 1 and f"--eval-data {flags[1]}" in said and words in said
    assert not (tmp_path / "work" / "calibration").exists()


def test_a_field_of_the_held_out_text_need_not_be_in_the_text_to_fit_on(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(_LONG * 20)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'body': _LONG})}\n" * 2)
    read = ("--eval-data", tmp_path / "rows.jsonl", "--eval-text-field", "body")
    status, said = small_run(tmp_path, *read, "--policy", "odp", "--fit-data", tmp_path / "long.txt", "--dry-run")
    assert status == 0, said


@pytest.mark.parametrize("name", ["short.txt", "chat.jsonl"])
def test_calibrate_alone_refuses_them_in_a_dry_run_too(given: Path, name: str) -> None:
    asked = ("calibrate", "--model", "bundled:demo-moe", "-w", given / "work", "--data", given / name)
    found = {invoke(*asked, *dry) for dry in (("--dry-run",), ())}
    ((status, said),) = found
    assert status == 1 and "--data" in said


def test_one_window_to_fit_on_is_too_few(given: Path) -> None:
    (given / "one.txt").write_text("word " * 70)
    status, said = small_run(given, "--policy", "odp", "--fit-data", given / "one.txt", "--dry-run")
    assert status == 1 and "There are 1 windows of 64 tokens to fit a policy on" in said


def test_a_large_text_is_read_until_it_is_enough(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_READ_WHOLE", 100)
    (given / "short.jsonl").write_text(f"{json.dumps({'text': 'a'})}\n" * 20)  # its beginning does not tell
    assert small_run(given, "--eval-data", given / "short.jsonl", "--dry-run")[0] == 0
    (given / "chats.jsonl").write_text(f"{json.dumps(_CHAT)}\n" * 20)
    status, said = small_run(given, "--eval-data", given / "chats.jsonl", "--dry-run")
    assert status == 1 and "needs a chat template" in said


def test_rows_with_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    asked = ("calibrate", "--model", "bundled:demo-vision", "-w", tmp_path / "w", "--data", "bundled:scenes")
    status, said = invoke(*asked, "--length", 8, "--dry-run")
    assert status == 1 and "--data holds no row of at most 8 tokens" in said
    assert invoke(*asked, "--dry-run")[0] == 0


def test_an_estimate_needs_no_text_of_the_length(tiny_model: TinyModel, given: Path) -> None:
    asked = ("estimate", tiny_model("mixtral"), "--target-stored-bits", "2.5", "--data", given / "short.txt")
    assert invoke(*asked)[0] == 0


def test_errors_of_a_run_name_its_flags(given: Path) -> None:
    status, said = small_run(given, "--stride", 100, "--dry-run")
    assert status == 1 and "--stride 100: from 0 (no overlap) to --eval-length 64" in said
    status, said = small_run(given, "--eval-length", 10**6, "--dry-run")
    assert status == 1 and "--eval-length 1000000: the model has" in said
    status, said = small_run(given, "--eval-data", given / "chat.jsonl", "--eval-text-field", "no", "--dry-run")
    assert status == 1 and "--data" not in said.replace("--eval-data", "")
