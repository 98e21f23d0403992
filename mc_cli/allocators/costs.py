"""Costs of a layer's experts at each width, from the measures of importance.json, and the bytes they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from mc_cli.allocators.strategy import CostSettings
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.encodings import planned_bytes
from mc_cli.errors import InputError
from mc_cli.parts import KEPT_BITS, ExpertBlock, ModelInventory
from mc_cli.settings import QuantizerSettings


def predicted_loss(
    layer: LayerImportance, candidate_bits: tuple[float, ...], settings: CostSettings
) -> dict[float, Sequence[float]]:
    """Expected rise of the model's loss, nats per token: the same unit in every layer."""
    return widths_of(layer, "predicted_loss_by_bits", layer.predicted_loss_by_bits, candidate_bits)


def output_error(
    layer: LayerImportance, candidate_bits: tuple[float, ...], settings: CostSettings
) -> dict[float, Sequence[float]]:
    """L2 norm of the change of the MoE output: comparable within one layer only."""
    return widths_of(layer, "loss_by_bits", layer.loss_by_bits, candidate_bits)


def widths_of(
    layer: LayerImportance, name: str, measured: Mapping[float, Sequence[float]], candidate_bits: tuple[float, ...]
) -> dict[float, Sequence[float]]:
    """The entries of a measure at the candidate widths. Raises InputError naming the widths it lacks."""
    missing = [bits for bits in candidate_bits if bits not in measured]
    if missing:
        raise InputError(
            f"importance.json holds no {name} of layer {layer.layer} at width {', '.join(map(str, missing))}; it holds "
            f"{', '.join(map(str, sorted(measured))) or 'none'}. "
            "Run score with these candidate widths, or choose another method."
        )
    return {bits: measured[bits] for bits in candidate_bits}


def with_kept_width(
    importance: Importance, widths: Collection[float] | None, inventory: ModelInventory, quantizer: QuantizerSettings
) -> Importance:
    """The measures with 16 bits as one more width, where it is among `widths`: the own weights, which lose nothing."""
    if KEPT_BITS not in (widths or ()):
        return importance
    blocks = {block.layer: block for block in inventory.expert_blocks}
    layers = tuple(_kept(layer, blocks[layer.layer], quantizer) for layer in importance.layers)
    return replace(importance, candidate_bits=(*importance.candidate_bits, KEPT_BITS), layers=layers)


def _kept(layer: LayerImportance, block: ExpertBlock, quantizer: QuantizerSettings) -> LayerImportance:
    nothing: dict[float, Sequence[float]] = {KEPT_BITS: (0.0,) * layer.num_experts}
    sizes = {
        part.name: planned_bytes(
            quantizer.family, KEPT_BITS, part.out_features, part.in_features, group_size_limit=quantizer.group_size
        )
        for part in block.projections
    }
    return replace(
        layer,
        loss_by_bits={**layer.loss_by_bits, **nothing},
        predicted_loss_by_bits={**layer.predicted_loss_by_bits, **nothing},
        stored_bytes_by_bits={**layer.stored_bytes_by_bits, KEPT_BITS: sum(sizes.values())},
        projections=tuple(
            replace(
                part,
                predicted_loss_by_bits={**part.predicted_loss_by_bits, **nothing},
                stored_bytes_by_bits={**part.stored_bytes_by_bits, KEPT_BITS: sizes[part.name]},
            )
            for part in layer.projections
        ),
    )


def halving(factors: Sequence[float], candidate_bits: tuple[float, ...]) -> dict[float, list[float]]:
    """`factor * 2^-bits`: the error of a uniform grid halves with every bit, alike for all experts.

    For strategies that weigh experts by one factor and know nothing of their quantization error.
    """
    return {bits: [factor * 2.0**-bits for factor in factors] for bits in candidate_bits}


def normalised(values: Sequence[float]) -> list[float]:
    """`values` divided by their sum; all zero where the sum is zero (a layer that saw no token)."""
    total = sum(values)
    return [value / total if total else 0.0 for value in values]


def expert_bytes(block: ExpertBlock, width: float, quantizer: QuantizerSettings, *, channels: int | None = None) -> int:
    """Bytes of one expert of the block, or of what is left of it with so many channels.

    Raises ShapeError where it cannot be coded at this width.
    """
    kept = block.channels if channels is None else channels
    if not kept:
        return 0
    family, limit = quantizer.family, quantizer.group_size
    return sum(
        planned_bytes(family, width, *block.shape_of(part.name, kept), group_size_limit=limit)
        for part in block.projections
    )
