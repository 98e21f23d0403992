"""Products with packed matrices against float64: every rate, odd sizes, one token to many, every compiled path."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mc_cli import kernels, native
from mc_cli.encodings.trellis import TrellisEncoding, trellis_for
from mc_cli.kernels import packed_linear, runs_packed
from mc_cli.kernels.trellis import (
    FEW_TOKENS,
    MOST_INPUTS,
    PATHS,
    Bank,
    decoded_product,
    path_name,
)
from mc_cli.numerics.rotation import rotate, rotate_back
from mc_cli.numerics.trellis_code import code_levels
from tests.kernels.products import error_of_bank, paths, relative_error, rows

RATES = tuple(half / 2 for half in range(2, 11))
SHAPES = ((16, 32), (24, 48), (272, 96), (512, 257), (40, 1), (208, 2050))  # (out_features, in_features)
LARGEST_ERROR = 1e-4  # of the outputs' size; 4e-5 is typical, bfloat16 has 2e-3
LARGEST_ERROR_OF_TORCH = 1e-3  # its float32 sums of 2**16 like terms, which are all rounded alike
DECODED_ERROR = 2e-6  # of the path that decodes to float32
needs_library = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


def packed(outputs: int, inputs: int, bits: float) -> tuple[TrellisEncoding, dict[str, Tensor]]:
    """Random codes: every byte stands for something."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    encoding = trellis_for(bits, inputs)
    shape = encoding.tensor_specs(outputs, inputs)["codes"].shape
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rings = encoding.rings(codes, inputs)
    assert torch.equal(encoding.rings(encoding.interleaved(rings), inputs), rings)
    return encoding, {"codes": codes, "scales": (0.01 + torch.rand(outputs, generator=generator)).half()}


def reference(inputs: Tensor, encoding: TrellisEncoding, tensors: dict[str, Tensor]) -> Tensor:
    weight = encoding.rotated_in_torch(tensors, inputs.shape[-1]).double()
    return rotate(inputs.double(), encoding.block) @ weight.T


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_those_of_float64(outputs: int, inputs: int, bits: float) -> None:
    encoding, tensors = packed(outputs, inputs, bits)
    weight = encoding.rotated_in_torch(tensors, inputs).double()
    for count in (1, 3, FEW_TOKENS, FEW_TOKENS + 1, 40):
        tokens = rows(count, inputs)
        found = packed_linear(tokens, tensors, encoding, in_features=inputs)
        assert relative_error(found, rotate(tokens.double(), encoding.block) @ weight.T) < LARGEST_ERROR
    assert packed_linear(torch.empty(0, inputs), tensors, encoding, in_features=inputs).shape == (0, outputs)


@needs_library
@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("bits", RATES)
def test_every_path_that_the_machine_has_agrees(bits: float, path: int) -> None:
    if path not in paths(kernels.trellis):
        pytest.skip(f"this machine has no {PATHS[path]}")
    for outputs, inputs in SHAPES:
        encoding, tensors = packed(outputs, inputs, bits)
        bank = Bank([(encoding, tensors, inputs)])
        weight = encoding.rotated_in_torch(tensors, inputs)
        for count in (1, 2, 5, 20, 47):
            tokens = rows(count, inputs)
            expected = rotate(tokens.double(), encoding.block) @ weight.double().T
            assert relative_error(bank.product(tokens, path=path), expected) < LARGEST_ERROR
            assert relative_error(decoded_product(tokens, tensors, encoding), expected) < DECODED_ERROR
        matrix = encoding.rotated_compiled(tensors, inputs, path)
        assert torch.allclose(matrix, weight, rtol=1e-6, atol=0)


def test_stacks_of_matrices_are_decoded_one_by_one() -> None:
    parts = [packed(48, 36, 2.5)[1], packed(48, 36, 2.5)[1]]
    parts[1]["codes"] = parts[1]["codes"].flip(0)
    encoding = trellis_for(2.5, 36)
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    found = encoding.dequantize(stacked, 36)
    assert found.shape == (2, 48, 36)
    for matrix, part in zip(found, parts, strict=True):
        expected = rotate_back(encoding.rotated_in_torch(part, 36), encoding.block)
        assert torch.allclose(matrix, expected, rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("count", [1, 3, 70, 600])
def test_a_bank_gives_every_slot_its_own_matrix(count: int, path: int) -> None:
    """Mixed widths, an expert that is not there, slots without an expert, an expert that nobody chose; in threads."""
    if path not in paths(kernels.trellis):
        pytest.skip(f"this machine has no {PATHS[path]}")
    made = [packed(528, 192, bits) for bits in (1, 2.5, 5, 3, 2)]
    error = error_of_bank(Bank, made, reference, outputs=528, inputs=192, tokens=count, path=path)
    assert error < LARGEST_ERROR


@needs_library
def test_a_forked_process_has_threads_of_its_own() -> None:
    encoding, tensors = packed(2048, 512, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        tokens = rows(4, 512)
        bank = Bank([(encoding, tensors, 512)])
        expected = bank.product(tokens)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(bank.product(tokens), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(bank.product(tokens), expected)
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("team", [True, False])
def test_products_by_torch_threads_and_by_the_pool_are_equal(team: bool) -> None:
    """In torch's team and in a pool, from several threads at once, and with other numbers of threads in between."""
    compiled = native.library()
    assert compiled is not None
    encoding, tensors = packed(2048, 512, 2)
    tokens = rows(4, 512)
    bank = Bank([(encoding, tensors, 512)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = bank.product(tokens)
        compiled.mc_use_team(native.team_start() if team else None)

        def products(count: int) -> bool:
            torch.set_num_threads(count)
            return all(torch.equal(bank.product(tokens), expected) for _ in range(20))

        assert products(2) and products(5) and products(2)
        with ThreadPoolExecutor(3) as callers:
            assert all(callers.map(products, (2, 3, 2, 4)))
    finally:
        compiled.mc_use_team(native.team_start())
        torch.set_num_threads(threads)


def test_shapes_dtypes_and_threads() -> None:
    encoding, tensors = packed(1024, 512, 2)
    tokens = rows(6, 512).view(2, 3, 512)
    expected = reference(tokens, encoding, tensors)
    found = packed_linear(tokens, tensors, encoding, in_features=512)
    assert found.shape == (2, 3, 1024) and found.dtype == torch.float32
    half = packed_linear(tokens.bfloat16(), tensors, encoding, in_features=512)
    assert half.dtype == torch.bfloat16 and relative_error(half, expected) < 0.01
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(packed_linear(tokens, tensors, encoding, in_features=512), found)
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 200])
def test_linear_is_the_product_in_the_dtype_of_its_inputs(count: int, dtype: torch.dtype) -> None:
    encoding, tensors = packed(272, 128, 2.5)
    bank = Bank([(encoding, tensors, 128)])
    tokens = torch.randn(128, count, 2).permute(1, 2, 0).to(dtype)  # not contiguous
    assert count == 1 or not tokens.is_contiguous()
    expected = bank.product(tokens.reshape(-1, 128)).view(count, 2, 272).to(dtype)
    assert torch.equal(bank.linear(tokens), expected)
    found = packed_linear(tokens, tensors, encoding, in_features=128)
    if runs_packed(tokens, encoding):
        assert torch.equal(found, expected)
    else:  # many tokens on a processor whose products with decoded matrices are faster: other sums
        step = 2**-6 if dtype == torch.bfloat16 else 1e-2 if dtype == torch.float16 else 1e-3
        assert float((found - expected).norm() / expected.norm()) < step


@needs_library
def test_banks_are_kept_for_parameters_and_not_for_what_came_in_their_place() -> None:
    tokens = rows(2, 64)
    encoding, tensors = packed(48, 64, 2)
    held = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    expected = packed_linear(tokens, tensors, encoding, in_features=64)
    gc.collect()  # banks of other tests' parameters, which would go in the middle of this one
    before = len(kernels._banks)
    for _ in range(2):
        assert torch.equal(packed_linear(tokens, held, encoding, in_features=64), expected)
    assert len(kernels._banks) == before + 1
    held["scales"] = torch.nn.Parameter(2 * held["scales"], requires_grad=False)
    assert torch.equal(packed_linear(tokens, held, encoding, in_features=64), 2 * expected)
    wider = trellis_for(1, 64)  # reads half of the same codes, at the same place
    other = {
        "codes": torch.nn.Parameter(tensors["codes"][..., : wider.lane_bytes * 12].contiguous(), requires_grad=False)
    }
    held["codes"].data = other["codes"].data
    other["scales"] = torch.nn.Parameter(tensors["scales"], requires_grad=False)
    assert torch.equal(
        packed_linear(tokens, other, wider, in_features=64),
        Bank([(wider, {name: tensor.data for name, tensor in other.items()}, 64)]).product(tokens),
    )
    del held, other
    gc.collect()
    assert len(kernels._banks) == before


def test_gradients_flow_through_few_tokens() -> None:
    encoding, tensors = packed(48, 64, 2)
    tokens = rows(2, 64).requires_grad_(True)
    packed_linear(tokens, tensors, encoding, in_features=64).sum().backward()
    column_sums = encoding.rotated(tensors, 64).sum(0)
    assert tokens.grad is not None
    assert torch.allclose(tokens.grad, rotate_back(column_sums, encoding.block).expand(2, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_show_in_their_token_alone(value: float) -> None:
    encoding, tensors = packed(48, 64, 2)
    tokens = rows(3, 64)
    expected = packed_linear(tokens, tensors, encoding, in_features=64)
    tokens[1, 5] = value
    found = packed_linear(tokens, tensors, encoding, in_features=64)
    assert bool(found[1].isnan().all()) and torch.equal(found[::2], expected[::2])


@needs_library
def test_the_largest_sums_fit() -> None:
    """All activations and weights at their largest: the most inputs that are multiplied packed, and one more."""
    for inputs, bound in ((MOST_INPUTS, LARGEST_ERROR), (MOST_INPUTS + 1, LARGEST_ERROR_OF_TORCH)):
        encoding, tensors = packed(16, inputs, 1)
        window = int(code_levels(Fraction(1)).argmax())
        ring = torch.zeros(1, 1, 2, dtype=torch.uint8)
        for bit in range(12):  # one weight of every ring has the largest level
            ring[..., bit >> 3] |= (window >> bit & 1) << (bit & 7)
        tensors["codes"] = encoding.interleaved(ring.expand(1, inputs, 2).contiguous())
        tokens = rotate_back(torch.ones(1, inputs), encoding.block)  # once rotated, all at the largest
        found = packed_linear(tokens, tensors, encoding, in_features=inputs)
        assert relative_error(found, reference(tokens, encoding, tensors)) < bound


def test_zeros_and_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, tensors = packed(64, 96, 2.5)
    assert not packed_linear(torch.zeros(2, 96), tensors, encoding, in_features=96).any()
    tokens = rows(2, 96)
    expected = reference(tokens, encoding, tensors)
    monkeypatch.setattr(native, "library", lambda: None)
    assert path_name() == "none, torch serves"
    assert relative_error(packed_linear(tokens, tensors, encoding, in_features=96), expected) < DECODED_ERROR
