"""Models that cannot go through all stages are refused at once: by a dry run as by a run, before text is hashed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mc_cli import cli
from mc_cli.artifacts.files import DigestCache
from tests import tiny_models
from tests.conftest import TinyModel
from tests.stage_process import run_command
from tests.tiny_chain import write_documents

ALONE = """
import torch
from torch import nn
from transformers.models.mixtral import modeling_mixtral
class OwnExperts(modeling_mixtral.MixtralExperts):
    def forward(self, hidden, chosen, weights):
        return sum(
            nn.functional.linear(hidden, self.down_proj[expert]) for expert in range(0) for _ in weights
        ) + hidden
class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.experts = OwnExperts(config)
"""


@pytest.fixture
def alone(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A model whose own experts compute by themselves."""
    folder = tiny_models.with_own_code(tiny_model("mixtral", torch.float32), tmp_path / "own")
    with (folder / "modeling_own.py").open("a") as code:
        code.write(ALONE)
    return folder


def flags(stage: str, model: Path, folder: Path) -> list[str]:
    data = str(write_documents(folder / "text.jsonl", documents=20))
    whole = ["--target-stored-bits", "2.5", "--out", str(folder / "out")] if stage == "run" else []
    return [stage, "--model", str(model), "--data", data, "-w", str(folder / "work"), *whole]


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--force",)], ids=str)
@pytest.mark.parametrize("stage", ["calibrate", "run"])
def test_experts_out_of_reach_are_refused_first(stage: str, more: tuple[str, ...], alone: Path, tmp_path: Path) -> None:
    """In a process of its own: transformers keeps what it found out of a class, and other models inherit it."""
    done = run_command([*flags(stage, alone, tmp_path), "--trust-remote-code", *more], tmp_path)
    assert done.status == 1
    assert "2 experts modules do not compute by the implementation" in " ".join(done.err.split())
    assert not (tmp_path / "work" / "digests.json").exists()


@pytest.mark.parametrize("stage", ["calibrate", "run"])
def test_a_text_is_hashed_after_the_model_was_looked_at(
    stage: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def noted(_: DigestCache, path: Path) -> str:
        hashed.append(path.name)
        raise AssertionError(path)

    arguments = flags(stage, tiny_model("llama"), tmp_path)  # no Mixture of Experts
    monkeypatch.setattr(DigestCache, "digest", noted)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "is not a Mixture of Experts" in " ".join(result.stderr.split())
    assert not hashed


# A config.json that no model has


def calibrate(model: Path, folder: Path) -> Result:
    return CliRunner().invoke(cli.app, [*flags("calibrate", model, folder), "--sequences", "2", "--length", "16"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0, and a model has one layer at least"),
        ({"num_hidden_layers": -3}, "num_hidden_layers: -3"),
        ({"num_labels": 1_000_000}, "num_labels: 1,000,000, at most 16,384"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: inf"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("-inf")}},
            "rope_parameters.rope_theta: -inf",
        ),
        ({f"key{number}": number for number in range(50_000)}, "entries, more than the 32,768"),
        ({"names": {str(number): [number] for number in range(40_000)}}, "entries, more than the 32,768"),
        ({"note": "x" * (9 << 20)}, "bytes, more than the 8,388,608"),
        ({"dtype": "int8"}, "dtype is 'torch.int8'"),
        ({"dtype": 5}, "dtype is '5'"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_entries_that_no_model_has(
    changes: dict[str, object], words: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("olmoe")
    folder = tiny_models.with_tensors(source, tmp_path / "model", tiny_models.read_tensors(source))
    tiny_models.with_config(folder, **changes)
    begun = time.process_time()
    result = calibrate(folder, tmp_path)
    assert result.exit_code == 1
    message = " ".join(result.stderr.split())
    assert words in message
    assert "config.json" in message
    assert "defect" not in message
    assert time.process_time() - begun < 10


def test_a_limit_may_be_infinite(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Mamba's configs write `time_step_limit: [0.0, Infinity]`."""
    source = tiny_model("olmoe")
    folder = tiny_models.with_tensors(source, tmp_path / "model", tiny_models.read_tensors(source))
    tiny_models.with_config(folder, time_step_limit=[0.0, float("inf")])
    assert json.loads((folder / "config.json").read_text())["time_step_limit"][1] == float("inf")
    assert calibrate(folder, tmp_path).exit_code == 0
