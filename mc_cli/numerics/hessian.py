"""Second moments of a layer's inputs, and the triangular factor that error propagation needs. All batched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mc_cli.errors import McError, ShapeError
from mc_cli.numerics.finite import is_finite
from mc_cli.numerics.products import fast_float32_products, filled

FLOAT64_LIMIT = 8192  # in_features up to which factors are computed in float64: 0.5 GB a matrix
_TOKENS_AT_ONCE = 4096
_LARGEST_DAMPING = 10.0  # times the mean diagonal: a matrix that this does not make positive definite is not a Hessian


def accumulate(hessian: Tensor, inputs: Tensor, weights: Tensor | None = None) -> None:
    """Add sum over tokens of weight^2 x x^T to `hessian`, in place, in float32.

    hessian  [in_features, in_features] float32; modified
    inputs   [tokens, in_features], any float dtype; zero tokens change nothing
    weights  [tokens] or None for ones: what each token's output is multiplied by, for example the routing weight
    Raises ShapeError where shapes or the Hessian's dtype do not fit.
    """
    if hessian.dtype != torch.float32 or inputs.ndim != 2 or hessian.shape != (inputs.shape[1],) * 2:
        raise ShapeError(
            f"inputs {tuple(inputs.shape)} do not accumulate into a Hessian {tuple(hessian.shape)} of {hessian.dtype}; "
            "it must be float32 [in_features, in_features]"
        )
    if weights is not None and weights.shape != inputs.shape[:1]:
        raise ShapeError(f"{tuple(weights.shape)} token weights for {inputs.shape[0]} tokens")
    for start in range(0, inputs.shape[0], _TOKENS_AT_ONCE):
        rows = inputs[start : start + _TOKENS_AT_ONCE].to(torch.float32)
        if weights is not None:
            rows = rows * weights[start : start + _TOKENS_AT_ONCE, None].to(torch.float32)
        rows = filled(rows)
        hessian.addmm_(rows.T, rows)


def shrink(hessian: Tensor, pooled: Tensor, *, token_count: Tensor, strength: float) -> Tensor:
    """Each Hessian moved towards the pooled one, the more the fewer tokens it has seen; a new tensor.

    hessian      [B, in_features, in_features] float32, sums over each expert's own tokens; not modified
    pooled       [in_features, in_features] float32, the sum over all experts; not modified
    token_count  [B] tokens behind each Hessian
    strength     in tokens: an expert that saw this many gets half its estimate from the pool; 0 changes nothing

    With lambda = strength / (strength + token_count) the result is (1 - lambda) * hessian + lambda * pooled *
    trace(hessian) / trace(pooled), so that the pool lends its shape only and losses keep the expert's own scale.
    A Hessian of trace zero (no tokens) has no scale to keep: it becomes the pooled one as it is.
    """
    token_count = token_count.to(hessian.device, torch.float32)
    own_trace = hessian.diagonal(dim1=-2, dim2=-1).sum(-1)
    pooled_trace = pooled.diagonal().sum()
    seen = own_trace > 0
    share = torch.where(seen, strength / (strength + token_count).clamp_min(1e-30), 1.0)
    ratio = torch.where(seen, own_trace / pooled_trace.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return hessian * (1 - share)[:, None, None] + pooled * (share * ratio)[:, None, None]


@dataclass(frozen=True)
class InverseFactor:
    """The upper triangular U with (hessian + damping * mean diagonal * I)^-1 = U^T U, per batch item."""

    factor: Tensor  # [B, in_features, in_features] float32, zero below the diagonal
    damping: tuple[float, ...]  # per item, the fraction of the mean diagonal that was really added
    notes: tuple[str, ...]  # "item 3: ..." for every item without data, with dead inputs or with raised damping


def inverse_cholesky(hessian: Tensor, *, damping: float) -> InverseFactor:
    """The upper Cholesky factor of the damped inverse, in float64 inside up to FLOAT64_LIMIT inputs.

    hessian  [B, in_features, in_features] float32, symmetric positive semi-definite; not modified
    damping  fraction of mean(diag(hessian)) added to the diagonal

    An item that is not positive definite is damped ten times more until it is. Inputs that were always zero are left
    with the damping, so that they are rounded on their own; an all-zero Hessian counts as the identity.
    Raises McError for non-finite Hessians and for matrices that no damping makes positive definite.
    """
    if not is_finite(hessian):
        raise McError("a Hessian holds non-finite values: the inputs of that layer overflowed during calibration")
    factor = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    used: list[float] = []
    notes: list[str] = []
    for item, matrix in enumerate(hessian):  # one by one: the float64 copies of a stack of experts need not fit
        reached, found = _factor_into(factor[item], matrix, damping)
        used.append(reached)
        notes.extend(f"item {item}: {note}" for note in found)
    return InverseFactor(factor, tuple(used), tuple(notes))


def _factor_into(factor: Tensor, hessian: Tensor, damping: float) -> tuple[float, list[str]]:
    """Fill `factor` for one `hessian` [in_features, in_features]; the damping it took, and what to report."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean(dtype=torch.float64))
    dead = int((diagonal <= 0).sum())
    if dead == len(diagonal):
        factor.zero_().diagonal().fill_((1 + damping) ** -0.5)
        return damping, ["no calibration data, rounded without error propagation"]
    notes = [f"{dead} of {len(diagonal)} inputs were zero on every token, rounded on their own"] if dead else []
    reached = damping
    while not _invert_into(factor, hessian, reached * mean):
        reached = max(10 * reached, 1e-4)
        if reached > _LARGEST_DAMPING:
            raise McError(
                f"a Hessian is not positive semi-definite even with {reached / 10:g} of its mean diagonal added"
            )
    if reached > damping:
        notes.append(f"singular Hessian, damping raised from {damping:g} to {reached:g} of the mean diagonal")
    return reached, notes


def _invert_into(factor: Tensor, hessian: Tensor, added: float) -> bool:
    """Fill `factor` with U for `hessian + added * I`; False where that is not positive definite.

    With hessian = R R^T and R upper triangular, U is the inverse of R; R is the Cholesky factor of the matrix read
    backwards. That takes one factorisation and one triangular solve, and never the inverse of the Hessian itself.
    """
    dtype = torch.float64 if len(hessian) <= FLOAT64_LIMIT else torch.float32
    # Column by column, as the library wants it: so it works in place, with matrices that may take gigabytes.
    lower = torch.empty_like(hessian, dtype=dtype, memory_format=torch.contiguous_format).mT
    lower.copy_(hessian.flip(0, 1)).diagonal().add_(added)
    info = torch.zeros((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info):
        return False
    inverse = torch.eye(len(hessian), dtype=dtype, device=hessian.device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    factor.copy_(inverse.flip(0, 1))
    return is_finite(factor)


def least_squares(moments: Tensor, hessian: Tensor, *, damping: float) -> Tensor:
    """The weights S, float32 [out_features, in_features], that minimise trace(S H S^T) - 2 trace(S moments^T).

    moments  [out_features, in_features] float32, sum over tokens of wanted output times input; not modified
    hessian  [in_features, in_features] float32, symmetric positive semi-definite; not modified
    damping  fraction of mean(diag(hessian)) added to its diagonal: H is the sum

    Up to FLOAT64_LIMIT inputs it computes in float64. A Hessian of zeros gives zeros. Raises McError where the system
    cannot be solved: values that are not finite.
    """
    mean = float(hessian.diagonal().mean(dtype=torch.float64))
    if mean == 0:
        return torch.zeros_like(moments)
    dtype = torch.float64 if len(hessian) <= FLOAT64_LIMIT else torch.float32
    damped = hessian.to(dtype, copy=True)
    damped.diagonal().add_(damping * mean)
    lower, info = torch.linalg.cholesky_ex(damped)
    solution = torch.cholesky_solve(moments.mT.to(dtype), lower).mT.float()
    if int(info) or not bool(torch.isfinite(solution).all()):
        raise McError(
            "a layer's inputs overflowed during calibration: no linear system can be solved with their Hessian"
        )
    return solution.contiguous()


def trace_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """float64 [B]: trace(D hessian D^T), the summed squared output error over the tokens behind the Hessian.

    difference  D, float32 [B, out_features, in_features]: weight minus what replaces it
    hessian     float32 [B or 1, in_features, in_features]
    """
    with fast_float32_products():
        if hessian.shape[0] == 1:
            product: Tensor = (difference.flatten(0, 1) @ hessian[0]).unflatten(0, difference.shape[:2])
        else:
            product = torch.bmm(difference, hessian)
    return product.mul_(difference).sum(-1, dtype=torch.float64).sum(-1)
