"""Router slots that share an expert, merged by the compiled routine and by tensor operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_cli import native
from mc_cli.kernels.slots import reference, shared_slots

SLOTS = 12
TABLE = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 12, 12, 0, 3, 12])  # the last entry stands for no expert
compiled = pytest.mark.skipif(native.library() is None, reason="nothing is compiled here")


def routed(k: int, dtype: torch.dtype, tokens: int = 500) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    index = torch.rand(tokens, SLOTS, generator=generator).topk(k).indices
    index[::7, 0] = SLOTS  # left out by a policy
    index[::11, -1] = SLOTS + 5  # on another machine
    return index, torch.randn(tokens, k, generator=generator).softmax(-1).to(dtype)


def by_hand(index: Tensor, weights: Tensor) -> list[dict[int, float]]:
    """Expert -> its weight, of every token."""
    sums: list[dict[int, float]] = []
    for slots, factors in zip(index.tolist(), weights.tolist(), strict=True):
        found: dict[int, float] = {}
        for slot, factor in zip(slots, factors, strict=True):
            expert = int(TABLE[min(slot, SLOTS)])
            if expert != SLOTS:
                found[expert] = found.get(expert, 0.0) + factor
        sums.append(found)
    return sums


@pytest.mark.parametrize("way", [reference, pytest.param(shared_slots, marks=compiled)])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_is_there_once_with_the_sum_of_its_weights(way: object, k: int, dtype: torch.dtype) -> None:
    index, weights = routed(k, dtype)
    assert callable(way)
    experts, sums = way(TABLE, index, weights)
    assert experts.dtype is torch.int64 and sums.dtype is dtype
    for token, expected in enumerate(by_hand(index, weights)):
        found = [(e, w) for e, w in zip(experts[token].tolist(), sums[token].tolist(), strict=True) if e != SLOTS]
        assert len(found) == len(expected)
        assert dict(found) == pytest.approx(expected, rel=1e-6 if dtype is torch.float32 else 2**-8)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_routine_gives_what_tensor_operations_give(dtype: torch.dtype) -> None:
    for k in (1, 2):  # of two weights the sum is the same in every order
        index, weights = routed(k, dtype)
        index, weights = index.T.contiguous().T, weights.T.contiguous().T
        for found, expected in zip(shared_slots(TABLE, index, weights), reference(TABLE, index, weights), strict=True):
            assert torch.equal(found, expected)


@compiled
def test_gradients_and_other_precisions_take_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    index, weights = routed(3, torch.float32)
    learned = weights.clone().requires_grad_()
    shared_slots(TABLE, index, learned)[1].sum().backward()
    assert learned.grad is not None
    assert shared_slots(TABLE, index, weights.double())[1].dtype is torch.float64
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "routine", lambda name: pytest.fail(f"{name} was asked for"))
    shared_slots(TABLE, index, weights)


@compiled
def test_numbers_that_are_no_slot_are_read_as_none() -> None:
    index = torch.tensor([[-7, 2**40, 3]])
    found, _ = shared_slots(TABLE, index, torch.ones(1, 3))
    assert found.tolist() == [[SLOTS, SLOTS, 3]]
