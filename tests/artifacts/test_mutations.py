"""Damaged artifacts are read as what they were, as another whole artifact, or refused by name: at once, in any case."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mc_cli.allocators import Budget, allocate
from mc_cli.artifacts.calibration import LayerRouting, read_inventory, read_text_report, write_inventory
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.manifest import Manifest, fingerprint_of, with_digest
from mc_cli.artifacts.packed import StoredBytes
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.quantization import Coverage, read_report, write_report
from mc_cli.artifacts.sizes import read_sizes, write_sizes
from mc_cli.errors import BudgetError, InputError, McError
from mc_cli.flags import SECTIONS
from mc_cli.parts import Role
from mc_cli.recipe import plan_runs, read_recipe
from tests.artifacts.test_calibration import INVENTORY, ROUTING
from tests.artifacts.test_evaluation import EVALUATION, ROWS
from tests.artifacts.test_importance import importance_of
from tests.artifacts.test_plan import inventory_of, plan_of
from tests.mutations import flipped, mutated_json, mutated_value

POINT = {
    **{"rate": 0.25, "tokens": 30, "loss": 2.0, "loss_error": 0.1, "perplexity": 7.4, "perplexity_rise": 0.01},
    **{"kl_packed": 0.1, "kl_original": 0.2, "experts_per_token": 1.5, "experts_by_layer": {"1": 1.5}},
    **{"experts_by_class": {"words": 1.5}, "activated_bytes": 10.0, "activated_parameters": 5.0},
}
PRUNING = {
    **{"policy": "odp", "fit": "f", "units": {"rate": "share"}, "unpruned": POINT, "token_classes": {"words": 3}},
    "points": [{**POINT, "policy": "odp", "chosen": True, "fitted_rate": 0.25, "thresholds": [0.1], "on_front": True}],
}
_SETTINGS, _INPUTS = {"bits": [1, 2]}, {"model": "d"}
MANIFEST = with_digest(
    {"stage": "score", "fingerprint": fingerprint_of("score", _SETTINGS, _INPUTS), "settings": _SETTINGS}
    | {"inputs": _INPUTS, "outputs": {"importance.json": {"sha256": "0" * 64, "size_bytes": 3}}, "tool_version": "1"}
    | {"warnings": ["w"], "schema": 1}
)
COVERAGE = Coverage(100, 80, 10, 10, 1.0, {"1": [0, 3]})
SIZES = {Role.EXPERT: StoredBytes(60, 12, 0), Role.HEAD: StoredBytes(0, 0, 32)}
TEXT_REPORT = {
    **{"rows": {"chat: messages": 3}, "empty_rows": 0, "chat_template": "own", "chats_rendered": 3},
    **{"chats_refused": 0, "example_of_refused": ""},
}


def _use_importance(path: Path) -> object:
    importance = Importance.read(path)
    for method in ("global", "uniform"):
        try:
            allocate(importance, method=method, budget=Budget("stored_bits", 2.9), role_bits={}, time_limit_s=5)
        except (BudgetError, InputError):  # measures of another model, whose sizes do not meet this budget
            continue
    return importance


def _use_plan(path: Path) -> object:
    plan = Plan.read(path)
    plan.check_against(inventory_of())
    return [plan.dropped(layer) for layer in plan.expert_bits]


# name of the file -> (writes a whole one, reads it and uses what it holds)
KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], object]]] = {
    "importance.json": (lambda path: importance_of().write(path), _use_importance),
    "inventory.json": (lambda path: write_inventory(path, INVENTORY), read_inventory),
    "layer_003.json": (ROUTING.write, LayerRouting.read),
    "eval.json": (EVALUATION.write, Evaluation.read),
    "text.json": (lambda path: write_json(path, TEXT_REPORT), lambda path: read_text_report(path.parent)),
    "report.json": (lambda path: write_report(path, ROWS), read_report),
    "coverage.json": (COVERAGE.write, Coverage.read),
    "sizes.json": (lambda path: write_sizes(path, SIZES), read_sizes),
    "manifest.json": (lambda path: write_json(path, MANIFEST), lambda path: Manifest.read(path.parent)),
}


def pruned_evaluation(path: Path) -> None:
    from dataclasses import replace

    replace(EVALUATION, pruning=PRUNING).write(path)


@pytest.mark.parametrize("name", [*KINDS, "pruned eval.json"])
def test_mutated_json_is_refused_by_name_or_read(name: str, tmp_path: Path) -> None:
    write, read = (pruned_evaluation, Evaluation.read) if name.startswith("pruned") else KINDS[name]
    path = tmp_path / name
    write(path)
    assert read(path), "whole, it is read"
    whole = path.read_text(encoding="utf-8")
    draw = random.Random(name)
    refused = 0
    for _ in range(150):
        data = mutated_json(whole, draw)
        path.write_bytes(data)
        refused += _refused(lambda: read(path), path, data)
    assert refused > 40, "most damage is seen"


def test_mutated_plans_are_refused_by_name_or_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plan_of().write(path)
    whole = path.read_text(encoding="utf-8")
    draw = random.Random(3)
    for number in range(250):
        if number % 2:
            data = yaml.safe_dump(mutated_value(yaml.safe_load(whole), draw)).encode()
        else:
            data = flipped(whole.encode(), draw)
        path.write_bytes(data)
        _refused(lambda: _use_plan(path), path, data, anywhere=("The plan does not describe this model",))


RECIPE = """\
work_dir: w
effort: fast
variant: small
calibrate: {model: bundled:demo-moe, data: bundled:calibration, sequences: 8, length: 32}
score: {bits: [1, 2, 3.5], quantizer: trellis, damping: 0.01, shrinkage: 0.5}
allocate: {target_stored_bits: 2.5, floors: {3: 1, 2: 1}, seed: 3, gap: 1e-4}
prune-eval: {tasks: [a, b], policy: odp, target_rate: 0.2, rates: [0.1, 0.2]}
export: {out: o, shard_bytes: 4GB}
compute: {batch_tokens: 64, dtype: float32}
"""


# Flags that a recipe does not have, and its keys, by which settings of a recipe that can be read are named.
NAMED = (
    "--",
    "allocate needs",
    "run lacks",
    "effort '",
    "variant '",
    "work_dir",
    *(f"{section}." for section in SECTIONS),
)


def test_mutated_recipes_are_refused_by_name_or_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    draw = random.Random(4)
    for number in range(250):
        if number % 2:
            data = yaml.safe_dump(mutated_value(yaml.safe_load(RECIPE), draw)).encode()
        else:
            data = flipped(RECIPE.encode(), draw)
        path.write_bytes(data)
        if not _refused(lambda: read_recipe(path), path, data):
            _refused(lambda: plan_runs(read_recipe(path)), path, data, anywhere=NAMED)


def _refused(read: Callable[[], object], path: Path, data: bytes, *, anywhere: tuple[str, ...] = ()) -> bool:
    """Whether `read` refuses. Fails for an error that is not ours, names no file, is endless, or takes long."""
    began = time.process_time()
    try:
        read()
    except McError as error:
        message = str(error)
        assert str(path) in message or any(part in message for part in anywhere), (message, data[:2000])
        assert len(message) < 6000, data[:2000]
        message.encode()  # a terminal can show it
        return True
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}", data[:3000]) from error
    finally:
        assert time.process_time() - began < 10, data[:2000]
    return False
