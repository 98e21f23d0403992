"""The Python door: the command line's stages, by the same settings, with the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mc_cli
from mc_cli.errors import InputError, McError
from tests.conftest import TinyModel
from tests.stage_process import run_command
from tests.tiny_chain import write_documents

FAST = {
    "sequences": 8,
    "length": 64,
    "gradient_tokens": 128,
    "loss_tokens": 64,
    "bits": (2, 3),
    "eval_length": 64,
    "max_sequences": 4,
    "quantizer": "rtn",
    "target_stored_bits": 3.3,
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_documents(tmp_path / "text.jsonl", documents=24)
    write_documents(tmp_path / "held.jsonl", documents=24, offset=500)
    return tmp_path


def test_the_three_functions_make_load_and_measure_a_model(tiny_model: TinyModel, texts: Path) -> None:
    made = mc_cli.compress(
        tiny_model("mixtral"), data=texts / "text.jsonl", eval_data=texts / "held.jsonl", out=texts / "out", **FAST
    )
    assert made.directory == texts / "out" and made.work_dir == texts / "out.work"
    assert made.plan == mc_cli.Plan.read(made.work_dir / "plan" / "plan.yaml")
    assert made.evaluation == mc_cli.Evaluation.read(made.work_dir / "evaluation" / "eval.json")
    made.plan.write(str(texts / "again.yaml"))
    made.evaluation.write(str(texts / "again.json"))
    assert mc_cli.Plan.read(str(texts / "again.yaml")) == made.plan
    assert mc_cli.Evaluation.read(str(texts / "again.json")) == made.evaluation
    model = mc_cli.load(made.directory)
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(5, 20)[None]).logits.isfinite().all())
    again = mc_cli.evaluate(made.work_dir, data=str(texts / "held.jsonl"), length=64, max_sequences=4)
    assert again == made.evaluation
    other = mc_cli.evaluate(made.work_dir, data=texts / "held.jsonl", length=32, max_sequences=4, force=True)
    assert other.context["length"] == 32
    small = mc_cli.compress(
        tiny_model("mixtral"),
        data=texts / "text.jsonl",
        eval_data=texts / "held.jsonl",
        out=texts / "small",
        work_dir=made.work_dir,
        variant="small",
        **{**FAST, "target_stored_bits": 2.8},
    )
    assert small.evaluation.expert_stored_bits < made.evaluation.expert_stored_bits
    assert small.plan == mc_cli.Plan.read(made.work_dir / "variants" / "small" / "plan" / "plan.yaml")
    same = mc_cli.evaluate(made.work_dir, data=texts / "held.jsonl", length=64, max_sequences=4, variant="small")
    assert same == small.evaluation


def test_the_command_line_finds_what_the_function_did_already_done(tiny_model: TinyModel, texts: Path) -> None:
    model = tiny_model("mixtral")
    made = mc_cli.compress(
        model,
        data=texts / "text.jsonl",
        eval_data=texts / "held.jsonl",
        out=texts / "out",
        work_dir=texts / "w",
        **FAST,
    )
    before = {path: path.read_bytes() for path in (texts / "w").rglob("*") if path.is_file()}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items() if name != "bits"]
    flags += [f"--model={model}", f"--data={texts / 'text.jsonl'}", "--bits=2,3"]
    flags += [f"--eval-data={texts / 'held.jsonl'}", f"--out={made.directory}", f"--work-dir={texts / 'w'}"]
    done = run_command(["run", *flags], texts)
    assert done.status == 0, done.err
    assert done.err.count("already done with these settings and inputs") == 6
    assert {path: path.read_bytes() for path in (texts / "w").rglob("*") if path.is_file()} == before


def test_everything_that_is_wrong_is_said_at_once(texts: Path) -> None:
    with pytest.raises(McError) as error:
        mc_cli.compress("nowhere", data="no.jsonl", out=texts / "out", sequence=8, length="long", target_stored_bits=2)
    for words in ("sequence", "did you mean sequences?", "length"):
        assert words in str(error.value)
    assert not (texts / "out.work").exists()
    with pytest.raises(InputError, match="did you mean length"):
        mc_cli.evaluate(texts / "w", data="x.jsonl", lenght=8)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    script = (
        "import sys, mc_cli\n"
        "assert 'compress' in dir(mc_cli) and 'Plan' in dir(mc_cli)\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))\n"
        "print(mc_cli.compress.__name__, *sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["", "compress"]


def test_other_names_are_not_offered() -> None:
    with pytest.raises(AttributeError, match="no attribute 'decompress'"):
        mc_cli.decompress  # noqa: B018
