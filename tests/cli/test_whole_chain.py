"""The real stages behind the real commands, on a tiny random checkpoint: what a user types, end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from mc_cli import native
from mc_cli.cli import app
from mc_cli.flags import STAGES
from mc_cli.kernels import affine
from tests.overview.test_drawing import check_page

SMALL = ("--sequences", "4", "--length", "32", "--gradient-tokens", "32", "--bits", "2,4", "--quantizer", "rtn")
WORDS = "hello world the cat sat on a mat while the rain fell on the hills. "


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run_arguments(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Arguments of one `run` without a recipe."""
    place = tmp_path_factory.mktemp("chain")
    (place / "text.txt").write_text(WORDS * 20, encoding="utf-8")
    (place / "heldout.txt").write_text("the rain fell while a cat sat on the mat. " * 20, encoding="utf-8")
    texts = ("--data", place / "text.txt", "--eval-data", place / "heldout.txt", "--eval-length", 32)
    places = ("-w", place / "work", "--out", place / "model")
    return ("--model", tiny_model("mixtral"), *texts, *places, "--target-stored-bits", 4.5, "--group-size", 16, *SMALL)


@pytest.fixture(scope="module")
def finished(run_arguments: tuple[object, ...]) -> Path:
    """The place of a finished run."""
    result = invoke("run", *run_arguments)
    assert result.exit_code == 0, result.stderr
    assert "perplexity after" in result.stdout
    return Path(str(run_arguments[run_arguments.index("-w") + 1])).parent


def test_a_second_run_does_nothing(run_arguments: tuple[object, ...], finished: Path) -> None:
    planned = json.loads(invoke("run", *run_arguments, "--dry-run", "--json").stdout)["stages"]
    assert [(entry["stage"], entry["state"]) for entry in planned if entry["state"] != "done"] == []
    again = invoke("run", *run_arguments, "--json")
    assert [entry["ran"] for entry in json.loads(again.stdout)["stages"]] == [False] * 6


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of everything below `folder`."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_dry_run_writes_nothing(run_arguments: tuple[object, ...], finished: Path, tmp_path: Path) -> None:
    fresh = ("-w", tmp_path / "work", "--dry-run")
    model = run_arguments[run_arguments.index("--model") + 1]
    for command in (("calibrate", "--model", model, "--data", finished / "text.txt"), ("run", *run_arguments)):
        result = invoke(*command, *fresh)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith("calibrate: new: would run")
        assert list(tmp_path.iterdir()) == []
    (finished / "work" / "digests.json").unlink()  # what a run would write again
    before = contents(finished)
    assert invoke("run", *run_arguments, "--dry-run").stdout.count(": done: ") == 6
    assert contents(finished) == before


def test_status_has_all_stages_done(finished: Path) -> None:
    stages = json.loads(invoke("status", "-w", finished / "work", "--json").stdout)["stages"]
    assert {entry["state"] for entry in stages} == {"done"}
    assert [entry["stage"] for entry in stages] == [*STAGES]


def test_stage_by_stage_is_the_same_chain(run_arguments: tuple[object, ...], finished: Path) -> None:
    """The commands of the README on the same work directory find everything done: quantize follows score by itself."""
    work = ("-w", finished / "work")
    for command in (
        ("score", *work, "--bits", "2,4", "--quantizer", "rtn", "--group-size", 16),
        ("allocate", *work, "--target-stored-bits", 4.5),
        ("quantize", *work),
        ("prune-eval", *work, "--data", finished / "heldout.txt", "--length", 32),
        ("export", *work, "--format", "transformers", "--out", finished / "model"),
    ):
        result = invoke(*command, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["ran"] is False


def test_a_changed_budget_stops_and_says_what_changed(run_arguments: tuple[object, ...], finished: Path) -> None:
    result = invoke("run", *run_arguments, "--target-stored-bits", 5)
    assert result.exit_code == 1
    assert "target_stored_bits: made with 4.5, asked for 5.0" in result.stderr
    assert "--force" in result.stderr


def test_generate_from_the_export(finished: Path) -> None:
    result = invoke("generate", finished / "model", "--prompt", "the cat", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("the cat")
    assert "4 tokens in" in result.stderr
    drawn = [
        json.loads(
            invoke("generate", finished / "model", "--prompt", "the cat", "--max-new-tokens", 4, *more, "--json").stdout
        )["text"]
        for more in (("--temperature", 1, "--seed", 1), ("--temperature", 1, "--seed", 1))
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", ""), "--prompt holds no token"),
        (("--prompt", "the cat", "--max-new-tokens", "500"), "the model has 128 positions: together too many"),
        (("--prompt", "the cat", "--activation-bits", "4"), "--activation-bits 4: 16 or 8"),
    ],
)
def test_generate_refuses_what_cannot_work(finished: Path, arguments: tuple[str, ...], words: str) -> None:
    result = invoke("generate", finished / "model", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert not result.stdout


def test_bench_measures_the_export_beside_another_model(finished: Path, tiny_model: Callable[..., Path]) -> None:
    beside = tiny_model("mixtral")
    result = invoke(
        "bench",
        finished / "model",
        "--beside",
        beside,
        "--prompt-tokens",
        8,
        "--new-tokens",
        3,
        "--threads",
        1,
        "--json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["reading_bytes_per_s"] > 1e8
    packed, *dense = found["models"]
    assert [speed["dtype"] for speed in found["models"]] == ["float32", "bfloat16", "float32"]
    assert packed["products"] == affine.path_name() and {speed["products"] for speed in dense} == {"torch"}
    half, full = dense
    assert full["weight_bytes"] == 2 * half["weight_bytes"] and full["token_bytes"] == 2 * half["token_bytes"]
    config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(beside / "model.safetensors")
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    embedding = tensors["model.embed_tokens.weight"]
    every = sum(tensor.numel() for tensor in tensors.values())
    idle = experts * (1 - config["num_experts_per_tok"] / config["num_local_experts"])
    assert full["weight_bytes"] == 4 * every
    assert full["token_bytes"] == 4 * (every - idle - embedding.numel() + embedding.shape[1])
    for speed in found["models"]:
        assert len(speed["tokens_s"]) == 3 and min(speed["tokens_s"]) > 0 and speed["prompt_s"] > 0
        assert 0 < speed["base_bytes"] < speed["peak_bytes"] and speed["threads"] == 1


def test_bench_says_which_model_failed_and_why(finished: Path, tmp_path: Path) -> None:
    result = invoke("bench", tmp_path)
    assert result.exit_code == 1 and "no config.json" in result.stderr
    result = invoke("bench", finished / "model", "--prompt-tokens", 10**6)
    assert result.exit_code == 1 and "the prompt alone is too long" in result.stderr
    result = invoke("bench", finished / "model", "--beside", tmp_path / "nowhere")
    assert result.exit_code == 1 and f"--beside {tmp_path / 'nowhere'}: no such directory" in result.stderr
    assert "bench:" not in result.stderr  # nothing was measured


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_bench_of_few_positions_with_inputs_of_8_bits(finished: Path, tmp_path: Path) -> None:
    model = shutil.copytree(finished / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 20
    (model / "config.json").write_text(json.dumps(config))
    result = invoke("bench", model, "--activation-bits", 8, "--new-tokens", 3, "--threads", 1, "--json")
    (found,) = json.loads(result.stdout)["models"]
    assert found["prompt_tokens"] == 20 - 3 - 2  # two are decoded untimed
    assert found["products"] == affine.path_name() + ", inputs of 8 bits"


def test_bench_tells_of_a_damaged_file(finished: Path, tmp_path: Path) -> None:
    model = shutil.copytree(finished / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = invoke("bench", model, "--new-tokens", 3)
    assert (
        result.exit_code == 1 and "not a whole safetensors file" in result.stderr and "Traceback" not in result.stderr
    )


def test_generate_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    result = invoke("generate", tmp_path, "--prompt", "a")
    assert result.exit_code == 1
    assert "has no config.json" in result.stderr


def test_the_curve_of_a_finished_run(finished: Path, tmp_path: Path) -> None:
    figure = tmp_path / "curve.svg"
    result = invoke("curve", "-w", finished / "work", "--fit", "1GiB", "--out", figure, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    ours = [point for point in told["points"] if point["method"] == "global"]
    assert len(ours) >= 5 and {point["method"] for point in told["points"]} >= {"global", "uniform"}
    assert [point["stored_bytes"] for point in ours] == sorted(point["stored_bytes"] for point in ours)
    losses = [point["predicted_loss"] for point in ours]
    assert losses == sorted(losses, reverse=True), "more bytes never cost more"
    assert all(point["expected_gap_low"] < point["expected_gap"] < point["expected_gap_high"] for point in ours)
    (measured,) = told["measured"]
    plan = json.loads(invoke("allocate", "-w", finished / "work", "--target-stored-bits", 4.5, "--json").stdout)
    assert measured["predicted_loss"] == plan["summary"]["objective"]["predicted_loss_of_model"]
    assert told["best_that_fits"]["predicted_loss"] == pytest.approx(min(losses), abs=1e-9)
    assert figure.read_text().startswith("<?xml")
    assert "expected gap" in invoke("curve", "-w", finished / "work").stdout


def test_a_size_out_of_reach_is_told_with_the_range(finished: Path) -> None:
    for flag in ("--sizes", "--fit"):
        result = invoke("curve", "-w", finished / "work", flag, "1B")
        assert result.exit_code == 1 and result.stdout == ""
        words = " ".join(result.stderr.split())
        assert (
            f"Error: {flag} 1 bytes leaves nothing for the experts" in words and "with the rest of the model" in words
        )
        assert "--target" not in words and "--attention-bits" not in words


def test_every_method_has_its_plan_of_each_size_or_a_warning(finished: Path) -> None:
    result = invoke("curve", "-w", finished / "work", "--json")
    told = json.loads(result.stdout)
    _, beside, *_ = told["tables"]
    methods = [column["name"].removeprefix("loss of ") for column in beside["columns"][1::2]]
    assert methods[:2] == ["global", "uniform"] and len(beside["rows"]) > 5
    for method in {"pmq", "layerwise"} - set(methods):  # without one plan: pmq's three widths were not all scored
        assert any(line.startswith(f"{method} has no plan at 12 of 12") for line in told["left_out"])
    for place, method in enumerate(methods):
        cells = [(row[2 * place], row[2 * place + 1]) for row in beside["rows"]]
        empty = cells.count((None, None))
        warned = [line for line in told["left_out"] if line.startswith(f"{method} has no plan at {empty} of")]
        assert len(warned) == (empty > 0), (method, cells, told["left_out"])
        assert all(bits <= row[0] + 0.1 for (bits, _), row in zip(cells, beside["rows"], strict=True) if bits)


def test_what_fits_and_the_rows_that_fit_are_of_one_size(finished: Path) -> None:
    points = json.loads(invoke("curve", "-w", finished / "work", "--json").stdout)["points"]
    size = points[3]["stored_bytes"]  # an asked size is what memory holds: tensors alone
    told = json.loads(invoke("curve", "-w", finished / "work", "--fit", f"{size}B", "--json").stdout)
    assert told["best_that_fits"]["predicted_loss"] <= points[3]["predicted_loss"] * (1 + 1e-3)
    assert told["best_that_fits"]["stored_bytes"] <= size


def test_what_allocate_plans_is_a_point_of_the_curve(finished: Path) -> None:
    """At a size of the whole, the curve and allocate have one plan."""
    told = json.loads(invoke("curve", "-w", finished / "work", "--json").stdout)["points"][-1]
    size = f"{told['stored_bytes'] + 2**20}B"  # tokenizer and config count as well
    (point, *_) = json.loads(invoke("curve", "-w", finished / "work", "--sizes", size, "--json").stdout)["points"]
    made = invoke("allocate", "-w", finished / "work", "--variant", "curve", "--target-size", size, "--json")
    assert made.exit_code == 0, made.stderr
    plan = json.loads(made.stdout)["summary"]
    assert plan["objective"]["predicted_loss_of_model"] == point["predicted_loss"]
    assert plan["facts"]["stored bytes"] == point["stored_bytes"]


def test_results_side_by_side(finished: Path, tmp_path: Path) -> None:
    rows = [{"contender": "another tool", "stored_bits": 4.5, "model_bytes": 10_000, "gap": 0.5}]
    (tmp_path / "peers.json").write_text(json.dumps(rows))
    sources = (finished / "work", finished / "model", tmp_path / "peers.json")
    result = invoke("compare", *sources, "--out", tmp_path / "figure.png", "--json")
    assert result.exit_code == 0, result.stderr
    work, exported, peer = json.loads(result.stdout)["results"]
    for name in ("gap", "kl", "perplexity", "tokens", "original_loss"):
        assert exported[name] == pytest.approx(work[name]), "the card says what was measured"
    assert exported["stored_bytes"] == work["stored_bytes"], "of tensors alone in both"
    assert peer["gap"] == 0.5
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "another tool" in invoke("compare", *sources).stdout


def test_the_page_on_a_result(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = invoke("report", "-w", finished / "work", "--out", page)
    assert result.exit_code == 0, result.stderr
    text = page.read_text(encoding="utf-8")
    read = check_page(text)
    assert {"summary", "size", "quality", "curve", "widths", "importance", "routing", "warnings", "repeat"} <= {
        *read.ids
    }
    assert "mc-cli allocate -w" in text and "--target-stored-bits 4.5" in text and "--quantizer rtn" in text
    assert str(finished / "text.txt") not in text
    invoke("report", "-w", finished / "work", "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text, "the same artifacts give the same page"


def test_several_targets_from_one_calibration(run_arguments: tuple[object, ...], finished: Path) -> None:
    """Both results lie side by side, and the first scores serve them."""
    more = ("--target-stored-bits", "4.25,5", "--out", finished / "sizes")
    result = invoke("run", *run_arguments, *more, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)["variants"]
    assert [stage["ran"] for stage in told["4.25"]["stages"]] == [False, False, True, True, True, True]
    assert [stage["stage"] for stage in told["5"]["stages"]] == ["allocate", "quantize", "prune-eval", "export"]
    compared = json.loads(invoke("compare", finished / "sizes" / "4.25", finished / "sizes" / "5", "--json").stdout)
    small, large = compared["results"]
    assert small["stored_bits"] <= 4.25 < large["stored_bits"] <= 5 and small["stored_bytes"] < large["stored_bytes"]
    stages = json.loads(invoke("status", "-w", finished / "work", "--json").stdout)["stages"]
    assert {"4.25", "5"} <= {stage["variant"] for stage in stages}


def test_a_run_with_a_plan_of_the_users_own(run_arguments: tuple[object, ...], finished: Path, tmp_path: Path) -> None:
    """It needs no target and no allocate; report, status and compare know what it was made from."""
    work, mine = finished / "work", tmp_path / "mine.yaml"
    mine.write_text((work / "plan" / "plan.yaml").read_text().replace("method: global", "method: by hand"))
    place = run_arguments.index("--target-stored-bits")
    rest = (*run_arguments[:place], *run_arguments[place + 2 :], "--variant", "mine", "--plan", mine)
    given = (*rest, "--out", tmp_path / "model")
    refused = invoke("run", *given, "--target-stored-bits", 3)
    assert refused.exit_code == 1 and "allocate is not run, and --target-stored-bits would change" in refused.stderr
    planned = json.loads(invoke("run", *given, "--dry-run", "--json").stdout)["stages"]
    assert [entry["stage"] for entry in planned] == [stage for stage in STAGES if stage != "allocate"]
    made = invoke("run", *given)
    assert made.exit_code == 0, made.stderr
    again = json.loads(invoke("run", *given, "--json").stdout)["stages"]
    assert [entry["ran"] for entry in again] == [False] * 5
    stages = json.loads(invoke("status", "-w", work, "--variant", "mine", "--json").stdout)["stages"]
    states = {entry["stage"]: (entry["state"], entry["detail"]) for entry in stages}
    assert states.pop("allocate") == ("to do", "not needed: quantize was given a plan (--plan)")
    assert {state for state, _ in states.values()} == {"done"}
    assert invoke("status", "-w", work, "--verify").exit_code == 0
    page = invoke("report", "-w", work, "--variant", "mine", "--out", tmp_path / "page.html")
    assert page.exit_code == 0, page.stderr
    text = (tmp_path / "page.html").read_text()
    assert "mc-cli allocate" not in text and f"--plan {work}/variants/mine/packed/followed/plan.yaml" in text
    assert "by hand" in text
    measured = json.loads(invoke("curve", "-w", work, "--json").stdout)["measured"]
    (own,) = (entry for entry in measured if entry["variant"] == "mine")
    assert own["predicted_loss"] is None, "a plan that may have been edited is not believed"
