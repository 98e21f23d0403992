"""`pruning/`: the online pruning policy of a packed model, with a table of operating points to choose from.

policy.json          which policy, per layer its values and whether weights are renormalised, and the operating points
policy.safetensors   what a learned policy learned: `<experts path>.<name>`; absent for the others

The same JSON goes into `quantization_config` of an exported config.json under `pruning`, the tensors into its shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.files import read_json, read_tensors, write_json, write_tensors
from mc_cli.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import torch

SCHEMA = 1
FOLDER = "pruning"  # in the work directory; one folder per policy in it
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

    rate             share of expert calls dropped on the tokens that thresholds were fitted on
    thresholds       one per layer, in the order of `layers`
    predicted_loss   nats per token from the layers' sensitivities; None where a policy has no such prediction
    checked_increase relative rise of perplexity over the unpruned packed model on calibration tokens that no threshold
                     was fitted on; None where it was not measured
    checked_limit    what --max-loss is held against: the same one standard error higher, or, where that is more, the
                     rise on text that the packed model itself would write: its KL divergence from the pruned one
    """

    rate: float
    thresholds: Sequence[float]
    predicted_loss: float | None = None
    checked_increase: float | None = None
    checked_limit: float | None = None


@dataclass(frozen=True)
class Pruning:
    """A policy with everything that running it needs but its tensors."""

    policy: str
    seed: int
    layers: tuple[PrunedLayer, ...]
    points: tuple[OperatingPoint, ...]
    chosen: int  # index into points: what applies unless told otherwise
    notes: tuple[str, ...] = ()

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
                f"A pruning rate of {rate} is outside of what the policy {self.policy!r} was fitted for: {known}. "
                "Choose one between them, or run `mc-cli prune-eval` with this rate as --target-rate."
            )
        low, high = below[-1], above[0]
        share = (rate - low.rate) / (high.rate - low.rate)
        pairs = zip(low.thresholds, high.thresholds, strict=True)
        return OperatingPoint(rate, tuple(first + share * (second - first) for first, second in pairs))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists, as they come back
        return {"schema": SCHEMA, **plain}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Pruning:
        """Reads `to_json` back. Raises ArtifactError where it is damaged or of another version."""
        try:
            fields = dict(content)
            if fields.pop("schema") != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            fields["layers"] = tuple(PrunedLayer(**entry) for entry in fields["layers"])
            fields["points"] = tuple(OperatingPoint(**entry) for entry in fields["points"])
            fields["notes"] = tuple(fields["notes"])
            found = cls(**fields)
            if any(len(point.thresholds) != len(found.layers) for point in found.points):
                raise ValueError("thresholds for another number of layers")
            if not 0 <= found.chosen < len(found.points):
                raise ValueError(f"chosen point {found.chosen} of {len(found.points)}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"The pruning policy is damaged or of another version: {error!r}. Run prune-eval --force again."
            ) from error
        return found

    def tensor_names(self) -> dict[str, tuple[int, ...]]:
        """Full module-tree name -> shape of every learned tensor."""
        return {
            f"{layer.path}.{TENSOR_PREFIX}{name}": tuple(shape)
            for layer in self.layers
            for name, shape in layer.tensors.items()
        }


def write_pruning(folder: Path, pruning: Pruning, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes policy.json and, if there are any, policy.safetensors (full name -> tensor)."""
    if tensors:
        write_tensors(folder / TENSORS, tensors)
    write_json(folder / POLICY, pruning.to_json())


def read_pruning(folder: Path) -> tuple[Pruning, dict[str, torch.Tensor]]:
    """Policy and learned tensors by full name. Raises ArtifactError where they are missing, damaged or do not fit."""
    pruning = Pruning.from_json(read_json(folder / POLICY))
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
