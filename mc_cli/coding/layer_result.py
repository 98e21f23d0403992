"""The result of quantizing one layer, or the rest of the model: stored tensors, their layout, a report row each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.artifacts.quantization import MatrixReport
from mc_cli.artifacts.streamed import Pieces
from mc_cli.encodings import Encoding, encoding_for, family_of_role
from mc_cli.parts import KEPT_BITS, Role, TensorPart

PackedTensors = dict[str, torch.Tensor]  # stored part -> tensor of one matrix
PackedPieces = Mapping[str, torch.Tensor | Pieces]  # the same; what is kept is read once it is written


@dataclass
class LayerResult:
    """One quantized layer.

    linears  module path -> encoding key and tensors;  experts: projection -> (expert, block of it) -> the same
    output   [sequences, length, hidden] of the layer as it is now, where it is known
    """

    linears: dict[str, tuple[str, PackedTensors]] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, int], tuple[str, PackedPieces]]] = field(default_factory=dict)
    layout: ExpertLayout | None = None
    output: torch.Tensor | None = None
    report: list[MatrixReport] = field(default_factory=list)

    def report_kept(self, part: TensorPart, reason: str) -> None:
        """A row for a matrix that the plan packs, but that has to stay as it is."""
        path, note = part.name.rpartition(".")[0], f"{reason}; kept as in the checkpoint"
        row = MatrixReport(path, part.role.value, "kept", math.prod(part.shape), KEPT_BITS, notes=(note,))
        self.report.append(row)


class Widths(Protocol):
    """The widths of matrices that are no experts, as a plan gives them."""

    @property
    def role_bits(self) -> Mapping[Role, float]: ...

    @property
    def family(self) -> str: ...

    @property
    def group_size_limit(self) -> int: ...


def planned_encoding(
    plan: Widths, bits: float, out_features: int, in_features: int, *, role: Role = Role.EXPERT
) -> Encoding:
    """The encoding that `bits` mean in this plan for a matrix of this shape and role."""
    family = family_of_role(role, plan.family)
    return encoding_for(family, bits, out_features, in_features, group_size_limit=plan.group_size_limit)


def measured(row: MatrixReport, loss: float, energy: float, notes: tuple[str, ...]) -> MatrixReport:
    """The row with its loss, absolute and relative to `energy`, and the quantizer's notes."""
    return replace(row, proxy_loss=loss, relative_error=loss / energy if energy > 0 else 0.0, notes=notes)
