"""Family files: each says something, and the inventory of full-size models agrees with what is published about them."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re

import pytest
import torch
from transformers import CONFIG_MAPPING

from mc_cli import families
from mc_cli.families import CONTRACT_TESTED, FamilyFacts, facts_for
from mc_cli.models.inventory import take_inventory
from mc_cli.models.skeleton import build_skeleton
from mc_cli.parts import ModelInventory, Role
from tests.families.tiny_families import tiny_config as tiny_family_config
from tests.tiny_models import CONFIGS, tiny_config

FILES = [info.name for info in pkgutil.iter_modules(families.__path__)]


def inventory_of(model_type: str, *, full_size: bool = False) -> ModelInventory:
    tiny = tiny_config if model_type in CONFIGS else tiny_family_config
    config = CONFIG_MAPPING[model_type]() if full_size else tiny(model_type)
    return take_inventory(build_skeleton(config, dtype=torch.bfloat16), stored_dtypes={})


def test_default_facts_change_nothing() -> None:
    facts = facts_for("a family without a file")
    assert facts == FamilyFacts("a family without a file")
    assert facts.role_of("model.layers.0.self_attn.q_proj.weight") is None
    assert not facts.is_derived("model.layers.0.self_attn.slope_rate")


@pytest.mark.parametrize("name", FILES)
def test_family_file_is_found_by_its_model_type(name: str) -> None:
    facts = importlib.import_module(f"mc_cli.families.{name}").FAMILY
    works = {each.family: each.works for each in families.read_outcomes()[1]}
    tested = facts.read_as or name
    assert facts.model_type == name and (tested in CONTRACT_TESTED or works[tested] == (not facts.refused))
    assert facts_for(name) is facts
    assert facts.roles or facts.derived or facts.adopts or facts.names or facts.read_as or facts.refused


@pytest.mark.parametrize("name", FILES)
def test_every_pattern_matches_a_tensor_of_the_family(name: str) -> None:
    facts = facts_for(name)
    if not facts.roles and not facts.derived:
        return
    names = [part.name for part in inventory_of(name).tensors]
    for pattern in [*(pattern for pattern, _ in facts.roles), *facts.derived, *facts.apart]:
        assert any(re.search(pattern, tensor) for tensor in names), f"{name}: {pattern} matches nothing"


def weights(inventory: ModelInventory, *roles: Role) -> float:
    """Billions of weights of the roles, of all tensors if none is named."""
    chosen = [part for part in inventory.tensors if not roles or part.role in roles]
    return sum(math.prod(part.shape) for part in chosen) / 1e9


def test_mixtral_8x7b_has_its_published_size() -> None:
    inventory = inventory_of("mixtral", full_size=True)
    assert sum(inventory.bytes_by_role().values()) == 2 * 46_702_792_704
    assert len(inventory.expert_blocks) == inventory.num_layers == 32
    assert {(block.num_experts, block.top_k) for block in inventory.expert_blocks} == {(8, 2)}
    assert inventory.expert_weight_count == 32 * 8 * 3 * 4096 * 14336


def test_deepseek_v3_has_its_published_size() -> None:
    """671 B in all without the multi-token prediction layer; 3 dense layers, then 256 routed and one shared expert."""
    inventory = inventory_of("deepseek_v3", full_size=True)
    assert weights(inventory) == pytest.approx(671.0, abs=0.1)
    assert [block.layer for block in inventory.expert_blocks] == list(range(3, 61))
    assert {(block.num_experts, block.top_k) for block in inventory.expert_blocks} == {(256, 8)}
    assert weights(inventory, Role.SHARED) == pytest.approx(58 * 3 * 7168 * 2048 / 1e9)
    assert weights(inventory, Role.DENSE) == pytest.approx(3 * 3 * 7168 * 18432 / 1e9)


def test_gpt_oss_120b_has_its_published_parts() -> None:
    """The model card's table: MLP 114.71 B, attention 0.96 B, embedding and head 1.16 B, in all 116.83 B."""
    inventory = inventory_of("gpt_oss", full_size=True)
    assert weights(inventory, Role.EXPERT, Role.EXPERT_BIAS, Role.ROUTER) == pytest.approx(114.71, abs=0.01)
    assert weights(inventory, Role.ATTENTION) == pytest.approx(0.96, abs=0.01)
    assert weights(inventory, Role.EMBEDDING, Role.HEAD) == pytest.approx(1.16, abs=0.01)
    assert weights(inventory) == pytest.approx(116.83, abs=0.01)
    assert {(block.num_experts, block.top_k) for block in inventory.expert_blocks} == {(128, 4)}
