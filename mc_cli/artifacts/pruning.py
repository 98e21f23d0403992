"""`pruning/`: the skipping policy of a packed model, with a table of operating points to choose from.

policy.json          which policy, per layer its values and whether weights are renormalised, and the operating points
policy.safetensors   what a learned policy learned: `<experts path>.<name>`; absent for the others

The same JSON goes into `quantization_config` of an exported config.json under `pruning`, the tensors into its shards.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.files import read_json, read_tensors, write_json, write_tensors
from mc_cli.encodings import MOST
from mc_cli.errors import ArtifactError, InputError, listed, shown

if TYPE_CHECKING:
    import torch

SCHEMA = 1
POLICY = "policy.json"
TENSORS = "policy.safetensors"
TENSOR_PREFIX = "mc_pruning_"  # attribute names of learned tensors on an experts module
_CLOSE_ENOUGH = 0.005  # a rate that is nearer to an operating point than this means that point


@dataclass(frozen=True)
class PrunedLayer:
    """One MoE layer under a policy.

    renormalise  kept weights are scaled to the sum that the router gave; as the family does it with its own top-k
    prior        mean attention that calibration tokens received, relative to a uniform look; None without a watch
    numbers      the policy's own calibrated values
    tensors      name -> shape of what it learned, stored as `<path>.mc_pruning_<name>`
    dropped      experts that the router at `router_path` does not choose
    """

    layer: int
    path: str
    top_k: int
    renormalise: bool
    prior: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Sequence[int]] = field(default_factory=dict)
    router_path: str = ""
    dropped: Sequence[int] = ()


@dataclass(frozen=True)
class OperatingPoint:
    """One rate that the policy can run at.

    rate             share of expert calls skipped on the tokens that thresholds were fitted on
    thresholds       one per layer, in the order of `layers`
    by_kind          kind of token -> the same of its tokens; `thresholds` are then of tokens whose kind is not known,
                     and skip least. Empty: all kinds share `thresholds`
    predicted_loss   nats per token from the layers' sensitivities; None where a policy has no such prediction
    checked_increase relative rise of perplexity that skipping causes on calibration tokens that no threshold was
                     fitted on; None where it was not measured
    checked_limit    what --max-loss is held against: the same one standard error higher, or, where that is more, the
                     rise on text that the packed model itself would write: its KL divergence from the one that skips
    """

    rate: float
    thresholds: Sequence[float]
    predicted_loss: float | None = None
    checked_increase: float | None = None
    checked_limit: float | None = None
    by_kind: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruning:
    """A policy with everything that running it needs but its tensors.

    chosen       index into points: what applies unless told otherwise
    kind_tokens  kind of token -> the numbers of its tokens, all others are text; empty where kinds share thresholds
    """

    policy: str
    seed: int
    layers: tuple[PrunedLayer, ...]
    points: tuple[OperatingPoint, ...]
    chosen: int
    notes: tuple[str, ...] = ()
    kind_tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def at_rate(self, rate: float | None) -> OperatingPoint:
        """The chosen point, or the one with this rate; between two points their thresholds are interpolated.

        Raises InputError for a rate outside the points'.
        """
        if rate is None:
            return self.points[self.chosen]
        ordered = sorted(self.points, key=lambda point: point.rate)
        nearest = min(ordered, key=lambda point: abs(point.rate - rate))
        if abs(nearest.rate - rate) < _CLOSE_ENOUGH:
            return nearest
        below = [point for point in ordered if point.rate < rate]
        above = [point for point in ordered if point.rate > rate]
        if not below or not above:
            known = ", ".join(f"{point.rate:.3f}" for point in ordered)
            raise InputError(
                f"A rate of {rate} is outside of what the policy {self.policy!r} was fitted for: {known}. "
                "Choose one between them, or run `mc-cli prune-eval` with this rate as --target-rate."
            )
        low, high = below[-1], above[0]
        share = (rate - low.rate) / (high.rate - low.rate)

        def between(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
            return tuple(begin + share * (end - begin) for begin, end in zip(first, second, strict=True))

        kinds = {kind: between(values, high.by_kind[kind]) for kind, values in low.by_kind.items()}
        return OperatingPoint(rate, between(low.thresholds, high.thresholds), by_kind=kinds)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists, as they come back
        for entry, name in ((plain, "kind_tokens"), *((point, "by_kind") for point in plain["points"])):
            if not entry[name]:
                del entry[name]
        return {"schema": SCHEMA, **plain}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Pruning:
        """Reads `to_json` back. Raises ArtifactError where it is damaged or of another version."""
        problems = _problems(content)
        if problems:
            raise ArtifactError(
                f"The skipping policy is damaged or of another version: {len(problems)} of its entries cannot be:\n"
                f"{listed(problems)}\nRun prune-eval --force again, then export; or copy or download the model again."
            )
        return cls(
            policy=content["policy"],
            seed=content["seed"],
            layers=tuple(PrunedLayer(**entry) for entry in content["layers"]),
            points=tuple(OperatingPoint(**entry) for entry in content["points"]),
            chosen=content["chosen"],
            notes=tuple(content["notes"]),
            kind_tokens=content.get("kind_tokens", {}),
        )

    def tensor_names(self) -> dict[str, tuple[int, ...]]:
        """Full module-tree name -> shape of every learned tensor."""
        return {
            f"{layer.path}.{TENSOR_PREFIX}{name}": tuple(shape)
            for layer in self.layers
            for name, shape in layer.tensors.items()
        }


def _problems(content: Any) -> list[str]:
    """Problems of a policy's JSON, a line each."""
    names = {"schema", "policy", "seed", "layers", "points", "chosen", "notes"}
    if not isinstance(content, Mapping) or content.keys() - {"kind_tokens"} != names or content["schema"] != SCHEMA:
        found = sorted(map(str, content)) if isinstance(content, Mapping) else content
        schema = content.get("schema") if isinstance(content, Mapping) else None
        return [f"policy: schema {shown(schema)} with the entries {shown(found)}, not {SCHEMA} with {sorted(names)}"]
    layers, points = content["layers"], content["points"]
    if not isinstance(layers, list) or not isinstance(points, list) or not points:
        return [f"layers {shown(layers)} and points {shown(points)}: not lists, or no point"]
    checks = [("policy", content["policy"], _is_name), ("seed", content["seed"], _is_whole)]
    checks += [("chosen", content["chosen"], lambda value: _is_whole(value) and 0 <= value < len(points))]
    checks += [("notes", content["notes"], lambda value: isinstance(value, list) and all(map(_is_text, value)))]
    checks += [("kind_tokens", content.get("kind_tokens", {}), _are_numbers_by_kind)]
    problems = [f"{name}: {shown(value)}" for name, value, fits in checks if not fits(value)]
    for kind, entries, fields in (("layers", layers, _LAYER), ("points", points, _POINT)):
        required = {
            each.name
            for each in dataclass_fields(PrunedLayer if kind == "layers" else OperatingPoint)
            if each.default is MISSING and each.default_factory is MISSING
        }
        for number, entry in enumerate(entries):
            if not isinstance(entry, Mapping) or not required <= entry.keys() <= fields.keys():
                problems.append(f"{kind}[{number}]: {shown(entry)} has not the entries {', '.join(fields)}")
                continue
            problems += [
                f"{kind}[{number}].{name}: {shown(value)}" for name, value in entry.items() if not fields[name](value)
            ]
            thresholds = entry.get("thresholds", ())
            if kind == "points" and isinstance(thresholds, list) and len(thresholds) != len(layers):
                problems.append(f"points[{number}]: {len(thresholds)} thresholds for {len(layers)} layers")
            if kind == "points" and not problems:
                problems += _kind_problems(number, entry, points[0], len(layers))
    if not problems:
        for name in ("path", "layer"):
            twice = [value for value, count in Counter(layer[name] for layer in layers).items() if count > 1]
            problems += [f"layers: the {name} {shown(value)} is there twice" for value in twice]
    return problems


def _kind_problems(number: int, point: Mapping[str, Any], first: Mapping[str, Any], layers: int) -> list[str]:
    """Problems of a point's thresholds by kind: all points have them of the same kinds, one per layer."""
    by_kind = point.get("by_kind", {})
    problems = [
        f"points[{number}].by_kind.{kind}: {len(values)} thresholds for {layers} layers"
        for kind, values in by_kind.items()
        if len(values) != layers
    ]
    if by_kind.keys() != first.get("by_kind", {}).keys():
        problems.append(f"points[{number}].by_kind: of {shown(sorted(by_kind))}, unlike the first point's")
    return problems


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _are_experts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and len(set(value)) == len(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(_is_number, value.values()))


def _are_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        re.fullmatch("[a-z_]{1,40}", name)
        and isinstance(shape, list)
        and len(shape) <= 4
        and all(map(_is_count, shape))
        for name, shape in value.items()
    )


def _are_numbers_by_kind(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_name(kind) and isinstance(numbers, list) and all(map(_is_count, numbers)) for kind, numbers in value.items()
    )


def _are_thresholds_by_kind(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_name(kind) and isinstance(values, list) and all(map(_is_number, values)) for kind, values in value.items()
    )


_LARGEST = 3e38  # about the largest float32: decisions are made in it
_LAYER: dict[str, Callable[[Any], bool]] = {
    "layer": _is_count,
    "path": _is_name,
    "top_k": lambda value: _is_count(value) and value > 0,
    "renormalise": lambda value: isinstance(value, bool),
    "prior": _is_number_or_none,
    "numbers": _are_numbers,
    "tensors": _are_shapes,
    "router_path": _is_text,
    "dropped": _are_experts,
}
_POINT: dict[str, Callable[[Any], bool]] = {
    "rate": lambda value: _is_number(value) and 0 <= value <= 1,
    "thresholds": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "predicted_loss": _is_number_or_none,
    "checked_increase": _is_number_or_none,
    "checked_limit": _is_number_or_none,
    "by_kind": _are_thresholds_by_kind,
}


def write_pruning(folder: Path, pruning: Pruning, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes policy.json and, if there are any, policy.safetensors (full name -> tensor)."""
    if tensors:
        write_tensors(folder / TENSORS, tensors)
    write_json(folder / POLICY, pruning.to_json())


def read_pruning(folder: Path) -> tuple[Pruning, dict[str, torch.Tensor]]:
    """Policy and learned tensors by full name. Raises ArtifactError where they are missing, damaged or do not fit."""
    try:
        pruning = Pruning.from_json(read_json(folder / POLICY))
    except ArtifactError as error:
        raise error if str(folder) in str(error) else ArtifactError(f"{folder / POLICY}: {error}") from error
    wanted = pruning.tensor_names()
    if not wanted:
        return pruning, {}
    tensors = read_tensors(folder / TENSORS)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise ArtifactError(
            f"{folder / TENSORS} does not fit {POLICY}: it holds {len(found)} tensors, {len(wanted)} are named, and "
            f"{sum(found.get(name) != shape for name, shape in wanted.items())} differ. Run prune-eval --force again."
        )
    return pruning, tensors
