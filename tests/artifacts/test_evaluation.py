"""The evaluation's file and the quantization report: what is written is read back, what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_cli.artifacts.evaluation import UNITS, Evaluation, TextResult
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.artifacts.quantization import MatrixReport, read_report, write_report
from mc_cli.errors import ArtifactError

EVALUATION = Evaluation(
    total=TextResult(30, 2.0, 2.25, 0.2, 0.75),
    domains={"a": TextResult(10, 1.0, 1.25, 0.1, 0.5), "b": TextResult(20, 2.5, 2.75, 0.25, 0.875)},
    router_changes={1: 0.125, 10: 0.0},
    context={"length": 16, "stride": 8, "windows": 3, "data": "held-out.jsonl"},
    stored_bytes={"expert": {"codes": 10, "side": 2, "kept": 0}},
    original_bytes={"expert": 64},
    expert_stored_bits=3.0,
    expert_code_bits=2.5,
    tasks={"original": {"results": {"t": {"acc,none": 0.5}}}},
)
ROWS = [
    MatrixReport(
        "m.experts.0.up_proj", "expert", "quantized", 32, 2, "affine_b2_g8", 7, 0.5, 0.01, 0.25, 0.003, ("a note",)
    ),
    MatrixReport("m.experts.1.up_proj", "expert", "pruned", 32, 0),
]


def test_evaluation_is_read_back(tmp_path: Path) -> None:
    EVALUATION.write(tmp_path / "eval.json")
    assert Evaluation.read(tmp_path / "eval.json") == EVALUATION
    assert read_json(tmp_path / "eval.json")["units"] == UNITS


def test_every_measure_has_a_unit() -> None:
    assert {"loss", "perplexity", "kl_divergence", "same_top_token", "router_changes"} <= UNITS.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("schema", 99), ("total", {"tokens": 1}), ("domains", [1]), ("router_changes", {"x": 1}), ("other", 1)],
)
def test_damaged_evaluation_is_named(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "eval.json"
    EVALUATION.write(path)
    write_json(path, {**read_json(path), name: value})
    with pytest.raises(ArtifactError, match=r"eval\.json is not an evaluation .* Run prune-eval --force"):
        Evaluation.read(path)


def test_report_is_read_back(tmp_path: Path) -> None:
    write_report(tmp_path / "r.json", ROWS)
    assert read_report(tmp_path / "r.json") == ROWS


@pytest.mark.parametrize(
    ("name", "value"), [("schema", 99), ("matrices", [{}]), ("matrices", 3), ("matrices", [{"notes": 1}])]
)
def test_damaged_report_is_named(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "r.json"
    write_report(path, ROWS)
    write_json(path, {**read_json(path), name: value})
    with pytest.raises(ArtifactError, match=r"r\.json is not a quantization report.* Run quantize --force"):
        read_report(path)
