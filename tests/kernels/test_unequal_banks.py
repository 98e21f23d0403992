"""Banks in which every matrix has its own shape, against float64, by every compiled path.

Blocks of experts are such matrices: c channels are 2c outputs of an up projection and c inputs of a down projection.
References are decoded by the independent reader in `tests/dense_twin.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.encodings.trellis import trellis_for
from mc_cli.errors import ShapeError
from mc_cli.kernels import GATES, affine, bank_for, experts_output, trellis
from mc_cli.kernels.compiled import PATHS, inputs_of
from tests.dense_twin import _decode
from tests.kernels.products import paths, relative_error

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")

SHAPES = ((528, 384), (192, 16), (32, 96), (272, 48), (16, 128), (96, 64))  # (out_features, in_features)
NOBODYS = len(SHAPES)  # the number of the matrix that is not there
CHANNELS = (128, 16, None, 96, 384, 48)  # of experts' blocks; None: not there
HIDDEN = 96
LARGEST_ERROR = 4e-4  # of a slot's outputs, as tests of equal matrices have it
LAYER_ERROR = 4e-4  # of up and down projections together; 1e-4 is found
HALF_ERROR = 6e-3  # of results in bfloat16
BYTE_ERROR = 0.05  # of inputs of 8 bits

Part = tuple[Any, dict[str, Tensor], int]


def packed(encoding: Any, outputs: int, inputs: int, seed: int = 0) -> Part:
    """Random codes: every byte stands for something."""
    generator = torch.Generator().manual_seed(outputs + 10**4 * inputs + 10**8 * seed)
    tensors = {
        name: torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator)
        if spec.dtype == "uint8"
        else (0.01 + 0.05 * torch.rand(spec.shape, generator=generator)).half()
        for name, spec in encoding.tensor_specs(outputs, inputs).items()
    }
    return encoding, tensors, inputs


def trellis_codes(number: int, inputs: int) -> Any:
    return trellis_for((2, 3.5, 1, 2.5, 5, 1.5)[number], inputs)  # blocks of 16 to 128 inputs


def affine_grids(number: int, inputs: int) -> Any:
    return AffineEncoding((2, 3, 1, 8, 4, 5)[number], 16)


def odd_grids(number: int, inputs: int) -> Any:
    return AffineEncoding((2, 3, 1, 8, 4, 5)[number], 8)  # which the AVX2 path leaves to the portable one


KINDS = (trellis_codes, affine_grids, odd_grids)


def dense(part: Part) -> Tensor:
    encoding, tensors, _ = part
    return _decode(encoding.key, tensors.__getitem__).double()


def matrices(make: Callable[[int, int], Any]) -> list[Part | None]:
    return [*(packed(make(number, inputs), outputs, inputs) for number, (outputs, inputs) in enumerate(SHAPES)), None]


def skip_without(path: int) -> None:
    if path not in paths(trellis):
        pytest.skip(f"this machine has no {PATHS[path]}")


def expected_products(parts: Sequence[Part | None], rows: Tensor, chosen: Tensor, top_k: int, width: int) -> Tensor:
    """float64 [slots, width], zeros behind a matrix's outputs."""
    weights = [part and dense(part) for part in parts]
    expected = torch.zeros(len(chosen), width, dtype=torch.float64)
    for slot, number in enumerate(chosen.tolist()):
        weight = weights[number] if 0 <= number < len(parts) else None
        if weight is not None:
            outputs, inputs = weight.shape
            expected[slot, :outputs] = weight @ rows[slot // top_k, :inputs].double()
    return expected


def tokens_and_slots(count: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Tokens of different sizes; every matrix, the one that is not there, and numbers of none."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 384, generator=generator) * torch.logspace(-2, 2, count)[:, None]
    chosen = torch.randint(-1, NOBODYS + 2, (count * top_k,), generator=generator)
    chosen[-1] = 1
    return rows, chosen


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("make", KINDS)
def test_every_slot_gets_the_product_with_its_own_matrix(make: Callable[[int, int], Any], path: int) -> None:
    skip_without(path)
    parts = matrices(make)
    bank: Any = bank_for(parts)
    assert bank.shapes == (*SHAPES, None) and (bank.out_features, bank.in_features) == (528, 384)
    threads = torch.get_num_threads()
    for count, top_k in ((1, 1), (1, 3), (4, 2), (150, 3)):
        rows, chosen = tokens_and_slots(count, top_k)
        expected = expected_products(parts, rows, chosen, top_k, 528)
        there = expected.abs().sum(1) > 0
        behind = expected == 0
        try:
            for torch_threads in (1, 3):
                torch.set_num_threads(torch_threads)
                found = bank.product(rows, chosen, top_k=top_k, path=path)
                assert relative_error(found[there], expected[there]) < LARGEST_ERROR
                assert not found[behind].any()
        finally:
            torch.set_num_threads(threads)
        with inputs_of(8, torch.device("cpu")):
            assert relative_error(bank.product(rows, chosen, top_k, path)[there], expected[there]) < BYTE_ERROR


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("make", KINDS)
def test_products_are_those_of_each_matrix_by_itself(make: Callable[[int, int], Any], path: int) -> None:
    """Bit by bit, as rows of the same numbers; and the first matrix is that of `linear`."""
    skip_without(path)
    parts = [part for part in matrices(make) if part is not None]
    together: Any = bank_for(parts)
    rows = torch.randn(2, 384, generator=torch.Generator().manual_seed(0))
    for number, part in enumerate(parts):
        alone: Any = bank_for([part])
        outputs, inputs = alone.shapes[0]
        expected = alone.product(rows[:, :inputs].contiguous(), path=path)
        found = together.product(rows, torch.full((2,), number), path=path)
        assert torch.equal(found[:, :outputs], expected) and not found[:, outputs:].any()
    halves = together.linear(rows.bfloat16())
    assert halves.dtype == torch.bfloat16 and torch.equal(halves, together.product(rows.bfloat16()).bfloat16())


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("count", [1, 20])
def test_what_lies_behind_a_matrixs_inputs_is_not_read(count: int, make: Callable[[int, int], Any], path: int) -> None:
    """Though another slot of the same token reads it."""
    skip_without(path)
    parts = matrices(make)
    bank: Any = bank_for(parts)
    rows = torch.randn(count, 384, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([1, 0, 3, NOBODYS, 5]).repeat(count)  # of 16, 384, 48, no and 64 inputs
    expected = bank.product(rows, numbers, top_k=5, path=path).view(count, 5, -1)
    rows[:, 64:] = float("nan")
    found = bank.product(rows, numbers, top_k=5, path=path).view(count, 5, -1)
    assert bool(found[:, 1].isnan().all())
    for slot in (0, 2, 3, 4):
        assert torch.equal(found[:, slot], expected[:, slot])


def layer(make: Callable[[int, int], Any]) -> tuple[list[Part | None], list[Part | None]]:
    """Up and down projections of blocks of `CHANNELS`."""
    up = [c and packed(make(n, HIDDEN), 2 * c, HIDDEN, seed=n) for n, c in enumerate(CHANNELS)]
    down = [c and packed(make(n, c), HIDDEN, c, seed=n) for n, c in enumerate(CHANNELS)]
    return up, down


def expected_outputs(
    up: Sequence[Part | None], down: Sequence[Part | None], rows: Tensor, chosen: Tensor, weights: Tensor, gate: str
) -> Tensor:
    """float64 [tokens, HIDDEN]."""
    total = torch.zeros(len(rows), HIDDEN, dtype=torch.float64)
    pairs = [
        None if first is None or second is None else (dense(first), dense(second))
        for first, second in zip(up, down, strict=True)
    ]
    for token, slots in enumerate(chosen.tolist()):
        for slot, number in enumerate(slots):
            pair = pairs[number] if 0 <= number < len(pairs) else None
            if pair is not None:
                first, second = (pair[0] @ rows[token].double()).chunk(2)
                total[token] += weights[token, slot].double() * (pair[1] @ (GATES[gate](first) * second))
    return total


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("make", [trellis_codes, affine_grids])
@pytest.mark.parametrize("gate", GATES)
def test_layers_of_unequal_experts_are_those_of_float64(gate: str, make: Callable[[int, int], Any], path: int) -> None:
    skip_without(path)
    up, down = layer(make)
    banks: Any = bank_for(up), bank_for(down)
    assert banks[0].out_features == 2 * banks[1].in_features == 768
    for count in (1, 2, 60):
        generator = torch.Generator().manual_seed(count)
        rows = torch.randn(count, HIDDEN, generator=generator) * torch.logspace(-1, 1, count)[:, None]
        chosen = torch.randint(-1, len(CHANNELS) + 1, (count, 5), generator=generator)
        chosen[:, 2] = 4
        weights = torch.rand(count, 5, generator=generator)
        expected = expected_outputs(up, down, rows, chosen, weights, gate)
        found = experts_output(*banks, rows, chosen, weights, gate, path=path)
        assert relative_error(found, expected) < LAYER_ERROR
        halves = rows.bfloat16(), chosen, weights.bfloat16()
        found = experts_output(*banks, *halves, gate, path=path)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected_outputs(up, down, *halves, gate)) < HALF_ERROR


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("make", [trellis_codes, affine_grids])
def test_an_expert_that_one_projection_has_not_adds_nothing(make: Callable[[int, int], Any], path: int) -> None:
    """Though its other matrix be the widest of all, and other matrices' rows have no room for it."""
    skip_without(path)
    up, down = layer(make)
    rows = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[4, 0, 1], [4, 4, 4], [4, 5, 3]])
    weights = torch.full((3, 3), 0.5)
    for first, second in (([*up[:4], None, up[5]], down), (up, [*down[:4], None, down[5]]), (up[:4], down)):
        banks: Any = bank_for(first), bank_for(second)
        found = experts_output(*banks, rows, chosen, weights, "silu", path=path)
        spare = [None] * (len(second) - len(first))
        expected = expected_outputs([*first, *spare], second, rows, chosen, weights, "silu")
        assert not found[1].any() and not expected[1].any()
        assert relative_error(found[::2], expected[::2]) < LAYER_ERROR


@pytest.mark.parametrize("make", [trellis_codes, affine_grids])
def test_widths_that_do_not_belong_together_are_refused_at_every_call(make: Callable[[int, int], Any]) -> None:
    up, down = layer(make)
    call = torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), "silu"
    wrong = packed(make(3, 112), HIDDEN, 112)
    banks: Any = bank_for(up), bank_for(down), bank_for([*down[:3], wrong, *down[4:]])
    for _ in range(2):
        assert experts_output(*banks[:2], *call).shape == (2, HIDDEN)
        with pytest.raises(ShapeError, match="matrix 3: 192 outputs of gate and up for 112 inputs"):
            experts_output(banks[0], banks[2], *call)
    fewer_outputs, fewer_inputs = packed(make(3, 96), HIDDEN - 16, 96), packed(make(0, 64), 256, 64)
    others: Any = bank_for([fewer_inputs, *up[1:]]), bank_for([*down[:3], fewer_outputs, *down[4:]])
    with pytest.raises(ShapeError, match=r"one number of out_features, not \[80, 96\]"):
        experts_output(banks[0], others[1], *call)
    with pytest.raises(ShapeError, match=r"one number of in_features, not \[64, 96\]"):
        experts_output(others[0], banks[1], *call)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_shape_that_is_not_that_of_the_parts_never_becomes_a_table(
    number: int, make: Callable[[int, int], Any]
) -> None:
    """Checks any matrix of a bank, not the first or the largest alone."""
    parts = matrices(make)
    kind: Any = trellis.Bank if make is trellis_codes else affine.Bank
    part = parts[number]
    assert part is not None
    encoding, tensors, inputs = part
    others = [other for other in parts if other is not None and other is not part]
    wrong: list[Any] = [
        (encoding, tensors, other) for other in (inputs - 16, inputs + 16, inputs + 1, 0, -inputs, 2**17)
    ]
    wrong += [(encoding, {**tensors, "codes": other[1]["codes"]}, inputs) for other in others]
    wrong += [(other[0], tensors, inputs) for other in others if other[0].key != encoding.key and other[0].bits != 5]
    wrong += [(encoding, {name: each[:-16] for name, each in tensors.items()}, inputs + 16)]
    wrong += [(encoding, {name: each for name, each in tensors.items() if name != gone}, inputs) for gone in tensors]
    wrong += [(encoding, {name: each[None] for name, each in tensors.items()}, inputs)]
    wrong += [(encoding, {name: each[:0] for name, each in tensors.items()}, inputs)]
    for case in wrong:
        with pytest.raises(ShapeError):
            kind([*parts[:number], case, *parts[number + 1 :]])


def test_a_bank_of_more_outputs_than_32_bits_count_is_refused() -> None:
    encoding, tensors, inputs = packed(trellis_for(1, 16), 2**16, 16)
    with pytest.raises(ShapeError, match="numbers of matrices times outputs"):
        trellis.Bank([(encoding, tensors, inputs)] + [None] * 2**15)
