"""One matrix in place of several: means, means on shared singular directions, and pairs that share magnitudes.

Matrices of one cluster are [members, out_features, in_features]. Everything is computed in the dtype that is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.errors import McError


def weighted_mean(matrices: Tensor, shares: Tensor) -> Tensor:
    """[out_features, in_features]: the mean of `matrices` by `shares` [members], which sum to 1."""
    return (shares.to(matrices)[:, None, None] * matrices).sum(0)


def mean_on_shared_directions(matrices: Tensor, shares: Tensor, *, directions: int) -> Tensor:
    """[out_features, in_features]: Sub-MoE's merged matrix, of as many singular directions.

    The matrices side by side have the decomposition U S [V1; V2; ..]^T; the merged one is U S V^T with V the mean of
    the V_i by `shares`. Since U S V_i^T is matrix i's projection on the columns of U, that is the projection of the
    weighted mean on the leading left singular vectors, which are eigenvectors of sum_i W_i W_i^T. With all
    directions it is the weighted mean itself.
    Source: Sub-MoE, arXiv:2506.23266, whose V are merged by routing frequency.
    """
    mean = weighted_mean(matrices, shares)
    if directions >= mean.shape[0]:
        return mean
    product = (matrices @ matrices.mT).sum(0)
    leading = torch.linalg.eigh(product).eigenvectors[:, -directions:]
    projected: Tensor = leading @ (leading.mT @ mean)
    return projected


def fitted_towards(start: Tensor, moments: Tensor, products: Tensor, *, ridge: float) -> Tensor:
    """[out_features, in_features] D that minimises sum |target - D h|^2 + ridge * mean(diag(products)) * |D - start|^2.

    start     [out_features, in_features];  moments  [out_features, in_features], sum over tokens of target h^T
    products  [in_features, in_features], sum of h h^T
    Activations of zeros leave `start`. Raises McError where the system has no finite solution.
    """
    mean = float(products.diagonal().mean())
    if mean == 0:
        return start.clone()
    damped = products.clone()
    damped.diagonal().add_(ridge * mean)
    lower, info = torch.linalg.cholesky_ex(damped)
    step = torch.cholesky_solve((moments - start @ products).mT, lower).mT
    if int(info) or not bool(torch.isfinite(step).all()):
        raise McError(
            "Merged down projections cannot be fitted: the activations of a cluster are not finite, or with so few "
            "tokens have no inverse. Calibrate on more text, or choose another --merge."
        )
    return start + step


def shared_magnitudes(
    first: Tensor, second: Tensor, first_norms: Tensor, second_norms: Tensor, *, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(first, second) as PuzzleMoE makes them of a pair of matrices, and [2] the shares of their weights left non-zero.

    first, second   [out_features, in_features];  *_norms  [in_features], L2 norms of each one's input features
    threshold       where | |A| - |B| | / (|A| + |B|) is at most this, both have the mean magnitude with their own
                    signs; elsewhere the one whose |weight| * norm is larger keeps its weight, the other has 0
    Source: PuzzleMoE, arXiv:2511.04805.
    """
    large, small = first.abs(), second.abs()
    both = large + small
    alike = (large - small).abs() <= threshold * both
    keeps_first = large * first_norms >= small * second_norms
    mean = both / 2
    merged = torch.where(alike, mean, torch.where(keeps_first, large, small))
    one = first.sign() * merged * (alike | keeps_first)
    other = second.sign() * merged * (alike | ~keeps_first)
    left = torch.stack([(matrix != 0).double().mean() for matrix in (one, other)])
    return one, other, left
