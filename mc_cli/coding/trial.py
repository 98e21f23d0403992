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
    hidden, channels = down.shape
    halves = (Half(hidden, channels, down.device), Half(hidden, channels, down.device))
    forecast_errors = [torch.zeros(len(down), dtype=torch.float64, device=down.device) for _ in halves]
    border = inputs.count(expert, limit=TRIAL_TOKENS) // 2
    seen = 0
    for chunk in inputs.chunks(expert, limit=TRIAL_TOKENS):
        activated = [
            expert_activations(module, expert, chunk.inputs, up) * chunk.weights[:, None]
            for up in (original, forecast, shipped)
        ]
        cut = max(0, border - seen)
        for number, rows in enumerate((slice(cut), slice(cut, None))):
            whole, forecast_rows, shipped_rows = (each[rows] for each in activated)
            halves[number].add(shipped_rows, (whole - shipped_rows) @ down.T)
            forecast_errors[number] += ((whole - forecast_rows) @ down.T).square().sum(0, dtype=torch.float64)
        seen += len(chunk.inputs)
    felt = torch.ones(len(down)) if inputs.sensitivity is None else inputs.sensitivity.gradient_square
    felt = felt.to(down.device, torch.float64)
    forecast_loss = sum(float(felt @ errors) for errors in forecast_errors)
    if forecast_loss <= 0:
        return 1.0
    steps = [half.step(trusted=inputs.count(expert)) for half in halves]
    left = sum(float(felt @ half.left(step)) for half, step in zip(halves, reversed(steps), strict=True))
    return left / forecast_loss


class Half:
    """Sums over one half of an expert's tokens, for a fit that is made on one half and judged on the other."""

    def __init__(self, hidden: int, channels: int, device: torch.device) -> None:
        self._hessian = torch.zeros((channels, channels), device=device)
        self._moments = torch.zeros((hidden, channels), device=device)
        self.missing = torch.zeros(hidden, dtype=torch.float64, device=device)  # squares

    def add(self, activated: torch.Tensor, missing: torch.Tensor) -> None:
        """Activations [n, channels] and what is missing of the outputs [n, hidden] at the same tokens, weighted."""
        self.missing += missing.square().sum(0, dtype=torch.float64)
        self._moments.addmm_(missing.T, activated)
        accumulate(self._hessian, activated)

    def step(self, *, trusted: int) -> torch.Tensor:
        """[hidden, channels]: the correction that these tokens ask for, trusted as so many are."""
        return correction(self._moments, self._hessian, tokens=trusted)

    def left(self, step: torch.Tensor) -> torch.Tensor:
        """float64 [hidden]: squared errors with `step` added to the down projection."""
        step = step.double()
        taken = step * (2 * self._moments.double() - step @ self._hessian.double())
        return self.missing - taken.sum(-1)
