"""The plan that drops the whole experts with the lowest scores, and leaves all others one width."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mc_cli.allocators.costs import expert_bytes
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import BudgetError
from mc_cli.parts import DROPPED, ModelInventory, Role
from mc_cli.settings import AllocateSettings, QuantizerSettings

UNITS = {
    "reap": "mean routing weight times output norm of the experts that are dropped, summed over layers",
    "frequency": "tokens routed to the experts that are dropped",
    "router-weight": "routing weights of the experts that are dropped, summed over tokens",
}


def drop_plan(
    settings: AllocateSettings,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    gone: Mapping[int, Collection[int]],
    value: float,
    role_bits: Mapping[Role, int],
) -> Plan:
    """The plan in which the experts `gone`, by layer, are dropped, and the others have `settings.width_left`.

    value  sum of the scores that are dropped;  role_bits: widths of the other roles, handed on
    Raises BudgetError where the share is so small that no expert goes.
    """
    blocks, width = inventory.expert_blocks, settings.width_left
    require_a_drop(settings, gone)
    left = {block.layer: block.num_experts - len(gone[block.layer]) for block in blocks}
    stored = sum(left[block.layer] * expert_bytes(block, width, quantizer) for block in blocks)
    weights = inventory.expert_weight_count
    kept = sum(left[block.layer] * block.weights_per_expert for block in blocks)
    return Plan(
        model_type=inventory.model_type,
        method=settings.drop_by,
        expert_bits={
            block.layer: tuple(DROPPED if expert in gone[block.layer] else width for expert in range(block.num_experts))
            for block in blocks
        },
        role_bits=dict(role_bits),
        family=quantizer.family,
        group_size_limit=quantizer.group_size,
        budget={
            "kind": "drop_ratio",
            "unit": "share of the experts",
            "asked": settings.drop_ratio,
            "reached": sum(map(len, gone.values())) / sum(block.num_experts for block in blocks),
            "scope": settings.scope,
            "reached_code_bits": width * kept / weights,
            "reached_stored_bits": 8 * stored / weights,
            "expert_bytes": stored,
            "expert_weights": weights,
            "candidate_bits": [DROPPED, width],
        },
        objective={"value": value, "unit": UNITS[settings.drop_by], "formula": "sum over dropped experts of the score"},
        solver={"name": "experts sorted by score", "status": "constructed"},
    )


def require_a_drop(settings: AllocateSettings, gone: Mapping[int, Collection[int]]) -> None:
    """Raises BudgetError where no expert goes."""
    if not any(gone.values()):
        raise BudgetError(
            f"--drop-ratio {settings.drop_ratio} drops no expert: the share of a layer is rounded down. Ask for a "
            "larger share, or rank all experts of the model together with --scope global."
        )
