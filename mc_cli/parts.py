"""The parts of a model: roles, tensors and linears, with shapes and bytes. Knows no torch."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

KEPT_BITS = 16  # the width of what stays as in the checkpoint, whatever its dtype there
DROPPED = 0  # the width of an expert that the router does not choose, and that is not stored


class Role(enum.StrEnum):
    """The work of a tensor in the model; bit-widths and the byte account are kept per role."""

    EXPERT = "expert"  # weights of routed experts
    EXPERT_BIAS = "expert_bias"  # biases and norms inside routed experts: always kept
    ATTENTION = "attention"  # every linear of the sequence mixer: attention, MLA, linear attention, Mamba
    SHARED = "shared"  # shared experts, which every token uses
    DENSE = "dense"  # MLP of a layer without experts
    ROUTER = "router"
    HEAD = "head"
    EMBEDDING = "embedding"
    VISION = "vision"  # towers that read images or video
    AUDIO = "audio"  # towers that read sound
    PROJECTOR = "projector"  # what takes a tower's features to the decoder's hidden states
    OTHER = "other"  # norms, convolutions, scalars: always kept


BESIDE_TEXT = (Role.VISION, Role.AUDIO, Role.PROJECTOR)  # what is not the text decoder of a model that sees or hears


def read_width(text: str | float) -> float:
    """A width in bits per weight as written in a file: an int where it is whole, so that it is written back alike.

    Raises ValueError for what is no number.
    """
    width = float(text)
    return int(width) if width.is_integer() else width


@dataclass(frozen=True, order=True)
class UnitId:
    """The address of what gets a width of its own: one block of channels of one projection of one routed expert.

    layer   index of the decoder layer;  expert: index within it
    block   which run of the expert's channels; 0 where the projection is coded as a whole

    >>> str(UnitId(3, 7, "down_proj"))
    'layers.3.experts.7.down_proj'
    """

    layer: int
    expert: int
    projection: str
    block: int = 0

    def __str__(self) -> str:
        whole = f"layers.{self.layer}.experts.{self.expert}.{self.projection}"
        return f"{whole}.{self.block}" if self.block else whole


@dataclass(frozen=True)
class Projection:
    """One fused expert parameter: `name` [num_experts, out_features, in_features] once it is turned upright."""

    name: str  # gate_up_proj, up_proj or down_proj
    out_features: int
    in_features: int

    @property
    def weight_count(self) -> int:
        """Weights of one expert in this projection."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ExpertBlock:
    """The routed experts of one decoder layer."""

    layer: int
    path: str  # module path of the experts, for example model.layers.3.mlp.experts
    router_path: str
    num_experts: int
    top_k: int
    projections: tuple[Projection, ...]
    router_groups: int = 1  # equal runs of experts, of which a token's experts come from `groups_used`
    groups_used: int = 1

    @property
    def weights_per_expert(self) -> int:
        return sum(projection.weight_count for projection in self.projections)

    @property
    def channels(self) -> int:
        """Intermediate channels of a whole expert: what its down projection takes in."""
        return self.projections[-1].in_features

    def shape_of(self, projection: str, channels: int) -> tuple[int, int]:
        """(out_features, in_features) of one projection of a block of so many channels: the shape of a unit."""
        return block_shape(
            {part.name: (part.out_features, part.in_features) for part in self.projections}, projection, channels
        )


def block_shape(whole: Mapping[str, tuple[int, int]], projection: str, channels: int) -> tuple[int, int]:
    """(out_features, in_features) of one projection of a block of channels.

    whole  projection -> shape in a whole expert, the up projection first. Each channel takes as many rows of the up
           projection as there are for it (two where there is a gate), and one column of the down projection
    """
    names = list(whole)
    out_features, in_features = whole[projection]
    if projection == names[-1]:
        return out_features, channels
    return out_features // whole[names[-1]][1] * channels, in_features


def survivor_floors(num_experts: int, top_k: int, groups: int, groups_used: int) -> tuple[tuple[range, int], ...]:
    """(experts, how many of them have to stay) of one layer, so that a token always finds its top-k.

    A router without groups needs top-k of all. One with groups picks `groups_used` of them first, whichever they are,
    so that each has to hold its part of the top-k.
    """
    if groups <= 1:
        return ((range(num_experts), top_k),)
    size = num_experts // groups
    return tuple((range(group * size, (group + 1) * size), -(-top_k // groups_used)) for group in range(groups))


def too_few_survivors(
    dropped: Collection[int], num_experts: int, top_k: int, groups: int = 1, groups_used: int = 1
) -> list[str]:
    """The reasons against dropping these experts of one layer, one phrase per floor that is not kept."""
    found = []
    for members, least in survivor_floors(num_experts, top_k, groups, groups_used):
        left = sum(expert not in dropped for expert in members)
        if left < least:
            of = "" if groups <= 1 else f" of the router's group {members.start} to {members.stop - 1}"
            found.append(f"{left} experts{of} stay, but a token needs {least}")
    return found


@dataclass(frozen=True)
class TensorPart:
    """One parameter or persistent buffer of the model, by its module-tree name."""

    name: str
    role: Role
    layer: int | None  # None outside the decoder layers
    shape: tuple[int, ...]
    dtype: str  # as stored when kept: "bfloat16", "float32", ...
    size_bytes: int  # stored size when kept
    packable: bool = False  # the 2-D weight of a torch.nn.Linear, of a router, or of the token embedding
    file_bytes: int | None = None  # in the checkpoint's files; None: as many as when kept


@dataclass(frozen=True)
class ModelInventory:
    """Every tensor of a model and its expert blocks: enough to plan bytes without touching a weight.

    directory_bytes   of what a result holds beside its weights, at most; known where the model's folder is at hand, and
                      not part of the inventory that lies on disk
    """

    model_type: str
    num_layers: int
    expert_blocks: tuple[ExpertBlock, ...]
    tensors: tuple[TensorPart, ...]
    tied_head: bool
    contract_tested: bool = True
    stored_as: Mapping[str, int] = field(default_factory=dict)  # how tensors are coded in the files -> how many are
    directory_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """Bytes of the tensors in the checkpoint's files, where those of 8 bits and less take less than kept ones."""
        return sum(each.size_bytes if each.file_bytes is None else each.file_bytes for each in self.tensors)

    def bytes_by_role(self) -> dict[Role, int]:
        """Stored bytes of the unquantized model, per role."""
        total: dict[Role, int] = {}
        for tensor in self.tensors:
            total[tensor.role] = total.get(tensor.role, 0) + tensor.size_bytes
        return total

    @property
    def layers_with_expert_biases(self) -> frozenset[int]:
        """Layers in which biases or norms belong to whole experts: these are not cut, halved or merged."""
        return frozenset(
            part.layer for part in self.tensors if part.role is Role.EXPERT_BIAS and part.layer is not None
        )

    @property
    def expert_weight_count(self) -> int:
        return sum(block.num_experts * block.weights_per_expert for block in self.expert_blocks)
