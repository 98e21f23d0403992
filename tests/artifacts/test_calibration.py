"""Inventory and routing files: what is written is read back, what is damaged is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mc_cli.artifacts.calibration import LayerRouting, read_inventory, routing_file, write_inventory
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.errors import ArtifactError
from mc_cli.parts import ExpertBlock, ModelInventory, Projection, Role, TensorPart

ROUTING = LayerRouting(
    layer=3,
    top_k=2,
    token_count=10,
    routing_count=[12, 8, 0],
    routing_weight_sum=[6.5, 3.5, 0.0],
    router_probability_sum=[5.0, 2.5, 0.0],
    routing_weight_quantiles=[[0.1, 0.2, 0.5, 0.7, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5], []],
    weight_ratio_quantiles=[[0.1, 0.2, 0.3, 0.4, 0.5]],
    residual_energy=1.5,
)
BLOCK = ExpertBlock(
    1, "m.layers.1.experts", "m.layers.1.gate", 3, 2, (Projection("up_proj", 8, 4), Projection("down_proj", 4, 8))
)
INVENTORY = ModelInventory(
    model_type="tiny",
    num_layers=2,
    expert_blocks=(BLOCK,),
    tensors=(
        TensorPart("m.layers.1.experts.up_proj", Role.EXPERT, 1, (3, 8, 4), "bfloat16", 192),
        TensorPart("lm_head.weight", Role.HEAD, None, (16, 4), "float32", 256, packable=True),
    ),
    tied_head=False,
    contract_tested=False,
)


def test_routing_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / routing_file(3)
    assert path.name == "layer_003.json"
    ROUTING.write(path)
    assert LayerRouting.read(path) == ROUTING
    assert read_json(path)["quantiles"] == [0.05, 0.25, 0.5, 0.75, 0.95]


def test_routing_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        replace(ROUTING, residual_energy=float("inf")).write(tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("damage", ["schema", "layer", "quantiles", "unknown"])
def test_damaged_routing_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "r.json"
    ROUTING.write(path)
    content = read_json(path)
    if damage == "unknown":
        content["other"] = 1
    elif damage == "schema":
        content["schema"] = 99
    else:
        del content[damage]
    write_json(path, content)
    with pytest.raises(ArtifactError, match=r"r\.json is not a routing file .* Run calibrate --force"):
        LayerRouting.read(path)


def test_inventory_is_read_back(tmp_path: Path) -> None:
    write_inventory(tmp_path / "i.json", INVENTORY)
    found = read_inventory(tmp_path / "i.json")
    assert found == INVENTORY
    assert found.bytes_by_role() == {Role.EXPERT: 192, Role.HEAD: 256}
    assert found.expert_weight_count == 3 * (32 + 32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", 99),
        ("tensors", [{"name": "x"}]),
        ("tensors", 3),
        ("expert_blocks", [{}]),
        ("num_layers", None),
    ],
)
def test_damaged_inventory_is_named(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "i.json"
    write_inventory(path, INVENTORY)
    content = json.loads(path.read_text(encoding="utf-8"))
    content[name] = value
    if value is None:
        del content[name]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"i\.json is not an inventory .* Run calibrate --force"):
        read_inventory(path)
