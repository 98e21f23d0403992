"""The part of an up projection's forecast error that is left once it ships: one expert of a layer is quantized.

A forecast draws errors row by row. The shipped matrix is better by two things that no forecast of single matrices
sees: errors are fed into later rows, and the down projection makes good for part of what is left. The gain depends on
the activation and on how many channels there are for a hidden feature, so it is measured.
"""

from __future__ import annotations

from typing import Any

import torch

from mc_cli.coding.correction import correction
from mc_cli.coding.expert_inputs import ExpertInputs, expert_activations
from mc_cli.numerics.hessian import accumulate

TRIAL_TOKENS = 6144  # the most tokens of the expert that are used


def share_left(
    module: Any,
    inputs: ExpertInputs,
    expert: int,
    *,
    original: torch.Tensor,
    forecast: torch.Tensor,
    shipped: torch.Tensor,
    down: torch.Tensor,
) -> float:
    """The loss left with `shipped`, the down projection fitted to it, over that with `forecast` and none fitted.

    original, forecast, shipped  [rows, hidden] float32, up projections of one expert;  down [hidden, channels]
    The fit is made on half of the expert's tokens and judged on the other half, both ways.
    1 where the expert has no tokens, or the forecast no error.
    """
    halves = (_Half(down), _Half(down))
    border = inputs.count(expert, limit=TRIAL_TOKENS) // 2
    seen = 0
    for chunk in inputs.chunks(expert, limit=TRIAL_TOKENS):
        activated = [
            expert_activations(module, expert, chunk.inputs, up) * chunk.weights[:, None]
            for up in (original, forecast, shipped)
        ]
        cut = max(0, border - seen)
        halves[0].add(*(rows[:cut] for rows in activated))
        halves[1].add(*(rows[cut:] for rows in activated))
        seen += len(chunk.inputs)
    felt = torch.ones(len(down)) if inputs.sensitivity is None else inputs.sensitivity.gradient_square
    felt = felt.to(down.device, torch.float64)
    forecast_loss = sum(float(felt @ half.forecast) for half in halves)
    if forecast_loss <= 0:
        return 1.0
    steps = [half.step(trusted=inputs.count(expert)) for half in halves]
    left = sum(float(felt @ half.left(step)) for half, step in zip(halves, reversed(steps), strict=True))
    return left / forecast_loss


class _Half:
    """Sums over one half of the tokens."""

    def __init__(self, down: torch.Tensor) -> None:
        hidden, channels = down.shape
        self._down = down
        self._hessian = torch.zeros((channels, channels), device=down.device)
        self._moments = torch.zeros_like(down)
        self._shipped = torch.zeros(hidden, dtype=torch.float64, device=down.device)
        self.forecast = torch.zeros_like(self._shipped)  # [hidden] squared errors

    def add(self, original: torch.Tensor, forecast: torch.Tensor, shipped: torch.Tensor) -> None:
        """Activations [n, channels] of the same tokens, weighted."""
        missing = (original - shipped) @ self._down.T
        self.forecast += ((original - forecast) @ self._down.T).square().sum(0, dtype=torch.float64)
        self._shipped += missing.square().sum(0, dtype=torch.float64)
        self._moments.addmm_(missing.T, shipped)
        accumulate(self._hessian, shipped)

    def step(self, *, trusted: int) -> torch.Tensor:
        """[hidden, channels]: the correction that these tokens ask for, trusted as so many are."""
        return correction(self._moments, self._hessian, tokens=trusted)

    def left(self, step: torch.Tensor) -> torch.Tensor:
        """float64 [hidden]: squared errors with `step` added to the down projection."""
        step = step.double()
        taken = step * (2 * self._moments.double() - step @ self._hessian.double())
        return self._shipped - taken.sum(-1)
