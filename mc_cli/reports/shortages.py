"""Shortages of the calibration text: experts that few tokens reached, and routers whose choices are not explained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mc_cli.artifacts.calibration import LayerRouting, LayerSensitivity
from mc_cli.errors import few
from mc_cli.parts import ModelInventory


def unexplained_choices(sensitivities: Mapping[int, LayerSensitivity]) -> list[str]:
    """A warning if there are routers whose choices their scores do not explain."""
    layers = [str(layer) for layer, found in sensitivities.items() if math.isnan(found.choice_cost or 0.0)]
    if not layers:
        return []
    return [
        f"the routers of {len(layers)} layers choose by something else than their scores and biases "
        f"({few(layers)}): what it costs that they choose other experts is not in the layers' sensitivities."
    ]


def starved_experts(routing: list[LayerRouting], inventory: ModelInventory) -> list[str]:
    """A warning per kind of shortage: experts with fewer tokens than their widest input has features.

    Below that the expert's own Hessian cannot have full rank, and quantize leans on the layer's pooled one.
    """
    never, starved, needed = [], [], 0
    for block, layer in zip(inventory.expert_blocks, routing, strict=True):
        width = max(projection.in_features for projection in block.projections)
        for expert, count in enumerate(layer.routing_count):
            if count == 0:
                never.append(f"{block.layer}.{expert}")
            elif count < width:
                starved.append(f"{block.layer}.{expert}")
                needed = max(needed, -(-layer.token_count * width // count) - layer.token_count)
    messages = []
    if starved:
        messages.append(
            f"{len(starved)} experts saw fewer tokens than their input has features (layer.expert: {few(starved)}); "
            f"about {needed:,} more calibration tokens would give each enough."
        )
    if never:
        messages.append(
            f"{len(never)} experts saw no calibration token (layer.expert: {few(never)}); "
            "they will be rounded with the layer's pooled statistics. More varied text would help."
        )
    return messages


def starved_by_kind(routing: Sequence[LayerRouting]) -> list[str]:
    """A warning per kind of token that some experts never saw, though others did."""
    messages = []
    for kind in ("text", "image"):
        found_of = [(layer.layer, layer.by_kind[kind]) for layer in routing if kind in layer.by_kind]
        rows = [(layer, found) for layer, found in found_of if any(found.routing_count)]
        unseen = [f"{layer}.{e}" for layer, found in rows for e, count in enumerate(found.routing_count) if count == 0]
        if unseen:
            messages.append(
                f"{len(unseen)} experts saw no {kind} token (layer.expert: {few(unseen)}): how they answer to "
                "one is not covered."
            )
    return messages
