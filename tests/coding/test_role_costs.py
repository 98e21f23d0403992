"""Costs of coding one role, against transformers' own model with that role's matrices replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.calibration import read_token_ids
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.parts import KEPT_BITS, ModelInventory, Role, TensorPart
from mc_cli.settings import ENGINES, QuantizerSettings, ScoreSettings
from mc_cli.stages.score import role_widths
from tests.conftest import ScoredWork
from tests.tiny_chain import run_export, run_quantize, run_score

RTN = QuantizerSettings(quantizer="rtn")  # looks at no inputs, so that quantize codes as the trial did
ROLES = {
    "qwen2_moe": ("attention", "shared", "dense", "embedding", "head"),
    "deepseek_v3": ("attention", "shared", "dense", "embedding", "head"),
    "granitemoe": ("attention", "embedding"),
}


@torch.no_grad()
def log_probabilities(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] float64, of every token."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(token_ids).logits.flatten(0, 1).double().log_softmax(-1)


@pytest.mark.parametrize("model_type", ROLES)
def test_every_role_costs_what_a_model_with_it_coded_loses(
    model_type: str, scored_work: ScoredWork, tmp_path: Path
) -> None:
    config = {"dtype": torch.float32, **({"tie_word_embeddings": True} if model_type == "granitemoe" else {})}
    model = scored_work(tmp_path, model_type, config=config, bits=(2, 4), quantizer=RTN)
    work = WorkDir(tmp_path / "work")
    importance = Importance.read(work.folder("score") / "importance.json")
    assert {cost.role for cost in importance.roles} == set(ROLES[model_type])
    token_ids = read_token_ids(work.folder("calibrate"), vocabulary=10**6)
    original = log_probabilities(model, token_ids)
    kept = {layer.layer: (KEPT_BITS,) * layer.num_experts for layer in importance.layers}
    for cost in importance.roles:
        assert cost.tokens == token_ids.numel()
        plan = Plan(importance.model_type, "by hand", kept, {Role(cost.role): cost.bits}, family=RTN.family)
        plan.write(tmp_path / "plan.yaml")
        run_quantize(work.path, variant=cost.role, quantizer=RTN, plan=str(tmp_path / "plan.yaml"))
        run_export(work.path, coded := tmp_path / cost.role, "dense", variant=cost.role)
        wanted = float(kl_div(log_probabilities(coded, token_ids), original, reduction="batchmean", log_target=True))
        assert wanted > 1e-7, "nothing was coded"
        assert cost.loss == pytest.approx(wanted, rel=2e-3)


def test_score_tells_what_each_part_costs_and_leaves_it_out_where_asked(
    scored_work: ScoredWork, tmp_path: Path
) -> None:
    scored_work(tmp_path, "qwen2_moe")
    shown = run_score(tmp_path / "work").summary["tables"]
    assert [row[0] for row in shown[-1]["rows"]] == list(ROLES["qwen2_moe"])
    alone = run_score(tmp_path / "work", roles=False, force=True).summary["tables"]
    assert len(alone) == len(shown) - 1
    assert not Importance.read(tmp_path / "work" / "importance" / "importance.json").roles


@pytest.mark.parametrize(("rows_of", "measured"), [(64, {Role.ATTENTION, Role.EMBEDDING}), (36, {Role.EMBEDDING})])
def test_a_role_without_codes_of_the_width_is_not_measured(rows_of: int, measured: set[Role]) -> None:
    """Rows in MLX are whole groups of 32 weights or more."""
    shapes = {Role.ATTENTION: (64, rows_of), Role.EMBEDDING: (96, 64), Role.ROUTER: (4, 64)}
    parts = (
        TensorPart(f"{role.value}.weight", role, None, shape, "float32", 4, packable=True)
        for role, shape in shapes.items()
    )
    inventory = ModelInventory("mixtral", 1, (), tuple(parts), tied_head=True)
    settings = ScoreSettings(engine="mlx", quantizer=QuantizerSettings(quantizer=ENGINES["mlx"].quantizer))
    assert set(role_widths(settings, inventory)) == measured
    assert role_widths(replace(settings, roles=False), inventory) == {}
