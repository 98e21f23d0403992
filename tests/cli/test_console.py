"""Progress lines and the formats of figures."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from mc_cli import console, console_progress
from mc_cli.console_progress import ConsoleProgress


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (math.inf, "inf"),
        ([1, 2.5], "1, 2.5"),
        ({"a": None}, "a: -"),
        ("text", "text"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert console.value_text(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (5 * 2**40, "5.0 TiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert console.size_text(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (61.4, "01:01"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert console.duration_text(seconds) == text


def test_facts_line_up() -> None:
    assert console.facts_text({"a": 1, "stored bytes": 2048}) == "a             1\nstored bytes  2,048 (2.0 KiB)"


def test_plain_lines_have_rate_time_left_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ConsoleProgress(live=False, interval_s=0)
    with progress.step("quantize", total=4, unit="layer", done=1) as step:
        step.advance(note="layer 1")
        step.advance(note="layer 2")
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.splitlines()
    assert lines[0] == "quantize: 4 layers, continuing after 1"
    assert lines[1].startswith("quantize: 2/4 layers, ")
    for words in ("/s", " left", " peak", "layer 1"):
        assert words in lines[1]
    assert len(lines[1]) <= 80
    assert lines[-1].startswith("quantize: 3/4 layers (1 by an earlier run) in 00:00")


def test_plain_lines_come_at_a_modest_rate(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ConsoleProgress(live=False, interval_s=60)
    with progress.step("score", total=500, unit="expert") as step:
        for _ in range(500):
            step.advance()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_warnings_and_inner_steps_on_a_live_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ConsoleProgress(live=True)
    with progress.step("outer [bold]", total=1, unit="layer") as outer:
        with progress.step("inner", total=2, unit="expert") as inner:
            inner.advance()
            progress.warn("thin [red]text")
        outer.advance(note="layer 0")
    said = capsys.readouterr().err
    assert "Warning: thin [red]text" in said
    assert "outer [bold]: 1/1 layer in 00:0" in said


def test_lines_of_a_run_say_which_stage_of_how_many_and_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["calibrate", "quantize", "prune-eval", "quantize", "prune-eval"]
    progress = ConsoleProgress(live=False, interval_s=0, stages=stages)
    for title in ("calibrate: forward", "calibrate: backward", "prune-eval: original and packed model", "quantize"):
        with progress.step(title, total=1000, unit="layer") as step:
            step.advance(note="a long name of what is being worked on")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[::3]] == ["[1/5]", "[1/5]", "[3/5]", "[4/5]"]
    assert max(map(len, lines[1::3])) <= 80 and all("1/1000 layers" in line for line in lines[1::3])


def test_lines_of_a_run_tell_what_is_left_of_all_stages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console_progress.time, "monotonic", lambda: now)
    progress = ConsoleProgress(live=False, interval_s=0, stages=["calibrate", "score", "quantize", "quantize"])
    progress.expect({"calibrate": 10.0, "score": 20.0, "quantize": 30.0})
    with progress.step("calibrate: forward", total=4, unit="layer") as step:
        now = 2.0
        step.advance()  # 8 s of 10 are expected to be left, 6 of the step
    now = 20.0  # calibrate has taken twice as long as was expected
    with progress.step("score", total=2, unit="layer") as step:
        now = 60.0
        step.advance()  # 40 s left of the step, which is more than was expected of all of it
    lines = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert "00:06 left, run 01:28, " in lines[0]
    assert "00:40 left, run 02:40, " in lines[1]
    assert max(map(len, lines)) <= 80


def test_no_closing_line_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ConsoleProgress(live=False)
    with pytest.raises(ValueError, match="broken"), progress.step("score", total=2, unit="layer"):
        raise ValueError("broken")
    assert capsys.readouterr().err.splitlines() == ["score: 2 layers"]


def test_a_table_survives_missing_and_odd_fields(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_summary(
        {"tables": [{"columns": ["a", {"name": "b", "unit": "s", "align": "right"}], "rows": [["x", None]]}, {}]}
    )
    assert "b [s]" in capsys.readouterr().out


def test_nothing_is_cut_off_where_a_terminal_is_narrow() -> None:
    """Cells are folded and facts go on below their beginning; a file gets whole lines."""
    facts = {"objective": "diagonal Fisher at the MoE output, labels sampled from the model; nats per token", "n": 3}
    lines = console.facts_text(facts, columns=60).split("\n")
    assert (
        len(lines) == 3 and max(map(len, lines)) <= 60 and lines[1].startswith(" " * 11) and lines[2] == "n          3"
    )
    assert " ".join(" ".join(lines[:2]).split()) == " ".join(console.facts_text(facts).split("\n")[0].split())
    drawn = Console(file=io.StringIO(), width=24)
    columns = [{"name": "target"}, {"name": "bits per expert weight", "align": "right"}]
    drawn.print(console.table_of({"columns": columns, "rows": [["--target-stored-bits 2.0", 2.0]]}))
    said = drawn.file.getvalue()  # type: ignore[attr-defined]
    first = "".join(line[:14].strip() for line in said.split("\n")[5:])
    assert "…" not in said and first == "--target-stored-bits2.0"
