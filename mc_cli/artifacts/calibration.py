"""`calibration/`: the token windows, what the model is made of, how it routes, and how its loss reacts.

tokens.safetensors       token_ids [sequences, length] int64
inventory.json           every tensor with role, shape and bytes; every experts module
routing/layer_NN.json    routing statistics of one MoE layer
  sensitivity.safetensors  layers.N.gradient_square [hidden] float32: mean over tokens of the squared gradient of the
                           summed loss at the MoE output; layers.N.token_scale [tokens of the first sequences] float32:
                           a token's squares summed over features, relative to the mean token's; layers.N.choice_cost
                           [] float64, see LayerSensitivity
gradients/layer_NNN.safetensors  covariance [hidden, hidden] float32: mean over tokens of gradient gradient^T at one MoE
                           output; a file per layer, read when that layer is quantized. Calibrations of earlier versions
                           have none
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.files import read_json, read_tensors, write_json
from mc_cli.errors import ArtifactError
from mc_cli.parts import ExpertBlock, ModelInventory, Projection, Role, TensorPart

if TYPE_CHECKING:
    import torch

SCHEMA = 1
TOKENS = "tokens.safetensors"
INVENTORY = "inventory.json"
LEFT_OUT = "Left out of every result:"  # begins the warning on tensors that the model's class does not have
SENSITIVITY = "sensitivity.safetensors"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LayerSensitivity:
    """Second moments of the loss gradient at one MoE output, over the tokens of the backward pass.

    gradient_square  [hidden] float32, mean over tokens
    token_scale      [tokens] float32, a token's summed squares over the mean token's, in the order of the sequences
    choice_cost      nats that it costs when the layer's router chooses another expert, NaN where that cannot be told;
                     None where it was not asked. Layers in front of this one have it in their gradients
    """

    gradient_square: torch.Tensor
    token_scale: torch.Tensor
    choice_cost: float | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are stored."""
        import torch

        stored = {"gradient_square": self.gradient_square, "token_scale": self.token_scale}
        if self.choice_cost is not None:
            stored["choice_cost"] = torch.tensor(self.choice_cost, dtype=torch.float64)
        return stored

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], prefix: str) -> LayerSensitivity:
        """From stored tensors whose names begin with `prefix`."""
        cost = tensors.get(f"{prefix}choice_cost")
        square, scale = tensors[f"{prefix}gradient_square"], tensors[f"{prefix}token_scale"]
        return cls(square, scale, None if cost is None else float(cost))


@dataclass(frozen=True)
class LayerRouting:
    """How the router of one layer spread the calibration tokens; sequences are indexed by expert.

    routing_weight_quantiles  per expert, at QUANTILES, of the weights its tokens carry; empty where it saw none
    weight_ratio_quantiles    per rank r >= 1, at QUANTILES, of weight(r) / weight(0) over tokens
    residual_energy           mean over tokens of the squared L2 norm of the layer's output
    """

    layer: int
    top_k: int
    token_count: int
    routing_count: Sequence[int]
    routing_weight_sum: Sequence[float]
    router_probability_sum: Sequence[float]
    routing_weight_quantiles: Sequence[Sequence[float]]
    weight_ratio_quantiles: Sequence[Sequence[float]]
    residual_energy: float

    def write(self, path: Path) -> None:
        """Writes the JSON file in one atomic replace."""
        write_json(path, {"schema": SCHEMA, "quantiles": list(QUANTILES), **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> LayerRouting:
        """Reads the file back. Raises ArtifactError where it is damaged."""
        content = read_json(path)
        try:
            if content.pop("schema") != SCHEMA:
                raise ValueError("schema")
            content.pop("quantiles")
            return cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} is not a routing file of this version: {error!r}. Run calibrate --force."
            ) from error


def routing_file(layer: int) -> str:
    """Name of a layer's routing file inside the calibration folder."""
    return f"routing/layer_{layer:03d}.json"


def covariance_file(layer: int) -> str:
    """Name of the file of a layer's gradient covariance inside the calibration folder."""
    return f"gradients/layer_{layer:03d}.safetensors"


def read_covariance(calibration: Path, layer: int) -> torch.Tensor | None:
    """[hidden, hidden] float32 of one layer's MoE output; None without a backward pass, or from an earlier version."""
    path = calibration / covariance_file(layer)
    return read_tensors(path)["covariance"] if path.exists() else None


def write_inventory(path: Path, inventory: ModelInventory) -> None:
    """Writes the inventory as JSON in one atomic replace."""
    write_json(path, {"schema": SCHEMA, **asdict(inventory)})


def read_inventory(path: Path) -> ModelInventory:
    """Reads the inventory back. Raises ArtifactError where it is damaged."""
    content: dict[str, Any] = read_json(path)
    try:
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}")
        blocks = tuple(
            ExpertBlock(**{**block, "projections": tuple(Projection(**entry) for entry in block["projections"])})
            for block in content["expert_blocks"]
        )
        tensors = tuple(
            TensorPart(**{**tensor, "role": Role(tensor["role"]), "shape": tuple(tensor["shape"])})
            for tensor in content["tensors"]
        )
        return ModelInventory(
            model_type=content["model_type"],
            num_layers=content["num_layers"],
            expert_blocks=blocks,
            tensors=tensors,
            tied_head=content["tied_head"],
            contract_tested=content["contract_tested"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not an inventory of this version: {error!r}. Run calibrate --force.") from error


def read_sensitivities(calibration: Path, inventory: ModelInventory) -> dict[int, LayerSensitivity]:
    """Decoder layer -> its sensitivity; empty where no backward pass was run."""
    path = calibration / SENSITIVITY
    if not path.exists():
        return {}
    tensors = read_tensors(path)
    return {block.layer: LayerSensitivity.of(tensors, f"layers.{block.layer}.") for block in inventory.expert_blocks}
