"""`calibration/`: the token windows, what the model is made of, how it routes, and how its loss reacts.

tokens.safetensors       token_ids [sequences, length] int64
inputs.safetensors       where there are images: inputs.NAME, what the model's processor made beside the token ids;
                           counts.NAME [sequences] int64, entries of each sequence; kinds [sequences, length] uint8, of
                           each token: 0 text, 1 image, 2 special, 3 padding; answers [sequences, length] bool, tokens
                           whose prediction is measured. Absent for text alone
images.json              what became of rows with images; absent for text alone
text.json                how rows became text; absent where each row gave the text in the field that was asked for
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast

from mc_cli.artifacts.fields import FieldError, Within, read_as, reading, take_schema
from mc_cli.artifacts.files import read_json, read_tensors, tensor_named, write_json
from mc_cli.errors import ArtifactError, shown
from mc_cli.parts import ModelInventory

if TYPE_CHECKING:
    import torch

SCHEMA = 1
TOKENS = "tokens.safetensors"
INPUTS = "inputs.safetensors"
IMAGES = "images.json"
TEXT = "text.json"
INVENTORY = "inventory.json"
_BESIDE = "directory_bytes"  # of an inventory: it is about a folder that may change, not about the model
OF_THE_CLASS = "tensors of the checkpoint that are not part of"  # and stands in it
LEFT_OUT = "Left out of every result:"  # begins the warning on tensors that the model's class does not have
SENSITIVITY = "sensitivity.safetensors"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_LAYERS, _MOST_FEATURES = 100_000, 2**31
_REMEDY = "Run calibrate --force."


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
        """The tensors as they are stored, by name."""
        import torch

        stored = {"gradient_square": self.gradient_square, "token_scale": self.token_scale}
        if self.choice_cost is not None:
            stored["choice_cost"] = torch.tensor(self.choice_cost, dtype=torch.float64)
        return stored

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], prefix: str) -> LayerSensitivity:
        """The sensitivity from stored tensors whose names begin with `prefix`."""
        cost = tensors.get(f"{prefix}choice_cost")
        square, scale = tensors[f"{prefix}gradient_square"], tensors[f"{prefix}token_scale"]
        return cls(square, scale, None if cost is None else float(cost))


@dataclass(frozen=True)
class KindRouting:
    """Where the tokens of one kind went; sequences are indexed by expert."""

    token_count: Annotated[int, Within(1)]
    routing_count: Sequence[Annotated[int, Within(0)]]
    routing_weight_sum: Sequence[float]


@dataclass(frozen=True)
class LayerRouting:
    """How the router of one layer spread the calibration tokens; sequences are indexed by expert.

    routing_weight_quantiles  per expert, at QUANTILES, of the weights its tokens carry; empty where it saw none
    weight_ratio_quantiles    per rank r >= 1, at QUANTILES, of weight(r) / weight(0) over tokens
    residual_energy           mean over tokens of the squared L2 norm of the layer's output
    by_kind                   the same by kind of token, text, image or special; empty, and not written, for text alone
    """

    layer: Annotated[int, Within(0)]
    top_k: Annotated[int, Within(1)]
    token_count: Annotated[int, Within(1)]
    routing_count: Sequence[Annotated[int, Within(0)]]
    routing_weight_sum: Sequence[float]
    router_probability_sum: Sequence[float]
    routing_weight_quantiles: Sequence[Sequence[float]]
    weight_ratio_quantiles: Sequence[Sequence[float]]
    residual_energy: Annotated[float, Within(0)]
    by_kind: Mapping[str, KindRouting] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the JSON file in one atomic replace."""
        content = {"schema": SCHEMA, "quantiles": list(QUANTILES), **asdict(self)}
        if not self.by_kind:
            del content["by_kind"]
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> LayerRouting:
        """Reads the file back. Raises ArtifactError where it is damaged."""
        content = read_json(path)
        with reading(path, "a routing file of this version", _REMEDY):
            take_schema(content, SCHEMA)
            if content.pop("quantiles", None) != list(QUANTILES):
                raise FieldError(f"quantiles are not {QUANTILES}")
            found: LayerRouting = read_as(cls, content)
            found._check_lengths()
        return found

    def _check_lengths(self) -> None:
        """Raises FieldError where sequences over the experts have different lengths."""
        for name in ("routing_weight_sum", "router_probability_sum", "routing_weight_quantiles"):
            if len(getattr(self, name)) != len(self.routing_count):
                raise FieldError(
                    f"{name} has {len(getattr(self, name))} entries, routing_count {len(self.routing_count)}"
                )
        for kind, found in self.by_kind.items():
            if {len(found.routing_count), len(found.routing_weight_sum)} != {len(self.routing_count)}:
                raise FieldError(f"by_kind.{kind} is not of {len(self.routing_count)} experts")
        for name in ("routing_weight_quantiles", "weight_ratio_quantiles"):
            if any(len(row) not in (0, len(QUANTILES)) for row in getattr(self, name)):
                raise FieldError(f"{name} has a row that is not of {len(QUANTILES)} quantiles")


def routing_file(layer: int) -> str:
    """Name of a layer's routing file inside the calibration folder."""
    return f"routing/layer_{layer:03d}.json"


def covariance_file(layer: int) -> str:
    """Name of the file of a layer's gradient covariance inside the calibration folder."""
    return f"gradients/layer_{layer:03d}.safetensors"


def read_covariance(calibration: Path, layer: int) -> torch.Tensor | None:
    """[hidden, hidden] float32 of one layer's MoE output; None without a backward pass, or from an earlier version.

    Raises ArtifactError where the file is damaged.
    """
    path = calibration / covariance_file(layer)
    if not path.exists():
        return None
    found = _tensor(path, read_tensors(path), "covariance", "float32", 2)
    if found.shape[0] != found.shape[1]:
        raise ArtifactError(f"{path}: covariance has shape {tuple(found.shape)}, should be square. {_REMEDY}")
    return found


def read_token_ids(calibration: Path, *, vocabulary: int) -> torch.Tensor:
    """[sequences, length] int64: the calibration tokens. Raises ArtifactError where the file is damaged.

    vocabulary  how many ids the model knows
    """
    path = calibration / TOKENS
    found = _tensor(path, read_tensors(path), "token_ids", "int64", 2)
    if found.shape[1] < 2:
        raise ArtifactError(f"{path}: token_ids has shape {tuple(found.shape)}, sequences are longer. {_REMEDY}")
    least, most = int(found.min()), int(found.max())
    if least < 0 or most >= vocabulary:
        raise ArtifactError(
            f"{path} holds token ids from {least} to {most}, the model's vocabulary has {vocabulary} entries. {_REMEDY}"
        )
    return found


def read_inputs(calibration: Path) -> dict[str, torch.Tensor]:
    """Reads what is beside the token ids; empty for text alone. Raises ArtifactError for a damaged file."""
    path = calibration / INPUTS
    if not path.exists():
        return {}
    found = read_tensors(path)
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{path}: {name} holds values that are not finite. {_REMEDY}")
    return found


class _RowsReport(TypedDict):
    rows: dict[str, int]
    empty_rows: int
    chat_template: str
    chats_rendered: int
    chats_refused: int
    example_of_refused: str


class TextReport(_RowsReport, total=False):
    """How rows became text; earlier versions did not tell the files left out.

    files_left_out  how many files and folders in a folder of text were not read, where there are any
    left_out        the names of the first of them
    """

    files_left_out: int
    left_out: list[str]


class ImageReport(TypedDict):
    """Counts of rows with images, and what became of them.

    cut       rows that lost text behind their last image, being longer than asked
    left_out  rows whose images alone are longer
    unmarked  chats of which the template does not tell where answers begin: all their text is measured
    tokens    by kind, padding left out
    """

    rows: int
    images: int
    cut: int
    left_out: int
    unmarked: int
    tokens: dict[str, int]


def read_image_report(calibration: Path) -> ImageReport | None:
    """Reads what became of rows with images; None where there were none. Raises ArtifactError for a damaged file."""
    path = calibration / IMAGES
    if not path.exists():
        return None
    with reading(path, "a report of rows with images", _REMEDY):
        return cast(ImageReport, read_as(ImageReport, read_json(path)))


def read_text_report(calibration: Path) -> TextReport | None:
    """How the rows of the text were read; None where all were plain. Raises ArtifactError for a damaged file."""
    path = calibration / TEXT
    if not path.exists():
        return None
    with reading(path, "a report of the text", _REMEDY):
        return cast(TextReport, read_as(TextReport, read_json(path)))


def _tensor(
    path: Path, tensors: Mapping[str, torch.Tensor], name: str, dtype: str, dimensions: int, *, finite: bool = True
) -> torch.Tensor:
    """One tensor of a file. Raises ArtifactError naming the file unless it is there, as it should be and finite."""
    found = tensor_named(path, tensors, name)
    kind = str(found.dtype).removeprefix("torch.")
    if kind != dtype or found.dim() != dimensions or (dimensions and not found.numel()):
        raise ArtifactError(
            f"{path}: {name} is {kind} of shape {tuple(found.shape)}, should be {dtype} with {dimensions} dimensions. "
            f"{_REMEDY}"
        )
    if finite and not bool(found.isfinite().all()):
        raise ArtifactError(f"{path}: {name} holds values that are not finite. {_REMEDY}")
    return found


def write_inventory(path: Path, inventory: ModelInventory) -> None:
    """Writes the inventory as JSON in one atomic replace."""
    content = {"schema": SCHEMA, **asdict(inventory)}
    del content[_BESIDE]
    if not inventory.stored_as:
        del content["stored_as"]
        for entry in content["tensors"]:
            del entry["file_bytes"]
    write_json(path, content)


def read_inventory(path: Path) -> ModelInventory:
    """Reads the inventory back. Raises ArtifactError where it is damaged."""
    content: dict[str, Any] = read_json(path)
    with reading(path, "an inventory of this version", _REMEDY):
        take_schema(content, SCHEMA)
        if _BESIDE in content:
            raise FieldError(f"{_BESIDE} is no field of it")
        found: ModelInventory = read_as(ModelInventory, content)
        _check_inventory(found)
    return found


def _check_inventory(inventory: ModelInventory) -> None:
    """Raises FieldError for layers, counts and sizes that no model has."""
    if not 0 < inventory.num_layers <= _MOST_LAYERS:
        raise FieldError(f"num_layers is {inventory.num_layers}, should be 1 to {_MOST_LAYERS}")
    layers = [block.layer for block in inventory.expert_blocks]
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < inventory.num_layers:
        raise FieldError(
            f"expert_blocks are of the layers {shown(layers)}, should be of {inventory.num_layers} at most, ascending"
        )
    for place, block in enumerate(inventory.expert_blocks):
        sizes = [size for part in block.projections for size in (part.out_features, part.in_features)]
        if not sizes or min(sizes) < 1 or max(sizes) > _MOST_FEATURES:
            raise FieldError(f"expert_blocks[{place}].projections have the sizes {shown(sizes)}")
        if not (1 <= block.top_k <= block.num_experts <= _MOST_FEATURES):
            raise FieldError(f"expert_blocks[{place}] has top_k {block.top_k} of num_experts {block.num_experts}")
        if not (1 <= block.groups_used <= block.router_groups <= block.num_experts):
            raise FieldError(
                f"expert_blocks[{place}] has groups_used {block.groups_used} of router_groups {block.router_groups}"
            )
    for tensor in inventory.tensors:
        if min((tensor.size_bytes, *tensor.shape)) < 0 or not (
            tensor.layer is None or 0 <= tensor.layer < inventory.num_layers
        ):
            raise FieldError(
                f"the tensor {shown(tensor.name)} has shape {shown(tensor.shape)}, {tensor.size_bytes} bytes, layer "
                f"{tensor.layer}"
            )
        if tensor.packable and (len(tensor.shape) != 2 or min(tensor.shape) < 1):
            raise FieldError(f"the tensor {shown(tensor.name)} is packable, but has shape {shown(tensor.shape)}")


def read_sensitivities(calibration: Path, inventory: ModelInventory) -> dict[int, LayerSensitivity]:
    """Decoder layer -> its sensitivity; empty where no backward pass was run.

    Raises ArtifactError where the file is damaged.
    """
    path = calibration / SENSITIVITY
    if not path.exists():
        return {}
    tensors = read_tensors(path)
    for block in inventory.expert_blocks:
        prefix = f"layers.{block.layer}."
        for name in ("gradient_square", "token_scale"):
            _tensor(path, tensors, prefix + name, "float32", 1)
        if f"{prefix}choice_cost" in tensors:
            _tensor(path, tensors, f"{prefix}choice_cost", "float64", 0, finite=False)  # NaN: it cannot be told
    return {block.layer: LayerSensitivity.of(tensors, f"layers.{block.layer}.") for block in inventory.expert_blocks}
