"""How the router spread the calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mc_cli.artifacts.calibration import LayerRouting
from mc_cli.parts import BESIDE_TEXT, ModelInventory, Role
from mc_cli.reports.tables import summary, table


def calibration_summary(
    inventory: ModelInventory,
    routing: Sequence[LayerRouting],
    text: str | None,
    *,
    images: str | None = None,
    felt: Mapping[int, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Model, tokens and the spread of tokens by layer.

    routing   of every MoE layer, in layer order;  text   how rows became text, None where they were plain
    images    what became of rows with images, None without any;  felt: layer -> kind of token -> its mean sensitivity
    """
    facts: dict[str, Any] = {
        "model type": inventory.model_type,
        "calibration tokens": routing[0].token_count,
        "expert weights": inventory.expert_weight_count,
        "model bytes": sum(inventory.bytes_by_role().values()),
        "expert bytes": inventory.bytes_by_role()[Role.EXPERT],
    }
    facts |= stored_facts(inventory)
    if text is not None:
        facts["text"] = text
    if images is not None:
        facts["images"] = images
    columns = ["layer", "experts", "fewest tokens", "median", "most tokens", "fewest %", "most %"]
    whole = table("Routing of the calibration tokens", columns, [_row(layer) for layer in routing])
    if not any(layer.by_kind for layer in routing):
        return summary(facts, whole)
    rows = [row for layer in routing for row in _kind_rows(layer, (felt or {}).get(layer.layer, {}))]
    columns = ["layer", "kind of token", "tokens", "fewest at an expert", "most", "sensitivity of a token"]
    return summary(facts, whole, table("By kind of token (the mean token's sensitivity is 1)", columns, rows, left=2))


def _kind_rows(layer: LayerRouting, felt: Mapping[str, float]) -> list[list[Any]]:
    return [
        [
            layer.layer,
            kind,
            found.token_count,
            min(found.routing_count),
            max(found.routing_count),
            round(felt[kind], 4) if kind in felt else "",
        ]
        for kind, found in layer.by_kind.items()
    ]


def stored_facts(inventory: ModelInventory) -> dict[str, Any]:
    """How the checkpoint's files hold its tensors, where they are codes; nothing for a plain one."""
    if not inventory.stored_as:
        return {}
    ways = ", ".join(f"{name} ({count:,})" for name, count in inventory.stored_as.items())
    return {"stored as": ways, "bytes in its files": inventory.file_bytes}


def not_covered(inventory: ModelInventory, *, seen: bool = False) -> str | None:
    """A warning on what calibration does not measure of a model that reads images or sound; `seen`: it had images."""
    if seen:
        return None
    beside = {role: size for role, size in inventory.bytes_by_role().items() if role in BESIDE_TEXT}
    if not beside:
        return None
    kept = ", ".join(f"{role.value} {size:,} bytes" for role, size in beside.items())
    return (
        f"model_type {inventory.model_type!r} reads more than text. Parts for images and sound alone are kept as they "
        f"are ({kept}). Experts are measured with text alone: what they do for the tokens of images is not covered. "
        "Give rows with images with --data, or compare answers about images before relying on them."
    )


def _row(layer: LayerRouting) -> list[Any]:
    counts = sorted(layer.routing_count)
    share = 100 / max(1, sum(counts))
    spread = [counts[0], counts[len(counts) // 2], counts[-1]]
    return [layer.layer, len(counts), *spread, round(counts[0] * share, 2), round(counts[-1] * share, 2)]
