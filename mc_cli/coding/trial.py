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
from mc_cli.numerics.products import filled

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
    refit = Refit(inputs, expert, *down.shape)
    forecast_errors = [torch.zeros(len(down), dtype=torch.float64, device=down.device) for _ in refit.halves]
    for chunk in inputs.chunks(expert, limit=TRIAL_TOKENS):
        activated = [
            expert_activations(module, expert, chunk.inputs, up) * chunk.weights[:, None]
            for up in (original, forecast, shipped)
        ]
        for number, rows in enumerate(refit.next_rows(len(chunk.inputs))):
            whole, forecast_rows, shipped_rows = (each[rows] for each in activated)
            refit.halves[number].add(shipped_rows, (whole - shipped_rows) @ down.T)
            forecast_errors[number] += ((whole - forecast_rows) @ down.T).square().sum(0, dtype=torch.float64)
    forecast_loss = sum(float(refit.felt @ errors) for errors in forecast_errors)
    return refit.left() / forecast_loss if forecast_loss > 0 else 1.0


class Refit:
    """A correction of one expert's down projection, made on half of its tokens and judged on the other, both ways.

    halves  sums over the first and the second half of at most TRIAL_TOKENS tokens, to be added to in their order
    felt    float64 [hidden]: what a squared error of each output feature matters
    """

    def __init__(self, inputs: ExpertInputs, expert: int, hidden: int, channels: int) -> None:
        self.halves = (Half(hidden, channels, inputs.device), Half(hidden, channels, inputs.device))
        felt = torch.ones(hidden) if inputs.sensitivity is None else inputs.sensitivity.gradient_square
        self.felt = felt.to(inputs.device, torch.float64)
        self._trusted = inputs.count(expert)
        self._first = inputs.count(expert, limit=TRIAL_TOKENS) // 2  # tokens that the first half still takes

    def next_rows(self, count: int) -> tuple[slice, slice]:
        """The rows of the next so many tokens that belong to each half."""
        cut = max(0, self._first)
        self._first -= count
        return slice(cut), slice(cut, None)

    def left(self) -> float:
        """The loss that is left of each half with the correction that the other one asks for, both together."""
        steps = reversed([half.step(trusted=self._trusted) for half in self.halves])
        return sum(float(self.felt @ half.left(step)) for half, step in zip(self.halves, steps, strict=True))


class Half:
    """Sums over one half of an expert's tokens, for a fit that is made on one half and judged on the other."""

    def __init__(self, hidden: int, channels: int, device: torch.device) -> None:
        self._hessian = torch.zeros((channels, channels), device=device)
        self._moments = torch.zeros((hidden, channels), device=device)
        self.missing = torch.zeros(hidden, dtype=torch.float64, device=device)  # squares

    def add(self, activated: torch.Tensor, missing: torch.Tensor) -> None:
        """Activations [n, channels] and what is missing of the outputs [n, hidden] at the same tokens, weighted."""
        self.missing += missing.square().sum(0, dtype=torch.float64)
        self._moments.addmm_(filled(missing).T, filled(activated))
        accumulate(self._hessian, activated)

    def step(self, *, trusted: int) -> torch.Tensor:
        """[hidden, channels]: the correction that these tokens ask for, trusted as so many are."""
        return correction(self._moments, self._hessian, tokens=trusted)

    def left(self, step: torch.Tensor) -> torch.Tensor:
        """float64 [hidden]: squared errors with `step` added to the down projection."""
        step = step.double()
        taken = step * (2 * self._moments.double() - step @ self._hessian.double())
        return self.missing - taken.sum(-1)
