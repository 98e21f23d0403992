"""The cost of coding the channels that a cut leaves, beside that of coding the whole expert.

An expert's unimportant channels help to code the others: rotations spread them among each other, the search takes bits
from unimportant rows for important neighbours, and errors are fed into inputs that carry little. Where channels differ
most, so that many can be cut for little, most of that goes with them. On experts of 128 channels, half of them cut,
down projections lost 1.1 to 2.9 times what they lost whole, where the energy that was left said 0.8 to 1.4. So it is
measured, by the forecasts that the widths of whole experts are measured by, at one width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mc_cli.coding.channel_order import channel_energy, dealt
from mc_cli.coding.expert_inputs import Sample, expert_activations, expert_chunks
from mc_cli.coding.expert_view import ExpertView
from mc_cli.encodings import deals_channels, encoding_for
from mc_cli.errors import ShapeError
from mc_cli.models.expert_gates import rows_by_channel, rows_of_block
from mc_cli.parts import Projection
from mc_cli.quantizers.job import Coded, CodingJob, Executor, InputMoments

# Nats per token that a change of an expert's output [tokens, hidden] on a sample of tokens is expected to cost.
Cost = Callable[[torch.Tensor, Sample], float]
Ratios = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Forecasts:
    """The means by which a layer's experts are coded on trial.

    width             bits per weight;  family, group_size: what they mean
    tokens            the most of an expert's tokens on which errors are measured
    """

    view: ExpertView
    executor: Executor
    width: float
    family: str
    group_size: int
    tokens: int
    cost: Cost


@torch.no_grad()
def coded_left(by: Forecasts, order: torch.Tensor, borders: list[int]) -> tuple[Ratios, Ratios]:
    """([experts, borders] of the up projections, the same of the down projections): cost of what is left over whole.

    order  int64 [experts, channels], the most important channel of each expert first
    0 at border 0. 1 for borders whose channels cannot be coded at this width, and for experts whose coding costs
    nothing, as those that no token reaches.
    """
    block = by.view.inputs.block
    channels = [*borders, block.channels]
    found = np.zeros((2, block.num_experts, len(channels)))
    for members in expert_chunks(block):
        trial = _Trial(by, order, members)
        for place, count in enumerate(channels):
            if count:
                found[:, members, place] = trial.costs(count)
    whole = found[:, :, -1:]
    left = np.isfinite(found) & (whole > 0)
    ratios = np.divide(found, whole, out=np.ones_like(found), where=left)[:, :, :-1].astype(np.float32)
    ratios[:, :, [place for place, count in enumerate(borders) if not count]] = 0
    return ratios[0], ratios[1]


@torch.no_grad()
def coded_whole(by: Forecasts, members: list[int]) -> npt.NDArray[np.float64]:
    """[2, members]: what coding the up and the down projection of whole experts costs at the trial's width.

    Infinite where they cannot be coded. Experts are as they are in the view's module; not more than fit memory.
    """
    channels = by.view.inputs.block.channels
    return _Trial(
        by, torch.arange(channels, device=by.view.inputs.device).expand(by.view.inputs.block.num_experts, -1), members
    ).costs(channels)


class _Trial:
    """Some experts of a layer, and what is the same at all borders."""

    def __init__(self, by: Forecasts, order: torch.Tensor, members: list[int]) -> None:
        view = by.view
        self._by, self._members = by, members
        self._up, self._down = (view.weights(part, members) for part in (view.up, view.down))
        self._importance = [view.importance(part, members) for part in (view.up, view.down)]
        self._up_moments = view.up_moments(members)
        moments = view.down_moments(members, self._up)
        self._hessians = moments.hessian
        rows = rows_by_channel(view.module, view.up.out_features, view.down.in_features, view.inputs.device)
        assert rows is not None  # of layers that can be cut
        self._rows = rows
        deals = view.inputs.sensitivity is not None and deals_channels(by.family)
        energies = [channel_energy(view.module, view.inputs, expert, rows) if deals else None for expert in members]
        self._order = [order[expert] for expert in members]
        self._energies = energies
        self._samples = [view.inputs.sample(expert, by.tokens) for expert in members]
        self._activated = [
            expert_activations(view.module, expert, sample.inputs, up)
            for expert, sample, up in zip(members, self._samples, self._up, strict=True)
        ]

    def costs(self, count: int) -> npt.NDArray[np.float64]:
        """[2, members]: what coding the up and the down projection costs with the first `count` channels left.

        Infinite where that many cannot be coded.
        """
        chosen = [self._dealt(slot, count) for slot in range(len(self._members))]
        sources = [self._sources(channels) for channels in chosen]
        try:
            jobs = [self._up_job(sources), self._down_job(chosen)]
        except ShapeError:
            return np.full((2, len(self._members)), np.inf)
        up, down = self._by.executor.map(jobs)
        return np.asarray([self._up_costs(up, sources, chosen), self._down_costs(down, chosen)])

    def _dealt(self, slot: int, count: int) -> torch.Tensor:
        """int64 [count]: the channels that are left, in the order in which they would be stored."""
        left, energy = self._order[slot][:count], self._energies[slot]
        return left if energy is None else left[dealt(energy[left].argsort(descending=True, stable=True))]

    def _sources(self, channels: torch.Tensor) -> torch.Tensor:
        """int64: the rows of the up projection, in the order in which they would be stored."""
        stored = self._rows[: len(channels)]
        source = torch.empty(self._rows.numel(), dtype=torch.int64, device=stored.device)
        source[stored.flatten()] = self._rows[channels].flatten()
        return source[rows_of_block(self._rows, 0, len(channels))]

    def _job(self, part: Projection, weights: torch.Tensor, moments: InputMoments, which: int, rows: Any) -> CodingJob:
        by, importance = self._by, self._importance[which]
        if importance is not None and rows is not None:
            importance = torch.stack([one[own] for one, own in zip(importance, rows, strict=True)])
        encoding = encoding_for(by.family, by.width, *weights.shape[1:], group_size_limit=by.group_size)
        return by.view.forecast(part, self._members, moments, encoding, weights=weights, importance=importance)

    def _up_job(self, sources: list[torch.Tensor]) -> CodingJob:
        weights = torch.stack([up[rows] for up, rows in zip(self._up, sources, strict=True)])
        return self._job(self._by.view.up, weights, self._up_moments, 0, sources)

    def _down_job(self, chosen: list[torch.Tensor]) -> CodingJob:
        weights = torch.stack([down[:, left] for down, left in zip(self._down, chosen, strict=True)])
        hessian = self._hessians
        if hessian is not None:
            hessian = torch.stack([one[left][:, left] for one, left in zip(hessian, chosen, strict=True)])
        return self._job(self._by.view.down, weights, InputMoments(hessian), 1, None)

    def _up_costs(self, coded: Coded, sources: list[torch.Tensor], chosen: list[torch.Tensor]) -> list[float]:
        """Cost of the changed activations of channels that are left, per expert."""
        found = []
        for slot, expert in enumerate(self._members):
            whole = torch.zeros_like(self._up[slot])
            whole[sources[slot]] = coded.decoded[slot]
            sample, left = self._samples[slot], chosen[slot]
            changed = expert_activations(self._by.view.module, expert, sample.inputs, whole)
            difference = (changed - self._activated[slot])[:, left] @ self._down[slot][:, left].T
            found.append(self._by.cost(difference, sample))
        return found

    def _down_costs(self, coded: Coded, chosen: list[torch.Tensor]) -> list[float]:
        found = []
        for slot, left in enumerate(chosen):
            step = coded.decoded[slot] - self._down[slot][:, left]
            found.append(self._by.cost(self._activated[slot][:, left] @ step.T, self._samples[slot]))
        return found
