"""Policies fitted to a packed model: one streamed forward over the fitting tokens, then thresholds for every rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from mc_cli.artifacts.pruning import TENSOR_PREFIX, OperatingPoint, PrunedLayer, Pruning
from mc_cli.data.batches import Batch
from mc_cli.data.kinds import kind_masks
from mc_cli.errors import InputError
from mc_cli.parts import ExpertBlock
from mc_cli.policies import (
    SPREAD,
    LayerValues,
    calibrated_numbers,
    checked_scores,
    drops_calls,
    dualsparse,
    policy_from_name,
    runs_halves,
)
from mc_cli.progress import Progress
from mc_cli.skipping.pruning_samples import LayerSample, sample_layers
from mc_cli.skipping.pruning_thresholds import (
    Fitted,
    LayerCurve,
    largest_rate,
    layer_curve,
    merged_curve,
    shared_threshold,
    spread_thresholds,
)
from mc_cli.walking.layerwise import LayerSource


@dataclass
class _Growing:
    """One policy while the layers go by.

    kind_curves  kind of token -> a curve per layer; empty where kinds share thresholds
    """

    name: str
    layers: list[PrunedLayer] = field(default_factory=list)
    curves: list[LayerCurve] = field(default_factory=list)
    kind_curves: dict[str, list[LayerCurve]] = field(default_factory=dict)
    half_curves: dict[float, list[LayerCurve]] = field(default_factory=dict)  # of a policy of halves, by margin


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    rates        shares of expert calls to find thresholds for
    protect      share of tokens that ODP spares
    dropped      layer -> experts that are not chosen at all
    kind_scales  layer -> kind of token -> what an error at its tokens costs over one at the mean token; empty: kinds
                 share thresholds
    kind_tokens  as in `Pruning`
    """

    rates: tuple[float, ...]
    protect: float
    seed: int
    dropped: Mapping[int, Sequence[int]] = field(default_factory=dict)
    kind_scales: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    kind_tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)


def fit_policies(
    source: LayerSource,
    inputs: Batch,
    blocks: Mapping[int, ExpertBlock],
    scales: Mapping[int, Tensor],
    learned: Mapping[str, Mapping[str, Tensor]],
    *,
    policies: Sequence[str],
    settings: FitSettings,
    nats: bool,
    batch_size: int,
    progress: Progress,
) -> dict[str, Pruning]:
    """Policy name -> the policy with an operating point per rate, all from one forward over `inputs`.

    scales   layer -> [hidden] what a squared error of the MoE output costs;  nats: in nats per token
    learned  policy -> full tensor name -> what it learned
    Points that a policy cannot reach, with so many tokens spared or so few experts per token, are left out.
    Raises InputError where no layer has more than one expert per token.
    """
    growing = [_Growing(name) for name in policies]
    watch = any(policy_from_name(name).WATCHES_ATTENTION for name in policies)
    with progress.step(f"prune-eval: fit {', '.join(policies)}", total=len(blocks), unit="layer") as step:
        samples = sample_layers(
            source,
            inputs,
            blocks,
            scales,
            batch_size=batch_size,
            watch=watch,
            dropped=settings.dropped,
            margins=dualsparse.MARGINS if any(runs_halves(policy_from_name(name)) for name in policies) else (),
        )
        for sample in samples:
            for part in growing:
                _add_layer(part, sample, learned.get(part.name, {}), settings)
            step.advance(note=f"layer {sample.block.layer}")
    if not growing[0].layers or all(layer.top_k < 2 for layer in growing[0].layers):
        raise InputError(
            "This model's routers choose one expert per token, and a token's best expert is never skipped: there is "
            "nothing to skip per token. Run prune-eval without --policy."
        )
    return {part.name: _finished(part, settings, inputs.real_tokens, nats=nats) for part in growing}


def _add_layer(part: _Growing, sample: LayerSample, learned: Mapping[str, Tensor], settings: FitSettings) -> None:
    policy = policy_from_name(part.name)
    prefix = f"{sample.block.path}.{TENSOR_PREFIX}"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in learned.items() if name.startswith(prefix)}
    numbers = calibrated_numbers(policy, sample.routed, protect=settings.protect)
    layer = PrunedLayer(
        layer=sample.block.layer,
        path=sample.block.path,
        top_k=sample.top_k,
        renormalise=sample.renormalise and not runs_halves(policy),
        prior=sample.prior if policy.WATCHES_ATTENTION else None,
        numbers=numbers,
        tensors={name: list(tensor.shape) for name, tensor in tensors.items()},
        router_path=sample.block.router_path,
        dropped=list(settings.dropped.get(sample.block.layer, ())),
    )
    if runs_halves(policy):
        part.layers.append(layer)
        for margin, costs in sample.half_costs.items():
            halves = dualsparse.half_scores(sample.routed.weights, margin)
            part.half_curves.setdefault(margin, []).append(layer_curve(halves, halves, costs))
        return
    scores = checked_scores(policy, sample.routed, LayerValues(layer.layer, settings.seed, numbers, tensors))
    part.layers.append(layer)
    if not settings.kind_scales or sample.kinds is None:
        part.curves.append(layer_curve(scores, sample.routed.weights, sample.costs))
        return
    for kind, mask in kind_masks(sample.kinds).items():
        costs = sample.costs[mask] * settings.kind_scales[layer.layer][kind]
        part.kind_curves.setdefault(kind, []).append(layer_curve(scores[mask], sample.routed.weights[mask], costs))


def _finished(part: _Growing, settings: FitSettings, tokens: int, *, nats: bool) -> Pruning:
    policy = policy_from_name(part.name)
    if runs_halves(policy):
        _choose_margin(part, settings.rates)
    limit = largest_rate([*part.curves, *(curve for curves in part.kind_curves.values() for curve in curves)])
    points: list[OperatingPoint] = []
    for rate in sorted(settings.rates):
        if rate > limit + 1e-3:
            continue
        fitted, by_kind = _thresholds(part, rate)
        if points and fitted.rate <= points[-1].rate:
            continue  # whole steps of a coarse policy: the same point again
        predicted = fitted.cost / tokens if nats else None
        points.append(OperatingPoint(fitted.rate, fitted.thresholds, predicted, by_kind=by_kind))
    if not drops_calls(policy):
        points = [OperatingPoint(0.0, (0.0,) * len(part.layers), 0.0 if nats else None)]
    notes = []
    if drops_calls(policy) and len(points) < len(settings.rates):
        notes.append(
            f"policy {part.name}: {len(settings.rates)} rates were asked for, {len(points)} differ and can be reached; "
            f"at most {limit:.3f} of the expert calls can be skipped."
        )
    unwatched = [layer.layer for layer in part.layers if layer.prior is None]
    if policy.WATCHES_ATTENTION and unwatched:
        notes.append(
            f"policy {part.name}: {len(unwatched)} of {len(part.layers)} layers have no attention that can be watched "
            f"({', '.join(map(str, unwatched[:8]))}); there tokens are spared by their norm alone."
        )
    if not points:
        raise InputError(
            f"policy {part.name}: no rate of {', '.join(f'{rate:g}' for rate in settings.rates)} can be reached; at "
            f"most {limit:.3f} of the expert calls can be skipped here. Ask for a smaller --target-rate."
        )
    numbers = settings.kind_tokens if part.kind_curves and drops_calls(policy) else {}
    return Pruning(part.name, settings.seed, tuple(part.layers), tuple(points), 0, tuple(notes), numbers)


def _thresholds(part: _Growing, rate: float) -> tuple[Fitted, dict[str, tuple[float, ...]]]:
    """(thresholds of the layers at a rate, those by kind of token).

    With kinds, calls are skipped where they cost least over all layers and kinds, or over the kinds where layers share
    a threshold. A token whose kind is not known then has the lowest of its layer's.
    """
    spread = policy_from_name(part.name).THRESHOLDS == SPREAD
    if not part.kind_curves:
        return (spread_thresholds if spread else shared_threshold)(part.curves, rate), {}
    kinds, layers = list(part.kind_curves), len(part.layers)
    if spread:
        fitted = spread_thresholds([curve for kind in kinds for curve in part.kind_curves[kind]], rate)
        each = [fitted.thresholds[number * layers : (number + 1) * layers] for number in range(len(kinds))]
    else:
        fitted = spread_thresholds([merged_curve(part.kind_curves[kind]) for kind in kinds], rate)
        each = [(threshold,) * layers for threshold in fitted.thresholds]
    lowest = tuple(min(values) for values in zip(*each, strict=True))
    return replace(fitted, thresholds=lowest), dict(zip(kinds, each, strict=True))


def _choose_margin(part: _Growing, rates: Sequence[float]) -> None:
    """Takes the margin whose thresholds cost least, summed over the rates."""

    def cost(margin: float) -> float:
        return sum(shared_threshold(part.half_curves[margin], rate).cost for rate in rates)

    margin = min(part.half_curves, key=cost)
    part.curves = part.half_curves[margin]
    part.layers = [replace(layer, numbers={dualsparse.MARGIN: margin}) for layer in part.layers]


def chosen_by_rate(pruning: Pruning, rate: float) -> Pruning:
    """The policy with the point nearest to `rate` chosen."""
    nearest = min(range(len(pruning.points)), key=lambda number: abs(pruning.points[number].rate - rate))
    return replace(pruning, chosen=nearest)


def chosen_by_loss(pruning: Pruning, max_loss: float) -> Pruning:
    """The policy with the largest rate chosen whose checked limit is at most `max_loss` (0.01 = 1 %).

    The limit is never smaller at a higher rate. Between the last point under it and the next one a point is
    interpolated and added.
    Raises InputError where even the smallest rate costs more.
    """
    points = list(pruning.points)
    limits = list(accumulate((_checked_limit(point) for point in points), max))
    if limits[0] > max_loss:
        raise InputError(
            f"--max-loss {max_loss}: policy {pruning.policy} may raise the perplexity of the fitting text by "
            f"{limits[0]:.4f} already at its smallest rate, {points[0].rate:.3f}. Allow more, give more text with "
            "--fit-data, or use another policy."
        )
    last = max(number for number, limit in enumerate(limits) if limit <= max_loss)
    if last + 1 == len(points):
        return replace(pruning, chosen=last)
    share = (max_loss - limits[last]) / (limits[last + 1] - limits[last])
    rate = points[last].rate + share * (points[last + 1].rate - points[last].rate)
    if rate - points[last].rate < 0.005 or points[last + 1].rate - rate < 0.005:
        return replace(pruning, chosen=last)
    between = replace(pruning.at_rate(rate), checked_limit=max_loss)
    return replace(pruning, points=(*points[: last + 1], between, *points[last + 1 :]), chosen=last + 1)


def _checked_limit(point: OperatingPoint) -> float:
    assert point.checked_limit is not None, "points are measured before one is chosen"
    return point.checked_limit


def squared_error_scales(
    blocks: Mapping[int, ExpertBlock], gradient_squares: Mapping[int, Tensor], residual_energies: Mapping[int, float]
) -> tuple[dict[int, Tensor], bool]:
    """(layer -> [hidden] cost of a squared error, whether it is in nats).

    Half the mean squared gradient where calibrate measured it for every layer; else one over the residual's energy.
    """
    if all(layer in gradient_squares for layer in blocks):
        return {layer: gradient_squares[layer].float() / 2 for layer in blocks}, True
    return {layer: torch.tensor([1.0 / residual_energies[layer]]) for layer in blocks}, False
