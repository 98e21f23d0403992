"""Counts the expert calls that a policy skips while an engine serves, where that is asked for, and tells them.

The sums stay on the device: nothing waits for them but the one who reads them, once a minute or at the end.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.util import Finalize

import torch

from mc_cli.models.experts import Experts
from mc_cli.models.half_experts import gives_halves
from mc_cli.skipping.pruning import LayerPruner

SECONDS = 60.0  # between two lines while there is something new to tell


@dataclass(frozen=True)
class Calls:
    """Expert calls of some layers.

    chosen    slots in which the router chose an expert;  computed  those of them that ran, half an expert counting half
    """

    chosen: float
    computed: float

    @property
    def rate(self) -> float:
        """Share of the chosen calls that was skipped; 0 where there were none."""
        return 1 - self.computed / self.chosen if self.chosen else 0.0


class CountedPolicy:
    """A layer's policy that adds up what it is asked and what it leaves.

    is_served   whether the forward that runs is of requests: an engine also runs some of no tokens to warm up
    """

    def __init__(self, policy: LayerPruner, device: torch.device, is_served: Callable[[], bool]) -> None:
        self.watch, self.halves = policy.watch, gives_halves(policy)
        self._policy, self._is_served = policy, is_served
        self.sums = torch.zeros(2, dtype=torch.int64, device=device)  # in half calls: chosen, computed

    def __call__(
        self, module: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice that the policy makes."""
        kept = self._policy(module, hidden, index, weights)
        if self._is_served():
            whole, half = (kept[0] < module.num_experts).sum(), (kept[0] > module.num_experts).sum()
            self.sums += torch.stack([2 * (index < module.num_experts).sum(), 2 * whole + half])
        return kept


class SkippedCalls:
    """The counts of one model, layer by layer; told as a line by `tell` once a minute, and when the process ends."""

    def __init__(self, layers: Mapping[str, CountedPolicy], tell: Callable[[str], None]) -> None:
        self._layers, self._tell = dict(layers), tell
        self._told: str | None = None
        _newest.append(weakref.ref(self))
        here = weakref.ref(self)
        Finalize(self, _tell_at_end, (here,), exitpriority=1)  # worker processes run these, and not those of atexit
        threading.Thread(target=_tell_now_and_then, args=(here,), daemon=True).start()

    def by_layer(self) -> dict[str, Calls]:
        """Path of a layer's experts -> its calls so far. Waits for the device."""
        found = {path: layer.sums.tolist() for path, layer in self._layers.items()}
        return {path: Calls(chosen / 2, computed / 2) for path, (chosen, computed) in found.items()}

    def total(self) -> Calls:
        """The calls of all layers so far. Waits for the device."""
        layers = self.by_layer().values()
        return Calls(sum(each.chosen for each in layers), sum(each.computed for each in layers))

    def tell(self) -> None:
        """Says how many calls were skipped, unless that was said before."""
        layers, total = self.by_layer(), self.total()
        rates = ", ".join(f"{100 * calls.rate:.1f}" for calls in layers.values())
        line = f"{100 * total.rate:.1f} % of {total.chosen:,.0f} expert calls were skipped; by layer {rates} %."
        if total.chosen and line != self._told:
            self._told = line
            self._tell(line)


_newest: list[weakref.ref[SkippedCalls]] = []


def skipped_calls() -> SkippedCalls | None:
    """The counts of the model that was loaded last in this process; None where no living one is counted."""
    return next((found for each in reversed(_newest) if (found := each()) is not None), None)


def _tell_at_end(counted: weakref.ref[SkippedCalls]) -> None:
    if (found := counted()) is not None:
        found.tell()


def _tell_now_and_then(counted: weakref.ref[SkippedCalls]) -> None:
    """Tells until the model is gone, or the process ends."""
    pause = threading.Event()
    while not pause.wait(SECONDS) and (found := counted()) is not None:
        found.tell()
        del found
