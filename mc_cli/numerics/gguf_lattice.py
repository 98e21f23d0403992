"""The nearest points of a GGUF type to vectors of 8 or 4 weights, under a quadratic metric: compiled, or in torch.

A vector is scale * sign * point, element by element. The signs of what is wanted are tried, and each of them turned
alone; under each of these the best point is found exactly. Where points have signs of their own, there are no others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.errors import McError

EVEN, ODD, ANY = 0, 1, 2  # numbers of minuses
UNSIGNED, FIRST_HALF, SECOND_HALF = 3, 4, 5  # points have signs of their own; any of the table, or of one half of it
_ROWS_AT_ONCE = 512  # in torch: 2 MB of errors


def nearest_points(
    points: Tensor, metric: Tensor, wanted: Tensor, linear: Tensor, scales: Tensor, rules: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(index int16 [B, rows], signs uint8 [B, rows]) of the vectors of least error.

    Bit i of signs is set where element i is negative.

    points    float32 [count, length], magnitudes
    metric    float32 [B, length, length], symmetric, positive semi-definite
    wanted    float32 [B, rows, length];  linear  float32 [B, rows, length], metric times wanted, or what stands for it
    scales    float32 [B, rows]
    rules     uint8 [B, rows] of EVEN, ODD, ANY, UNSIGNED, FIRST_HALF and SECOND_HALF; None: any
    Raises McError where memory does not suffice.
    """
    search = _compiled if wanted.is_cpu and native.library() is not None else nearest_in_torch
    found = [
        search(points, metric[item], wanted[item], linear[item], scales[item], None if rules is None else rules[item])
        for item in range(len(wanted))
    ]
    return torch.stack([codes for codes, _ in found]), torch.stack([signs for _, signs in found])


def _compiled(
    points: Tensor, metric: Tensor, wanted: Tensor, linear: Tensor, scales: Tensor, rules: Tensor | None
) -> tuple[Tensor, Tensor]:
    columns, metric, wanted, linear, scales = (
        tensor.contiguous() for tensor in (points.T, metric, wanted, linear, scales)
    )
    rules = None if rules is None else rules.contiguous()
    codes = torch.empty(len(wanted), dtype=torch.int16)
    signs = torch.empty(len(wanted), dtype=torch.uint8)
    failed = native.routine("mc_lattice_search")(
        points=columns.data_ptr(),
        metric=metric.data_ptr(),
        wanted=wanted.data_ptr(),
        linear=linear.data_ptr(),
        scales=scales.data_ptr(),
        rules=None if rules is None else rules.data_ptr(),
        count=len(points),
        length=points.shape[1],
        rows=len(wanted),
        codes=codes.data_ptr(),
        signs=signs.data_ptr(),
    )
    if failed:
        raise McError("There is no memory left to search for points. Free some, or use a machine with more.")
    return codes, signs


def nearest_in_torch(
    points: Tensor, metric: Tensor, wanted: Tensor, linear: Tensor, scales: Tensor, rules: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`nearest_points` of one item, on any device."""
    found = [
        _some_rows(points, metric, wanted[part], linear[part], scales[part], None if rules is None else rules[part])
        for part in torch.arange(len(wanted), device=wanted.device).split(_ROWS_AT_ONCE)
    ]
    return torch.cat([codes for codes, _ in found]), torch.cat([signs for _, signs in found])


def _some_rows(
    points: Tensor, metric: Tensor, wanted: Tensor, linear: Tensor, scales: Tensor, rules: Tensor | None
) -> tuple[Tensor, Tensor]:
    length = points.shape[1]
    places = torch.arange(length, device=wanted.device)
    nearest = ((wanted < 0).long() << places).sum(-1)
    if rules is not None:
        nearest = torch.where(rules >= UNSIGNED, 0, nearest)
    tried = torch.cat([nearest.unsqueeze(1), nearest.unsqueeze(1) ^ 1 << places], 1)
    least = torch.full(scales.shape, torch.inf, device=wanted.device)
    codes, signs = torch.zeros_like(nearest), torch.zeros_like(nearest)
    for turn in range(tried.shape[1]):
        pattern = tried[:, turn]
        factors = 1.0 - 2.0 * (pattern.unsqueeze(1) >> places & 1)
        kinds, kind_of = pattern.unique(return_inverse=True)
        signed = points * (1.0 - 2.0 * (kinds[:, None] >> places & 1)).unsqueeze(1)
        energy = (signed @ metric * signed).sum(-1)[kind_of]
        costs = scales.square().unsqueeze(1) * energy - 2 * scales.unsqueeze(1) * ((factors * linear) @ points.T)
        if rules is not None:
            second = torch.arange(len(points), device=wanted.device) >= len(points) // 2
            wrong = (rules == FIRST_HALF).unsqueeze(1) & second | (rules == SECOND_HALF).unsqueeze(1) & ~second
            costs = costs.masked_fill(wrong, torch.inf)
        smallest, found = costs.min(1)
        if rules is not None:
            odd = (pattern.unsqueeze(1) >> places & 1).sum(1) & 1
            smallest = smallest.masked_fill((rules < ANY) & (rules != odd), torch.inf)
            if turn:
                smallest = smallest.masked_fill(rules >= UNSIGNED, torch.inf)
        better = smallest < least
        least = torch.where(better, smallest, least)
        codes, signs = torch.where(better, found, codes), torch.where(better, pattern, signs)
    return codes.to(torch.int16), signs.to(torch.uint8)
