"""Finds whether a model can take the packed form at all, before any stage of it is begun."""

from __future__ import annotations

import copy
from typing import Any

from mc_cli.artifacts.packed import KEPT, ExpertLayout, PackedLayout
from mc_cli.errors import FamilyError, McError
from mc_cli.packed.packed_model import attach
from mc_cli.parts import ModelInventory


def require_packable(model: Any, inventory: ModelInventory) -> None:
    """Raises FamilyError where a skeleton cannot take the packed form, which quantize and export end in."""
    layout = PackedLayout(
        tuple(
            ExpertLayout.of_whole(
                block.path,
                {part.name: (part.out_features, part.in_features) for part in block.projections},
                {part.name: (KEPT,) * block.num_experts for part in block.projections},
            )
            for block in inventory.expert_blocks
        )
    )
    try:
        attach(copy.deepcopy(model), layout, kept_dtype=model.dtype)
    except McError as error:
        raise FamilyError(f"{type(model).__name__} cannot be packed, so that no stage is begun: {error}") from error
