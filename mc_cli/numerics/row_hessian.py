"""The output side of a matrix's loss: how errors of different rows add up, and how one row makes good for another's.

With a Hessian A of the inputs and a Hessian C of the outputs, errors E [out, in] cost trace(C E A E^T): the Kronecker
factored second derivative of the loss. Rows are then no longer independent: as errors of one input are fed into later
inputs by the factor of A, errors of one row can be fed into later rows by the factor of C.
Source of the idea: YAQA, Tseng et al. 2025, arXiv:2505.22988; GuidedQuant, Kim et al. 2025, arXiv:2505.07004 (gradients
of the loss in layerwise Hessians).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 0.01  # this part of a block's mean diagonal is added to it, as for inputs


@dataclass(frozen=True)
class RowHessian:
    """The weight of errors of a matrix's rows, alone and together; rows of different groups count as unrelated.

    blocks  float32 [B, groups, n, n], symmetric, positive semidefinite: of the n rows of each group
    rows    int64 [groups, n], which rows those are, in the order they are coded; every row, padding included, once
    """

    blocks: Tensor
    rows: Tensor

    def diagonal(self) -> Tensor:
        """float32 [B, all rows]: what a squared error of each row matters by itself."""
        return self.ungrouped(self.blocks.diagonal(dim1=-2, dim2=-1))

    def grouped(self, rows: Tensor) -> Tensor:
        """[B, groups, n] of [B, all rows]."""
        return rows[:, self.rows]

    def ungrouped(self, grouped: Tensor) -> Tensor:
        """[B, all rows] of [B, groups, n]: the inverse of `grouped`."""
        return torch.empty_like(grouped.flatten(1)).index_copy_(1, self.rows.flatten(), grouped.flatten(1))


def eliminated(hessian: Tensor, *, piece: int) -> tuple[Tensor, Tensor]:
    """(feedback [..., n, n], pivots [..., n]) float32 of the damped Hessian, for rows that are coded piece after piece.

    hessian  float32 [..., n, n], symmetric, positive semidefinite; not modified
    piece    rows that are coded together; the last piece may be shorter

    hessian = U D U^T with U unit upper and D diagonal by blocks of `piece` rows, the last piece eliminated first. So
    e^T hessian e = sum over pieces p of f^T D_p f, f = e_p + sum over earlier pieces r of U_rp^T e_r: each piece does
    best to aim at minus what the sum over earlier pieces' errors is. `feedback` is U without its diagonal of ones (a
    row e_r, a column e_p), `pivots` is the diagonal of D.
    """
    left = hessian.double()
    size = left.shape[-1]
    mean = left.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    left = left + (_DAMPING * mean + torch.finfo(torch.float32).tiny) * torch.eye(size, device=left.device).double()
    feedback = torch.zeros_like(left)
    for first in range((size - 1) // piece * piece, 0, -piece):
        last = min(first + piece, size)
        across = left[..., first:last, :first]
        feedback[..., :first, first:last] = torch.linalg.solve(left[..., first:last, first:last], across).mT
        left[..., :first, :first] -= feedback[..., :first, first:last] @ across
    return feedback.float(), left.diagonal(dim1=-2, dim2=-1).float()


def best_scales(blocks: Tensor, coded: Tensor, wanted: Tensor) -> Tensor:
    """float64 [B, n]: the scales of rows that leave the least error, all rows of a group together.

    blocks  [B, n, n] Hessian of the rows
    coded   [B, n, n] values hessian values^T, under the Hessian of the inputs
    wanted  [B, n, n] values hessian weights^T; a column is a row of the weights
    The loss trace(blocks E hessian E^T), E = weights - scales * values, is quadratic in the scales.
    """
    system = blocks.double() * coded.double()
    mean = system.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    size = system.shape[-1]
    system = system + (1e-6 * mean + torch.finfo(torch.float32).tiny) * torch.eye(size, device=system.device).double()
    solved: torch.Tensor = torch.linalg.solve(system, (blocks.double() * wanted.double()).sum(-1))
    return solved
