"""The routed experts of a resident layer as coding sees them, from which score and quantize make the same jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mc_cli.coding.expert_inputs import Chunk, ExpertInputs, down_hessians, pooled_share, up_hessians
from mc_cli.coding.row_importance import down_importance, down_row_hessian, up_importance, up_row_hessian
from mc_cli.encodings import Encoding
from mc_cli.models import experts
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.parts import Projection, UnitId
from mc_cli.quantizers import Quantizer
from mc_cli.quantizers.job import CodingJob, InputMoments

Watch = Callable[[int, Chunk, torch.Tensor], None]


@dataclass(frozen=True)
class ExpertView:
    """Weights, input moments and row importance of some experts at a time.

    module      the layer's experts; their weights are read as they are when asked for
    shrinkage   tokens per input feature at which an expert's Hessian and the layer's pool weigh the same
    covariance  [hidden, hidden] of the loss's gradient at the MoE output, None where it is not known
    """

    module: Any
    inputs: ExpertInputs
    quantizer: Quantizer
    shrinkage: float
    covariance: torch.Tensor | None = None

    @property
    def up(self) -> Projection:
        return self.inputs.block.projections[0]

    @property
    def down(self) -> Projection:
        return self.inputs.block.projections[1]

    def units(self, part: Projection, members: list[int], block: int = 0) -> tuple[UnitId, ...]:
        return tuple(UnitId(self.inputs.block.layer, expert, part.name, block) for expert in members)

    def weights(self, part: Projection, members: list[int]) -> torch.Tensor:
        """float32 [members, out_features, in_features], a copy."""
        return experts.stacked_weights(self.module, part.name, members)

    def up_moments(self, members: list[int]) -> InputMoments:
        return InputMoments(up_hessians(self.inputs, members, strength=self.shrinkage))

    def down_moments(
        self, members: list[int], up_weights: torch.Tensor | None = None, *, watch: Watch | None = None
    ) -> InputMoments:
        """Moments of the activations that the up projections give, as they are now or as in `up_weights`."""
        up_weights = self.weights(self.up, members) if up_weights is None else up_weights
        strength = self.shrinkage
        return InputMoments(
            down_hessians(self.module, self.inputs, members, up_weights, strength=strength, watch=watch)
        )

    def pooled_share(self, part: Projection, expert: int) -> float:
        """The weight of the layer's pool in the moments of one expert."""
        return pooled_share(self.inputs.count(expert), part.in_features, strength=self.shrinkage)

    def importance(self, part: Projection, members: list[int]) -> torch.Tensor | None:
        """[members, out_features]: what errors of each row matter by themselves; None without a backward pass."""
        if self.inputs.sensitivity is None:
            return None
        if part is self.down:
            return down_importance(self.inputs, members)
        return up_importance(self.module, self.inputs, members, *self._both_weights(members))

    def joint_importance(
        self, part: Projection, members: list[int], encoding: Encoding, rows: torch.Tensor | None = None
    ) -> torch.Tensor | RowHessian | None:
        """The weight of errors of rows, jointly, or each by itself where quantizer or calibration have no more.

        rows  int64, of the up projection, where a block of channels is coded; None: all
        """
        groups = None
        if self.inputs.sensitivity is not None and self.covariance is not None:
            groups = self.quantizer.row_groups(encoding, part.out_features if rows is None else len(rows))
        if groups is None or self.covariance is None:
            alone = self.importance(part, members)
            return alone if alone is None or rows is None else alone[:, rows]
        groups = groups.to(self.inputs.device)
        if part is self.down:
            return down_row_hessian(self.inputs, members, self.covariance, groups)
        both = self._both_weights(members)
        return up_row_hessian(self.module, self.inputs, members, *both, self.covariance, groups, rows)

    def job(
        self,
        part: Projection,
        members: list[int],
        moments: InputMoments,
        encoding: Encoding,
        *,
        weights: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        block: int = 0,
    ) -> CodingJob:
        """The job that codes one projection of some experts, or of a block of their channels, as it ships.

        weights  float32 [members, out_features, in_features] in place of what the module holds
        rows     int64, which rows of the up projection these are; None: all
        block    number of the block
        """
        weights = self.weights(part, members) if weights is None else weights
        importance = self.joint_importance(part, members, encoding, rows)
        return CodingJob(self.units(part, members, block), weights, moments, encoding, self.quantizer, importance)

    def forecast(
        self,
        part: Projection,
        members: list[int],
        moments: InputMoments,
        encoding: Encoding,
        *,
        weights: torch.Tensor,
        importance: torch.Tensor | None,
    ) -> CodingJob:
        """The job that tells how large the errors of one projection of some experts will be."""
        units = self.units(part, members)
        return CodingJob(units, weights, moments, encoding, self.quantizer, importance, forecast=True)

    def _both_weights(self, members: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights(self.up, members), self.weights(self.down, members)
