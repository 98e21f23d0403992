"""Experts that are read one by one: what is in memory of those that a stage has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mc_cli.artifacts.scratch import InMemory
from mc_cli.models.experts import put_expert_weight, stacked_weights
from mc_cli.models.paged_experts import PAGED, PagedWeights

EXPERTS = 6


class Counting(InMemory):
    """Notes which tensors are in memory: those that were made or handed out since they were given back."""

    def __init__(self) -> None:
        self.resident: set[int] = set()
        self.most = 0

    def touch(self, tensor: torch.Tensor) -> None:
        self.resident.add(tensor.data_ptr())
        self.most = max(self.most, len(self.resident))

    def release(self, *tensors: torch.Tensor) -> None:
        self.resident -= {tensor.data_ptr() for tensor in tensors}


def test_changed_weights_of_one_expert_at_a_time_are_in_memory() -> None:
    store = Counting()
    original = torch.randn(EXPERTS, 8, 4, generator=torch.Generator().manual_seed(0))
    paged = PagedWeights(lambda _, expert: original[expert].clone(), store)
    module: Any = SimpleNamespace(is_transposed=False, up_proj=original, **{PAGED: paged})
    for expert in range(EXPERTS):
        put_expert_weight(module, "up_proj", expert, original[expert] + expert)
    assert not store.resident
    get = paged.get

    def touching(projection: str, expert: int) -> torch.Tensor:
        found = get(projection, expert)
        store.touch(found)
        return found

    paged.get = touching  # type: ignore[method-assign]
    found = stacked_weights(module, "up_proj", list(range(EXPERTS)))
    assert torch.equal(found, original + torch.arange(EXPERTS).view(-1, 1, 1))
    assert store.most <= 2  # the one that is read, and the one before
