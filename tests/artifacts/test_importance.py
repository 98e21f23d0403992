"""importance.json: the round trip, and what is said of a file that is damaged."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mc_cli.artifacts.importance import UNITS, Importance, LayerImportance, ProjectionImportance, RoleCost
from mc_cli.errors import ArtifactError

# Fields of a layer that are no measures.
FACTS = {
    "interpolated_bits",
    "reference_experts",
    "blocks",
    "layer",
    "weights_per_expert",
    "token_count",
    "projections",
    "top_k",
    "router_groups",
    "groups_used",
}


def layer_of(index: int, **changes: Any) -> LayerImportance:
    measures: dict[str, Any] = {
        "layer": index,
        "weights_per_expert": 1280,
        "token_count": 100,
        "routing_count": [40, 60, 0],
        "routing_weight_sum": [20.5, 30.25, 0.0],
        "router_probability_sum": [18.125, 33.1, 1e-12],
        "output_norm_mean": [1.5, 0.25, 0.0],
        "loss_by_bits": {2: [3.0, 4.0, 5.0], 3: [1.0, 2.0, 0.1]},
        "predicted_loss_by_bits": {2: [0.3, 0.4, 0.5], 3: [0.1, 1 / 3, 0.0]},
        "stored_bytes_by_bits": {2: 350, 3: 510},
        "projections": (
            ProjectionImportance("gate_up_proj", 853, {2: [0.2, 0.3, 0.4], 3: [0.1, 0.2, 0.0]}, {2: 230, 3: 340}),
            ProjectionImportance("down_proj", 427, {2: [0.1, 0.1, 0.1], 3: [0.0, 0.1, 0.0]}, {2: 120, 3: 170}),
        ),
    }
    return LayerImportance(**(measures | changes))


def importance_of(*layers: LayerImportance) -> Importance:
    return Importance("mixtral", "gptq", (2, 3), layers or (layer_of(1), layer_of(3)), "Fisher", warnings=("one",))


def test_what_is_written_is_read_back(tmp_path: Path):
    importance = importance_of()
    importance.write(tmp_path / "importance.json")
    again = Importance.read(tmp_path / "importance.json")
    assert again == importance
    assert again.layers[0].predicted_loss_by_bits[3][1] == 1 / 3
    assert list(again.layers[1].loss_by_bits) == [2, 3]
    assert again.layers[1].num_experts == 3
    assert again.units == UNITS
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "importance.json").read_bytes()


@pytest.mark.parametrize(
    ("cost", "says"),
    [
        (RoleCost("attention", 5, float("nan"), 10, 10), "'attention' costs nan"),
        (RoleCost("attention", 5, -0.1, 10, 10), "'attention' costs -0.1"),
        (RoleCost("tail", 5, 0.1, 10, 10), "'tail'"),
    ],
)
def test_costs_of_roles_that_cannot_be_are_refused(tmp_path: Path, cost: RoleCost, says: str):
    with pytest.raises(ArtifactError, match=f"roles: .*{says}"):
        dataclasses.replace(importance_of(), roles=(cost,)).write(tmp_path / "importance.json")


def test_a_role_with_two_costs_is_refused(tmp_path: Path):
    costs = (RoleCost("attention", 5, 0.1, 10, 10), RoleCost("attention", 6, 0.1, 10, 10))
    with pytest.raises(ArtifactError, match=r"roles: .*attention.* occur more than once"):
        dataclasses.replace(importance_of(), roles=costs).write(tmp_path / "importance.json")


def test_costs_of_roles_are_read_back(tmp_path: Path):
    importance = dataclasses.replace(importance_of(), roles=(RoleCost("attention", 5, 0.25, 10, 10),))
    importance.write(tmp_path / "importance.json")
    assert Importance.read(tmp_path / "importance.json") == importance


def test_every_measure_has_a_unit():
    measures = {field.name for field in dataclasses.fields(LayerImportance)}
    assert set(UNITS) == (measures - FACTS) | {"roles"}


def test_a_score_without_predicted_losses_can_be_kept(tmp_path: Path):
    importance = importance_of(layer_of(0, predicted_loss_by_bits={}))
    importance.write(tmp_path / "importance.json")
    assert Importance.read(tmp_path / "importance.json") == importance


def test_a_missing_file_names_itself(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"importance.json does not exist. Run the stage that writes it first."):
        Importance.read(tmp_path / "importance.json")


def damaged(content: dict[str, Any], *path: str | int, value: Any) -> None:
    for step in path[:-1]:
        content = content[step]
    content[path[-1]] = value


FIRST = ("layers", 0)
DAMAGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: damaged(c, "schema", value=7), "schema is 7, this version reads 1. Run score again."),
    (lambda c: c.pop("model_type"), "is not an importance file: model_type is missing. Run score again."),
    (lambda c: c.pop("layers"), "layers is missing"),
    (lambda c: damaged(c, "layers", value=[3]), "layers[0] is 3, should be an object"),
    (lambda c: damaged(c, "layers", value=[]), "0 layers and 2 candidate widths"),
    (lambda c: c["layers"].append(c["layers"][0]), "layer 1 occurs 2 times"),
    (lambda c: c["layers"][0].pop("routing_count"), "layers[0].routing_count is missing"),
    (lambda c: damaged(c, *FIRST, "surprise", value=1), "layers[0]: 'surprise' is unknown here"),
    (lambda c: damaged(c, *FIRST, "loss_by_bits", value={"two": [1]}), "names 'two', which is not a width in bits"),
    (lambda c: damaged(c, *FIRST, "loss_by_bits", value=[1, 2]), "loss_by_bits is [1, 2], should be an object"),
    (lambda c: c["layers"][0]["loss_by_bits"].pop("3"), "layer 1: loss_by_bits lacks width 3"),
    (lambda c: c["layers"][0]["predicted_loss_by_bits"].pop("2"), "layer 1: predicted_loss_by_bits lacks width 2"),
    (lambda c: c["layers"][0]["stored_bytes_by_bits"].pop("2"), "layer 1: stored_bytes_by_bits lacks width 2"),
    (
        lambda c: c["layers"][1]["router_probability_sum"].pop(),
        "layer 3: router_probability_sum has 2 entries, routing_count 3",
    ),
    (
        lambda c: c["layers"][1]["predicted_loss_by_bits"]["2"].append(1.0),
        "layer 3: predicted_loss_by_bits at 2 bits has 4 entries, routing_count 3",
    ),
    (
        lambda c: damaged(c, *FIRST, "loss_by_bits", "2", value=[1.0, math.nan, math.inf]),
        "is not valid JSON: NaN is not a number of JSON. Delete it and run its stage again.",
    ),
    (
        lambda c: damaged(c, *FIRST, "routing_weight_sum", value=["1", 2, None]),
        "layers[0].routing_weight_sum[0] is '1', should be a finite number",
    ),
    (
        lambda c: damaged(c, *FIRST, "stored_bytes_by_bits", "2", value=1.5),
        "layers[0].stored_bytes_by_bits.2 is 1.5, should be a whole number",
    ),
    (
        lambda c: damaged(c, *FIRST, "weights_per_expert", value=0),
        "layer 1: weights_per_expert is 0, not a positive whole number",
    ),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES, ids=[expected[:40] for _, expected in DAMAGES])
def test_damage_is_named(tmp_path: Path, damage, expected):
    path = tmp_path / "importance.json"
    importance_of().write(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        Importance.read(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "un score again." in str(caught.value) or "run its stage again" in str(caught.value)


def test_all_that_is_wrong_is_listed_at_once(tmp_path: Path):
    wrong = importance_of(layer_of(0, routing_weight_sum=[1.0]), layer_of(1, output_norm_mean=[math.nan, 1.0, 2.0]))
    with pytest.raises(ArtifactError) as caught:
        wrong.write(tmp_path / "importance.json")
    assert str(caught.value) == (
        "The measures of mixtral cannot be used:\n"
        "  layer 0: routing_weight_sum has 1 entries, routing_count 3\n"
        "  layer 1: output_norm_mean is no finite number for expert 0\n"
        "Run score again."
    )
    assert not (tmp_path / "importance.json").exists()


@pytest.mark.parametrize("text", ["[1, 2]", "{", ""])
def test_what_is_no_json_object_is_named(tmp_path: Path, text):
    (tmp_path / "importance.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"importance\.json (is not valid JSON|should hold a JSON object)"):
        Importance.read(tmp_path / "importance.json")
