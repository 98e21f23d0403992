"""All routed experts of a layer in one compiled call, against float64 and against their products one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli import kernels, native
from mc_cli.encodings.affine import affine_for
from mc_cli.encodings.trellis import trellis_for
from mc_cli.kernels import GATES, bank_for, experts_output
from mc_cli.models import expert_banks
from tests.kernels.products import paths, relative_error

HIDDEN, INNER = 96, 80
WIDTHS = (2, 3.5, None, 1, 4, 2.5)
SLOTS = 3
BETWEEN_ERROR = 2e-5  # where a rounding of down projections' inputs goes the other way; 7e-6 is found
LARGEST_ERROR = 2e-4  # of up and down projections together; 9e-5 is found
HALF_ERROR = 4e-3  # of results in bfloat16
pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


def packed(encoding: Any, outputs: int, inputs: int) -> tuple[Any, dict[str, Tensor]]:
    tensors = {}
    for name, spec in encoding.tensor_specs(outputs, inputs).items():
        if spec.dtype == "uint8":
            tensors[name] = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
        else:
            tensors[name] = (0.01 + 0.05 * torch.rand(spec.shape)).half()
    return encoding, tensors


def trellis_codes(bits: float, inputs: int) -> Any:
    return trellis_for(bits, inputs)


def affine_grids(bits: float, inputs: int) -> Any:
    return affine_for(round(bits), inputs, group_size_limit=16)


def layer(make: Callable[[float, int], Any]) -> tuple[list[Any], list[Any]]:
    """Up and down projections of six experts, one of which is not there."""
    torch.manual_seed(0)
    up = [bits and packed(make(bits, HIDDEN), 2 * INNER, HIDDEN) for bits in WIDTHS]
    down = [bits and packed(make(bits, INNER), HIDDEN, INNER) for bits in WIDTHS]
    return up, down


def banks(parts: tuple[list[Any], list[Any]]) -> tuple[Any, Any]:
    """Makes both projections' (encoding, stored parts)."""
    up, down = (
        bank_for([part and (*part, inputs) for part in projection])
        for projection, inputs in zip(parts, (HIDDEN, INNER), strict=True)
    )
    return up, down


def call(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of different sizes; experts that are there, that are not, and none (6); nobody chooses the last."""
    torch.manual_seed(count)
    rows = torch.randn(count, HIDDEN) * torch.logspace(-1, 1, count)[:, None]
    chosen = torch.randint(0, 5, (count, SLOTS))
    chosen[torch.rand(chosen.shape) < 0.1] = 6
    return rows, chosen, torch.rand(count, SLOTS)


def exact(parts: tuple[list[Any], list[Any]], gate: str, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """float64 [tokens, HIDDEN], from dequantized matrices."""
    up, down = (
        [part and part[0].dequantize(part[1], inputs).double() for part in projection]
        for projection, inputs in zip(parts, (HIDDEN, INNER), strict=True)
    )
    total = torch.zeros(len(rows), HIDDEN, dtype=torch.float64)
    for token, slots in enumerate(chosen.tolist()):
        for slot, expert in enumerate(slots):
            if expert < len(up) and up[expert] is not None:
                first, second = (up[expert] @ rows[token].double()).chunk(2)
                total[token] += weights[token, slot].double() * (down[expert] @ (GATES[gate](first) * second))
    return total


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("make", [trellis_codes, affine_grids])
@pytest.mark.parametrize("path", sorted(kernels.trellis.PATHS))
def test_a_layer_is_that_of_float64(path: int, make: Callable[[float, int], Any], gate: str) -> None:
    if path not in paths(kernels.trellis):
        pytest.skip(f"this machine has no {kernels.trellis.PATHS[path]}")
    parts = layer(make)
    up, down = banks(parts)
    threads = torch.get_num_threads()
    for count in (1, 2, 7, 60):
        rows, chosen, weights = call(count)
        expected = exact(parts, gate, rows, chosen, weights)
        try:
            for torch_threads in (1, 3):
                torch.set_num_threads(torch_threads)
                found = experts_output(up, down, rows, chosen, weights, gate, path=path)
                assert found.dtype == torch.float32
                assert relative_error(found, expected) < LARGEST_ERROR
        finally:
            torch.set_num_threads(threads)
        halves = rows.bfloat16(), chosen, weights.bfloat16()
        found = experts_output(up, down, *halves, gate, path=path)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, exact(parts, gate, *halves)) < HALF_ERROR
        mixed = experts_output(up, down, rows.half(), chosen, weights, gate, path=path)
        assert mixed.dtype == torch.float16 and relative_error(mixed, expected) < HALF_ERROR


@pytest.mark.parametrize("gate", GATES)
def test_nothing_but_rounding_lies_between_the_products(gate: str) -> None:
    """Gates from tiny to huge, where exponentials end: as by torch, from the same up projections."""
    parts = layer(trellis_codes)
    up, down = banks(parts)
    rows, chosen, weights = call(30)
    rows *= torch.logspace(-4, 5, 30)[:, None]
    first, second = up.product(rows, chosen.reshape(-1), top_k=SLOTS).double().chunk(2, -1)
    assert float(first.min()) < -100 and float(first.max()) > 100
    outputs = down.product((GATES[gate](first) * second).float(), chosen.reshape(-1))
    expected = (outputs.view(30, SLOTS, HIDDEN).double() * weights.double()[..., None]).sum(1)
    assert relative_error(experts_output(up, down, rows, chosen, weights, gate), expected) < BETWEEN_ERROR


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES)
def test_what_is_not_finite_shows_in_its_token_alone(gate: str, dtype: torch.dtype, value: float) -> None:
    parts = layer(trellis_codes)
    up, down = banks(parts)
    rows, chosen, weights = call(3)
    chosen[1] = torch.tensor([0, 1, 3])
    expected = experts_output(up, down, rows.to(dtype), chosen, weights.to(dtype), gate)
    rows[1, 5] = value
    found = experts_output(up, down, rows.to(dtype), chosen, weights.to(dtype), gate)
    assert bool(found[1].isnan().all()) and torch.equal(found[::2], expected[::2])


def test_no_tokens() -> None:
    parts = layer(trellis_codes)
    up, down = banks(parts)
    nothing = torch.empty(0, HIDDEN), torch.empty(0, SLOTS, dtype=torch.int64), torch.empty(0, SLOTS)
    assert experts_output(up, down, *nothing, "silu").shape == (0, HIDDEN)


class _Gated(torch.nn.Module):
    """Stands for an experts module by its gate alone."""

    has_gate = True

    def __init__(self, apply_gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._apply_gate = apply_gate


def _gate(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply_gate(both: Tensor) -> Tensor:
        first, second = both.chunk(2, -1)
        return activation(first) * second

    return apply_gate


@pytest.mark.parametrize(
    ("apply_gate", "expected"),
    [
        (_gate(torch.nn.SiLU()), "silu"),
        (_gate(torch.nn.GELU(approximate="tanh")), "gelu_tanh"),
        (_gate(torch.nn.GELU()), None),
        (_gate(lambda first: torch.nn.functional.silu(first.clamp(max=100))), None),
        (lambda both: torch.nn.functional.silu(both[..., ::2]) * both[..., 1::2], None),
        (lambda both: torch.nn.functional.silu(both), None),
    ],
    ids=["silu", "gelu_tanh", "gelu", "limited", "interleaved", "alone"],
)
def test_gates_are_known_by_what_they_do(apply_gate: Callable[[Tensor], Tensor], expected: str | None) -> None:
    assert expert_banks._gate_of(_Gated(apply_gate), 2 * INNER) == expected
