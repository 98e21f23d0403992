"""Results side by side: files of figures, exported directories by their model cards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mc_cli.errors import InputError
from mc_cli.overview.comparison import Compared, compare
from mc_cli.overview.comparison_report import comparison_chart, comparison_summary

ROWS = [
    {"contender": "ours", "seed": 0, "target": 2.0, "stored_bits": 2.06, "model_bytes": 100, "gap": 0.02, "kl": 0.03},
    {"contender": "ours", "seed": 1, "target": 2.0, "stored_bits": 2.06, "model_bytes": 102, "gap": 0.04, "kl": 0.05},
    {"contender": "theirs", "seed": 0, "stored_bits": 2.1, "gap": 0.09, "original_loss": 3.0, "tokens": 10},
]


def written(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_seeds_of_one_contender_become_their_mean(tmp_path: Path) -> None:
    found, warnings = compare([written(tmp_path / "figures.json", ROWS)])
    ours, theirs = found
    assert (ours.name, ours.runs, ours.stored_bytes, ours.gap, ours.kl) == ("ours", 2, 101, pytest.approx(0.03), 0.04)
    assert (theirs.runs, theirs.stored_bytes, theirs.tokens, theirs.gap) == (1, None, 10, 0.09)
    assert warnings == []
    (content,) = comparison_summary(found)["tables"]
    assert [row[0] for row in content["rows"]] == ["ours", "theirs"]
    assert all(len(row) == len(content["columns"]) for row in content["rows"])


def test_other_texts_are_told() -> None:
    from mc_cli.overview.comparison import _other_texts

    first = Compared("a", "x", original_loss=3.0, tokens=10)
    assert _other_texts([first, Compared("b", "x", original_loss=3.0001, tokens=10), Compared("c", "x")]) == []
    (told,) = _other_texts([first, Compared("b", "x", original_loss=3.1, tokens=10), Compared("c", "x", tokens=9)])
    assert "as a: b." in told


def test_results_of_one_name_are_called_by_the_folders_that_tell_them_apart(tmp_path: Path) -> None:
    row = [{"contender": "o", "gap": 0.1, "kl": 0.1}]
    places = [tmp_path / "a" / "runs", tmp_path / "b" / "runs"]
    for place in places:
        place.mkdir(parents=True)
    found, _ = compare(
        [written(place / "figures.json", row) for place in places] + [written(tmp_path / "f.json", ROWS)]
    )
    assert [entry.name for entry in found] == ["a/runs/o", "b/runs/o", "ours", "theirs"]


def test_the_figure_is_over_bytes_where_all_have_them(tmp_path: Path) -> None:
    found, _ = compare([written(tmp_path / "figures.json", ROWS)])
    whole = comparison_chart(found[:1], unit=("B", 1))
    mixed = comparison_chart(found, unit=("B", 1))
    assert whole is not None and mixed is not None
    assert whole.series[0].x == [101] and "stored size" in whole.x_label
    assert mixed.series[0].x == [2.06, 2.1] and "bits" in mixed.x_label
    assert comparison_chart([Compared("a", "x")], unit=("B", 1)) is None


def test_all_that_is_no_result_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    wrong = [folder, written(tmp_path / "list.json", [{"gap": 1}]), written(tmp_path / "text.json", "gap")]
    wrong.append(written(tmp_path / "number.json", [{"contender": "a", "gap": 1, "kl": "x"}]))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError) as caught:
        compare([*wrong, tmp_path / "broken.json"])
    message = str(caught.value)
    assert "5 things stand against this" in message
    assert "is no work directory" in message and "kl is 'x'" in message and "cannot be read as JSON" in message
