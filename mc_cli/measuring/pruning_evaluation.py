"""Fitted policies on held-out text: loss, divergences, expert calls and activated bytes of every operating point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mc_cli.artifacts.packed import encoding_of
from mc_cli.artifacts.pruning import OperatingPoint, Pruning
from mc_cli.data.kinds import IMAGE, MEASURED, PADDING
from mc_cli.data.text import Windows
from mc_cli.data.token_classes import token_classes
from mc_cli.measuring.policy_fitting import FittedPolicies
from mc_cli.packed.packed_model import PackedSource, stored_sizes
from mc_cli.parts import ExpertBlock, ModelInventory, Role
from mc_cli.progress import Progress
from mc_cli.skipping.pruned_comparison import PointResult, PrunedComparison, compare_points
from mc_cli.skipping.pruning import pruners
from mc_cli.walking.layerwise import LayerSource

UNPRUNED = "unpruned"
UNITS = {
    "rate": "share of routed expert calls skipped on this text",
    "fitted_rate": "the same on the fitting text",
    "loss": "nats per token",
    "loss_error": "standard error of the difference from the packed model's loss without a policy, over tokens",
    "perplexity_rise": "relative to the packed model without a policy",
    "kl_packed": "nats per token, KL(packed without a policy || with it)",
    "kl_original": "nats per token, KL(original || packed with the policy)",
    "predicted_loss": "nats per token, from the layers' sensitivities, on the fitting text",
    "experts_per_token": "routed experts computed per token and MoE layer, mean",
    "activated_bytes": "stored bytes that one token's forward needs: experts by their calls, and all other weights but "
    "an embedding of which a row is read",
    "activated_parameters": "the same in weights",
    "on_front": "no other point of this evaluation skips as many calls at a smaller or equal loss",
}
ANSWER_UNITS = {
    "answers": "whole answers about images; answers_right: those that greedy decoding gives exactly",
    "rate_by_kind": "share of the routed expert calls of a kind of token skipped on this text",
    "thresholds_by_kind": "keep scores by kind of token and layer; thresholds: of tokens whose kind is not known",
}


@dataclass(frozen=True)
class _Named:
    """One operating point of one policy."""

    policy: str
    point: OperatingPoint
    chosen: bool


def evaluate_policies(
    fitted: FittedPolicies,
    inventory: ModelInventory,
    packed: PackedSource,
    original: LayerSource,
    windows: Windows,
    tokenizer: Any,
    *,
    sweep: bool,
    batch_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Plain JSON values: units, the model without a policy, and every point that was asked for.

    sweep  all points of all policies; else each policy's chosen point
    """
    named = {
        f"{name} {number}": _Named(name, point, number == pruning.chosen)
        for name, (pruning, _) in fitted.policies.items()
        for number, point in enumerate(pruning.points)
        if sweep or number == pruning.chosen
    }
    blocks = {block.layer: block for block in inventory.expert_blocks}
    ships = next(iter(fitted.policies))
    whole, learned = fitted.policies[ships]
    kinds = windows.batch.flat_kinds
    runs = {
        key: pruners(*_at(fitted, entry), fitted.policies[entry.policy][1], count=True, kinds=kinds)
        for key, entry in named.items()
    }
    runs[UNPRUNED] = pruners(*_nothing_dropped(whole), learned, count=True, kinds=kinds)
    classes = _classes(windows, tokenizer)
    found = compare_points(
        packed,
        windows,
        blocks,
        runs,
        batch_size=batch_size,
        progress=progress,
        title="prune-eval: policies",
        original=original,
        classes=classes,
    )
    bytes_of = _Bytes(packed, inventory)
    rows = [_row(entry, found.points[key], found, bytes_of) for key, entry in named.items()]
    for row in rows:
        row["on_front"] = _on_front(row, rows)
    return {
        "policy": ships,
        "experts_dropped": {str(layer.layer): list(layer.dropped) for layer in whole.layers if layer.dropped},
        "fit": fitted.fingerprint,
        "units": UNITS if found.answers is None else UNITS | ANSWER_UNITS,
        "unpruned": _measured(found.points[UNPRUNED], found, bytes_of),
        "points": rows,
        "token_classes": {name: int(mask.sum()) for name, mask in classes.items()},
    }


def _classes(windows: Windows, tokenizer: Any) -> dict[str, Tensor]:
    """Class of tokens -> bool mask [windows, length]: by how text is written, and images apart; padding is in none."""
    classes, kinds = token_classes(windows.token_ids, tokenizer), windows.batch.kinds
    if kinds is None:
        return classes
    found = {name: mask & (kinds != IMAGE) & (kinds != PADDING) for name, mask in classes.items()}
    found[MEASURED[IMAGE]] = kinds == IMAGE
    return {name: mask for name, mask in found.items() if bool(mask.any())}


def _at(fitted: FittedPolicies, entry: _Named) -> tuple[Pruning, OperatingPoint]:
    return fitted.policies[entry.policy][0], entry.point


def _nothing_dropped(pruning: Pruning) -> tuple[Pruning, OperatingPoint]:
    """The policy's layers with every slot kept and no expert dropped."""
    pruning = replace(pruning, layers=tuple(replace(layer, dropped=()) for layer in pruning.layers))
    return pruning, OperatingPoint(0.0, (-math.inf,) * len(pruning.layers))


def _row(entry: _Named, result: PointResult, found: PrunedComparison, bytes_of: _Bytes) -> dict[str, Any]:
    by_kind = entry.point.by_kind
    return {
        "policy": entry.policy,
        "chosen": entry.chosen,
        "fitted_rate": entry.point.rate,
        "predicted_loss": entry.point.predicted_loss,
        "thresholds": list(entry.point.thresholds),
        **({"thresholds_by_kind": {kind: list(each) for kind, each in by_kind.items()}} if by_kind else {}),
        **_measured(result, found, bytes_of),
    }


def _measured(result: PointResult, found: PrunedComparison, bytes_of: _Bytes) -> dict[str, Any]:
    stored, weights = bytes_of.activated(result)
    return {
        "rate": result.rate,
        "tokens": result.tokens,
        "loss": result.loss,
        "loss_error": result.loss_error,
        "perplexity": math.exp(result.loss),
        "perplexity_rise": math.expm1(result.loss - found.packed_loss),
        "kl_packed": result.kl_packed,
        "kl_original": result.kl_original,
        "experts_per_token": sum(result.experts_per_token.values()) / len(result.experts_per_token),
        "experts_by_layer": {str(layer): mean for layer, mean in result.experts_per_token.items()},
        "experts_by_class": dict(result.experts_by_class),
        **({"rate_by_kind": dict(result.rate_by_kind)} if result.rate_by_kind else {}),
        "activated_bytes": stored,
        "activated_parameters": weights,
        **({} if result.answers_right is None else {"answers": found.answers, "answers_right": result.answers_right}),
    }


def _on_front(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    return not any(
        other["rate"] >= row["rate"]
        and other["loss"] <= row["loss"]
        and (other["rate"], -other["loss"]) != (row["rate"], -row["loss"])
        for other in rows
    )


class _Bytes:
    """Stored bytes of every expert, and of what every token reads."""

    def __init__(self, packed: PackedSource, inventory: ModelInventory) -> None:
        self._blocks: dict[int, ExpertBlock] = {block.layer: block for block in inventory.expert_blocks}
        self._expert_bytes = {block.layer: _expert_bytes(packed, block) for block in inventory.expert_blocks}
        stored = stored_sizes(packed.folder)
        apart = (Role.EXPERT,) if inventory.tied_head else (Role.EXPERT, Role.EMBEDDING)
        self._always_bytes = sum(part.total for role, part in stored.items() if role not in apart)
        self._always_weights = sum(
            math.prod(tensor.shape) for tensor in inventory.tensors if tensor.role not in (*apart, Role.EXPERT_BIAS)
        )

    def activated(self, result: PointResult) -> tuple[float, float]:
        """(bytes, weights) that one token needs on average."""
        size, weights = float(self._always_bytes), float(self._always_weights)
        for layer, calls in result.expert_calls.items():
            size += sum(float(count) * part for count, part in zip(calls, self._expert_bytes[layer], strict=True))
            weights += float(calls.sum()) * self._blocks[layer].weights_per_expert
        return size, weights


def _expert_bytes(packed: PackedSource, block: ExpertBlock) -> list[float]:
    """Stored bytes of the expert that each router slot of a layer runs."""
    layout = next(part for part in packed.layout.experts if part.path == block.path)
    sizes = [0.0] * layout.num_experts
    for projection in layout.projections:
        for stack in layout.stacks(projection):
            encoding = encoding_of(stack.key)
            parts = ["weight"] if encoding is None else list(encoding.tensor_specs(*stack.shape))
            names = [f"{block.path}.{stack.name(part)}" for part in parts]
            total = sum(packed.files.tensors[name].size_bytes for name in names)
            for expert, _ in stack.members:
                sizes[expert] += total / len(stack.members)
    return [0.0 if expert is None else sizes[expert] for expert in layout.slots]
