"""Tensors under the names and in the shapes that the published checkpoint of a family has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from mc_cli.families import facts_of


def as_published(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by module-tree name as the checkpoint has them, such as one matrix per expert.

    transformers' own way back is taken, and then what the family's facts say of names that it does not give back.
    """
    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    rules = facts_of(model.config).names
    return {_renamed(name, rules): tensor for name, tensor in found.items()} if rules else found


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
