"""Recipes of real models: built from facts without weights, planned, a layer run; what is written is current."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from mc_cli.cli import app
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.skeleton import build_skeleton, initialise, non_persistent_buffers
from mc_cli.recipe import plan_runs, read_recipe
from tests.tiny_chain import write_documents

RECIPES = Path(__file__).parent.parent / "recipes"
FACTS: dict[str, dict[str, Any]] = json.loads((RECIPES / "facts.json").read_text(encoding="utf-8"))
SECONDS = 5.0
TOKENS = 8
# Entries that make a model of one layer with two experts out of a configuration; each token goes to one of them.
CUT = {
    "num_hidden_layers": 1,
    "num_local_experts": 2,
    "num_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def recipes() -> Iterator[Any]:
    """recipes/generate_recipes.py as a module."""
    sys.path.insert(0, str(RECIPES))
    try:
        import generate_recipes

        yield generate_recipes
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def planned(recipes: Any) -> dict[str, Any]:
    """Every model of facts.json, with the processor's seconds that planning it took."""
    recipes.model_of("first", FACTS["granite-3.1-1b-a400m"])  # imports
    found = {}
    for name, facts in FACTS.items():
        begun = time.process_time()
        found[name] = recipes.model_of(name, facts), time.process_time() - begun
    return found


@pytest.mark.parametrize("name", FACTS)
def test_a_model_has_its_published_parameters_and_plans_in_seconds(planned: dict[str, Any], name: str) -> None:
    model, seconds = planned[name]
    assert model.parameters == FACTS[name]["parameters"]
    assert seconds < SECONDS
    assert all(FACTS[name][key] for key in ("parameters_from", "config_from", "hub"))
    assert model.inventory.contract_tested


def test_every_memory_has_a_size_or_a_reason(recipes: Any, planned: dict[str, Any]) -> None:
    for model, _ in planned.values():
        assert {fit.memory for fit in model.fits} >= set(recipes.MEMORIES)
        assert model.made, model.name
        for fit in model.fits:
            if fit.size is None:
                assert fit.words in ("not reached", "the original fits")
                continue
            assert fit.whole <= fit.size
            assert fit.whole + model.cache + recipes.BASE <= fit.memory * recipes.GIB
            assert 1 <= fit.bits < 4.1
    unreached = [fit.memory for fit in planned["mixtral-8x22b"][0].fits if fit.words == "not reached"]
    assert unreached == [8, 12, 16], "141 billion weights at one bit take 16.4 GiB"


def test_recipes_and_their_page_are_what_the_generator_writes(recipes: Any, planned: dict[str, Any]) -> None:
    for path, text in recipes.written([model for model, _ in planned.values()]).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run `make docs`"
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*FACTS, "demo"}


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_says_all_that_a_run_needs_but_the_model(planned: dict[str, Any], name: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml").override([("calibrate", "model", "m")], None)
    plans = plan_runs(recipe)
    sizes = dict.fromkeys(fit.size for fit in planned[name][0].made)
    asked = [plan.stages["allocate"].target_size_bytes for plan in plans]
    assert asked == [pytest.approx(size, abs=2**20 * 6) for size in sizes]  # written with two decimals of a GiB
    assert [plan.stages["export"].out for plan in plans] == [f"runs/{name}/model/{plan.work.variant}" for plan in plans]


def smallest_of_each_family() -> list[str]:
    """Recipes that differ in more than sizes."""
    ordered = sorted(FACTS, key=lambda name: FACTS[name]["parameters"], reverse=True)
    return sorted({FACTS[name]["config"]["model_type"]: name for name in ordered}.values())


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_a_layer_of_real_shape_runs_by_our_experts_as_by_the_families_own(name: str) -> None:
    facts = dict(FACTS[name]["config"])
    changes = {key: value for key, value in CUT.items() if key in facts or key == "pad_token_id"}
    kind = facts.pop("model_type")
    config = AutoConfig.for_model(kind, **{**facts, **changes})
    model: Any = build_skeleton(config, dtype=torch.bfloat16)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert any(facts["hidden_size"] in shape for key, shape in shapes.items() if "experts" in key and len(shape) == 3)
    _fill(model)
    tokens = torch.arange(TOKENS)[None] % CUT["vocab_size"]
    with torch.inference_mode():
        model.set_experts_implementation("eager")
        wanted = model(tokens).logits.float()
        run_our_experts(model)
        found = model(tokens).logits.float()
    assert torch.isfinite(wanted).all() and wanted.std() > 0
    assert float((found - wanted).norm() / wanted.norm()) < 0.02, "bfloat16 rounds to 0.4 %"
    del model
    gc.collect()


def _fill(model: Any) -> None:
    """Gives a skeleton memory, and weights that repeat a block of random ones: seconds less than drawing all."""
    model.to_empty(device="cpu")
    for module in model.modules():
        initialise(model, module, list(non_persistent_buffers(module)))
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    for key, tensor in model.state_dict().items():
        flat = tensor.view(-1)
        if tensor.ndim < 2:
            flat.fill_(1.0 if "norm" in key else 0.0)
            continue
        scaled = block * tensor.shape[-1] ** -0.5
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(scaled[: part.numel()])


@pytest.fixture
def own_model(tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[object, ...]:
    """Arguments that put a tiny model of a recipe's family, and little text, in the place of the real ones."""
    write_documents(tmp_path / "text.jsonl", documents=8)
    texts = ("--data", tmp_path / "text.jsonl", "--eval-data", tmp_path / "text.jsonl", "--max-sequences", 2)
    little = ("--sequences", 2, "--length", 16, "--eval-length", 16, "--gradient-tokens", 16, "--loss-tokens", 32)
    return ("--model", tiny_model("qwen3_moe"), *texts, *little, "-w", tmp_path / "work", "--out", tmp_path / "model")


def test_a_recipe_runs_on_a_model_of_its_family(own_model: tuple[object, ...], tmp_path: Path) -> None:
    run = ("run", RECIPES / "qwen3-30b-a3b.yaml", *own_model, "--target-stored-bits", 3.5)
    result = CliRunner().invoke(app, [str(word) for word in run])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "model" / "config.json").exists()


def test_one_size_of_a_recipe_is_chosen_by_its_name(own_model: tuple[object, ...]) -> None:
    run = ("run", RECIPES / "qwen3-30b-a3b.yaml", *own_model, "--dry-run")
    chosen = CliRunner().invoke(app, [str(word) for word in (*run, "--only", "16GiB", "--json")])
    assert chosen.exit_code == 0, chosen.stderr
    folders = [stage["folder"] for stage in json.loads(chosen.stdout)["stages"]]
    assert folders[0] is not None, "calibrate would run"
    unknown = CliRunner().invoke(app, [str(word) for word in (*run, "--only", "17GiB")])
    assert unknown.exit_code == 1
    assert "no target is named 17GiB. There are 8GiB, 12GiB, 16GiB, 24GiB" in " ".join(unknown.stderr.split())
