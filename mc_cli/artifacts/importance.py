"""`importance.json`: what each expert matters, and what each width would cost, with units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, cast

from mc_cli.artifacts.fields import Within, read_as, reading, take_schema
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.errors import ArtifactError, listed, shown
from mc_cli.parts import DROPPED, KEPT_BITS, Role

SCHEMA = 1
# The unit of predicted losses where calibrate ran a backward pass.
IN_NATS = "diagonal Fisher at the MoE output, labels sampled from the model; nats per token"
# A role's cost falls so many times with each bit. Errors halve, and a smooth loss would fall 4 times; but errors that
# change what routers choose cost in proportion to themselves. 2.3 to 3.1 were measured from 4 to 8 bits on two models.
LOSS_PER_BIT = 2.5

UNITS = {
    "routing_count": "tokens routed to the expert",
    "routing_weight_sum": "sum over these tokens of the weight the expert gets, after top-k and the family's scaling",
    "router_probability_sum": "sum over these tokens of the softmax over all experts, before top-k (MC's w)",
    "output_norm_mean": "mean over these tokens of routing weight times L2 norm of the expert's output (REAP)",
    "loss_by_bits": "L2 norm over calibration tokens of the MoE output's change when this expert alone has that width",
    "predicted_loss_by_bits": "expected rise of the model's loss, nats per token, with this expert alone at that "
    "width; at width 0 it is dropped, and its tokens go to the experts that the router then chooses",
    "up_share_left": "what is left of the up projections' forecast loss when errors are fed into later rows and the "
    "down projection makes good for them; measured on one expert of the layer, contained in predicted_loss_by_bits",
    "roles": "KL divergence of the model's predictions from the original's, nats per token, with one role's matrices "
    "alone at `bits`, on `tokens` of calibration",
    "stored_bytes_by_bits": "bytes of one expert of this layer at that width: codes, scales and zero points",
}

_PER_EXPERT = ("routing_count", "routing_weight_sum", "router_probability_sum", "output_norm_mean")
_NOTHING = f"stored_bytes_by_bits at {DROPPED}"  # the only size that is 0
_PER_EXPERT_AND_WIDTH = ("loss_by_bits", "predicted_loss_by_bits")


@dataclass(frozen=True)
class ProjectionImportance:
    """The cost of each width of one projection alone, the expert's others as in the checkpoint; indexed by expert."""

    name: str
    weight_count: Annotated[int, Within(1)]  # weights of one expert
    predicted_loss_by_bits: dict[float, Sequence[float]]
    stored_bytes_by_bits: dict[float, Annotated[int, Within(0)]]

    def __post_init__(self) -> None:
        values = {bits: tuple(losses) for bits, losses in self.predicted_loss_by_bits.items()}
        object.__setattr__(self, "predicted_loss_by_bits", values)


@dataclass(frozen=True)
class BlockImportance:
    """The cost of each width of one block of an expert's channels alone; at width 0 they are cut away."""

    expert: Annotated[int, Within(0)]
    channels: Annotated[int, Within(1)]
    weight_count: Annotated[int, Within(1)]  # weights of all projections together
    predicted_loss_by_bits: dict[float, float]
    stored_bytes_by_bits: dict[float, Annotated[int, Within(0)]]

    def problems(self, where: str, wanted: set[float]) -> list[str]:
        """Problems of the measures, one line each."""
        found = []
        for name in ("predicted_loss_by_bits", "stored_bytes_by_bits"):
            if lacking := sorted(wanted - {DROPPED} - set(getattr(self, name))):
                found.append(f"{where}: {name} lacks width {', '.join(map(str, lacking))}")
        if bad := [bits for bits, loss in self.predicted_loss_by_bits.items() if not _is_finite(loss)]:
            found.append(f"{where}: predicted_loss_by_bits is no finite number at {', '.join(map(str, bad))} bits")
        return found


@dataclass(frozen=True)
class LayerImportance:
    """Measures of the experts of one MoE layer; every sequence is indexed by expert and kept as a tuple."""

    layer: Annotated[int, Within(0)]
    weights_per_expert: int
    token_count: Annotated[int, Within(0)]
    routing_count: Sequence[Annotated[int, Within(0)]]
    routing_weight_sum: Sequence[float]
    router_probability_sum: Sequence[float]
    output_norm_mean: Sequence[float]
    loss_by_bits: dict[float, Sequence[float]]
    predicted_loss_by_bits: dict[float, Sequence[float]]
    stored_bytes_by_bits: dict[float, int]
    projections: tuple[ProjectionImportance, ...] = ()  # none: widths are for whole experts
    top_k: Annotated[int, Within(0)] = (
        0  # experts that a token is sent to, and the router's groups: how many have to stay; 0 = not known
    )
    router_groups: Annotated[int, Within(1)] = 1
    groups_used: Annotated[int, Within(1)] = 1
    up_share_left: float = 1.0
    blocks: tuple[BlockImportance, ...] = ()  # in channel order; all of an expert's or none
    # Widths whose losses were measured on the reference experts alone; for the others see coding/interpolation.py.
    interpolated_bits: tuple[Annotated[float, Within(0, 16)], ...] = ()
    reference_experts: tuple[Annotated[int, Within(0)], ...] = ()

    def __post_init__(self) -> None:
        for name in _PER_EXPERT:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _PER_EXPERT_AND_WIDTH:
            object.__setattr__(self, name, {bits: tuple(values) for bits, values in getattr(self, name).items()})

    @property
    def num_experts(self) -> int:
        return len(self.routing_count)

    @classmethod
    def read(cls, path: Path) -> LayerImportance:
        """One layer's measures, from a file of their own. Raises ArtifactError naming what is wrong with it."""
        with reading(path, "a layer's importance", "Run score again."):
            return cast(LayerImportance, read_as(cls, read_json(path)))

    def problems(self, candidate_bits: Iterable[float]) -> list[str]:
        """Problems of the measures, one line each: lengths, missing widths, numbers that are not finite."""
        found = []
        for name, values in self._columns():
            where = f"layer {self.layer}: {name}"
            if len(values) != self.num_experts:
                found.append(f"{where} has {len(values)} entries, routing_count {self.num_experts}")
            elif bad := [expert for expert, value in enumerate(values) if not _is_finite(value)]:
                found.append(f"{where} is no finite number for expert {', '.join(map(str, bad[:8]))}")
        wanted = set(candidate_bits)
        for name in (*_PER_EXPERT_AND_WIDTH, "stored_bytes_by_bits"):
            measured = getattr(self, name)
            # A score without predicted losses is usable: only `global` and `layerwise` need them.
            if wanted - set(measured) and not (name == "predicted_loss_by_bits" and not measured):
                found.append(
                    f"layer {self.layer}: {name} lacks width {', '.join(map(str, sorted(wanted - set(measured))))}"
                )
        sizes = {"weights_per_expert": self.weights_per_expert}
        sizes |= {f"stored_bytes_by_bits at {bits}": size for bits, size in self.stored_bytes_by_bits.items()}
        found += [
            f"layer {self.layer}: {name} is {size!r}, not a positive whole number"
            for name, size in sizes.items()
            if isinstance(size, bool) or not isinstance(size, int) or size < 0 or (size == 0) != (name == _NOTHING)
        ]
        return found + self._structure_problems(wanted)

    def _structure_problems(self, wanted: set[float]) -> list[str]:
        """Problems of counts and of the projections' own widths, one line each."""
        where = f"layer {self.layer}"
        found = []
        if not self.num_experts:
            found.append(f"{where}: it has no experts")
        if self.top_k > self.num_experts or not self.groups_used <= self.router_groups <= max(1, self.num_experts):
            found.append(
                f"{where}: top_k {self.top_k}, router_groups {self.router_groups}, groups_used {self.groups_used} do "
                f"not fit {self.num_experts} experts"
            )
        if self.router_groups > 1 and self.num_experts % self.router_groups:
            found.append(f"{where}: router_groups {self.router_groups} do not divide {self.num_experts} experts")
        for part in self.projections:
            for name in ("predicted_loss_by_bits", "stored_bytes_by_bits"):
                # A dropped expert has no projections to measure.
                if lacking := sorted(wanted - {DROPPED} - set(getattr(part, name))):
                    found.append(f"{where}: {shown(part.name)}: {name} lacks width {', '.join(map(str, lacking))}")
        names = [part.name for part in self.projections]
        if len(set(names)) != len(names):
            found.append(f"{where}: projections {shown(names)} have one name twice")
        return found + self._block_problems(wanted)

    def _block_problems(self, wanted: set[float]) -> list[str]:
        """Problems of the measures of blocks of channels."""
        found, weights = [], dict.fromkeys((block.expert for block in self.blocks), 0)
        for number, block in enumerate(self.blocks):
            found += block.problems(f"layer {self.layer}: block {number}, of expert {block.expert}", wanted)
            weights[block.expert] += block.weight_count
        for expert, count in weights.items():
            if expert >= self.num_experts:
                found.append(f"layer {self.layer}: blocks of expert {expert}, of {self.num_experts}")
            elif count != self.weights_per_expert:
                found.append(
                    f"layer {self.layer}: the blocks of expert {expert} have {count} weights, the expert "
                    f"{self.weights_per_expert}"
                )
        return found

    def _columns(self) -> list[tuple[str, Sequence[float]]]:
        columns = [(name, getattr(self, name)) for name in _PER_EXPERT]
        for name in _PER_EXPERT_AND_WIDTH:
            columns += [(f"{name} at {bits} bits", values) for bits, values in sorted(getattr(self, name).items())]
        for part in self.projections:
            losses = sorted(part.predicted_loss_by_bits.items())
            columns += [(f"{part.name}: predicted_loss_by_bits at {bits} bits", values) for bits, values in losses]
        return columns


@dataclass(frozen=True)
class RoleCost:
    """The cost of coding all matrices of one role beside the experts, everything else as in the checkpoint.

    bits          of the measurement
    loss          KL divergence of the predictions, nats per token, mean over `tokens`
    weight_count  weights of the role that are coded
    """

    role: str
    bits: Annotated[float, Within(0, 16)]
    loss: float
    weight_count: Annotated[int, Within(1)]
    tokens: Annotated[int, Within(1)]

    def at(self, bits: float) -> float:
        """The cost at another width.

        >>> RoleCost("attention", 5, 0.0025, 100, 2048).at(6)
        0.001
        """
        return 0.0 if bits == KEPT_BITS else self.loss * LOSS_PER_BIT ** (self.bits - bits)


@dataclass(frozen=True)
class Importance:
    """The measures of every MoE layer of one model."""

    model_type: str
    quantizer: str
    candidate_bits: tuple[Annotated[float, Within(0, 16)], ...]
    layers: tuple[LayerImportance, ...]
    sensitivity_method: str = ""
    roles: tuple[RoleCost, ...] = ()  # none: not measured
    units: dict[str, str] = field(default_factory=lambda: dict(UNITS))
    warnings: tuple[str, ...] = ()

    @property
    def role_costs(self) -> dict[Role, RoleCost]:
        """The costs by role; none where predicted losses of experts are in another unit."""
        return {Role(each.role): each for each in self.roles} if self.sensitivity_method == IN_NATS else {}

    def check(self) -> None:
        """Raises ArtifactError naming every layer whose measures are incomplete, not finite or of unequal lengths."""
        found = [problem for layer in self.layers for problem in layer.problems(self.candidate_bits)]
        indices = [layer.layer for layer in self.layers]
        found += [
            f"layer {index} occurs {indices.count(index)} times"
            for index in sorted(set(indices))
            if indices.count(index) > 1
        ]
        found += [
            f"roles: {shown(each.role)} costs {each.loss!r}, which is no finite number above 0 or 0"
            for each in self.roles
            if not _is_finite(each.loss) or each.loss < 0
        ]
        names = [each.role for each in self.roles]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(f"roles: {shown(twice)} occur more than once")
        if unknown := [each.role for each in self.roles if each.role not in set(Role)]:
            found.append(f"roles: {shown(unknown)} are none of a model")
        if not self.layers or not self.candidate_bits:
            found.append(f"{len(self.layers)} layers and {len(self.candidate_bits)} candidate widths")
        if found:
            raise ArtifactError(f"The measures of {self.model_type} cannot be used:\n{listed(found)}\nRun score again.")

    def write(self, path: Path) -> None:
        """Writes the JSON file in one atomic replace. Raises ArtifactError, and writes nothing, if `check` does."""
        self.check()
        content = asdict(self)
        for layer in content["layers"]:
            for name in ("blocks", "interpolated_bits", "reference_experts"):
                if not layer[name]:
                    del layer[name]
        if not self.roles:
            del content["roles"]
        write_json(path, {"schema": SCHEMA, **content})

    @classmethod
    def read(cls, path: Path) -> Importance:
        """Reads and checks the file. Raises ArtifactError naming what is wrong with it."""
        content = read_json(path)
        with reading(path, "an importance file", "Run score again."):
            take_schema(content, SCHEMA)
            importance: Importance = read_as(cls, content)
        try:
            importance.check()
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error
        return importance


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
