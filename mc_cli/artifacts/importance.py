"""`importance.json`: what each expert matters, and what each width would cost, with units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mc_cli.artifacts.store import read_json, write_json
from mc_cli.errors import ArtifactError

SCHEMA = 1

UNITS = {
    "routing_count": "tokens routed to the expert",
    "routing_weight_sum": "sum over those tokens of the weight the experts receive (after top-k and the family's scaling)",
    "router_probability_sum": "sum over those tokens of the softmax over all experts, before top-k (MC's w)",
    "output_norm_mean": "mean over those tokens of routing weight times L2 norm of the expert's output (REAP)",
    "loss_by_bits": "L2 norm over calibration tokens of the change of the MoE output when this expert alone has that width",
    "predicted_loss_by_bits": "expected rise of the model's loss, nats per token, when this expert alone has that width",
    "stored_bytes_by_bits": "bytes of one expert of this layer at that width: codes, scales and zero points",
}


@dataclass(frozen=True)
class LayerImportance:
    """Measures of the experts of one MoE layer; every sequence is indexed by expert."""

    layer: int
    weights_per_expert: int
    token_count: int
    routing_count: Sequence[int]
    routing_weight_sum: Sequence[float]
    router_probability_sum: Sequence[float]
    output_norm_mean: Sequence[float]
    loss_by_bits: dict[int, Sequence[float]]
    predicted_loss_by_bits: dict[int, Sequence[float]]
    stored_bytes_by_bits: dict[int, int]
    sensitivity: float = 1.0  # nats per token per unit of squared MoE-output error (summed over tokens)

    @property
    def num_experts(self) -> int:
        return len(self.routing_count)


@dataclass(frozen=True)
class Importance:
    """The measures of every MoE layer of one model."""

    model_type: str
    quantizer: str
    candidate_bits: tuple[int, ...]
    layers: tuple[LayerImportance, ...]
    sensitivity_method: str = ""
    group_size_limit: int = 128  # at which the losses and stored bytes were measured
    units: dict[str, str] = field(default_factory=lambda: dict(UNITS))
    warnings: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """Writes the JSON file in one atomic replace."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Importance:
        """Reads and checks the file. Raises ArtifactError naming what is wrong with it."""
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {content.get('schema')!r}; this version of mc-cli reads schema {SCHEMA}. Run score again."
            )
        try:
            layers = tuple(_layer(entry) for entry in content["layers"])
            return cls(
                model_type=content["model_type"],
                quantizer=content["quantizer"],
                candidate_bits=tuple(content["candidate_bits"]),
                layers=layers,
                sensitivity_method=content["sensitivity_method"],
                group_size_limit=int(content.get("group_size_limit", 128)),
                units=content["units"],
                warnings=tuple(content["warnings"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is not an importance file: {error!r}. Run score again.") from error


def _layer(entry: dict[str, Any]) -> LayerImportance:
    by_bits = {name: {int(bits): values for bits, values in entry[name].items()} for name in entry if name.endswith("_by_bits")}
    layer = LayerImportance(**{**entry, **by_bits})
    lengths = {len(layer.routing_count), len(layer.routing_weight_sum), len(layer.output_norm_mean)}
    lengths |= {len(values) for values in layer.loss_by_bits.values()}
    if len(lengths) != 1:
        raise ValueError(f"layer {layer.layer}: measures of different lengths {sorted(lengths)}")
    return layer
