"""Results side by side: files of figures, exported directories by their model cards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mc_cli.errors import InputError
from mc_cli.overview.comparison import Compared, compare
from mc_cli.overview.comparison_report import comparison_chart, comparison_summary
from mc_cli.overview.tensor_bytes import tensor_bytes

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


def test_bytes_of_an_export_are_those_of_its_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    names = ["config.json", "model.safetensors"]
    assert tensor_bytes(tmp_path, names) == 3 * 5 * 4 + 7
    assert tensor_bytes(tmp_path, ["config.json"]) is None
    assert tensor_bytes(tmp_path, [*names, "gone.safetensors"]) is None
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:20])
    assert tensor_bytes(tmp_path, [*names, "cut.safetensors"]) is None


@pytest.mark.parametrize("alignment", [None, 64])
def test_bytes_of_a_gguf_file_are_those_behind_its_head(tmp_path: Path, alignment: int | None) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_array("names", ["one", "two"])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name in ("a", "b"):
        writer.add_tensor(name, np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert tensor_bytes(tmp_path, ["model.gguf"]) == 2 * 4 * 32 * 4
    (tmp_path / "other.gguf").write_bytes(b"no such file")
    assert tensor_bytes(tmp_path, ["other.gguf"]) is None


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
