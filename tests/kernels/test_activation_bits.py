"""Inputs of 8 bits: every path gives the products of inputs that were rounded to bytes, and nothing else changes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mc_cli import kernels, native
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.errors import InputError
from mc_cli.kernels import affine, path_names, trellis
from mc_cli.kernels.compiled import PATHS, SWITCH, activation_bytes, check_inputs, inputs_of
from mc_cli.numerics.rotation import rotate
from tests.kernels import test_affine, test_trellis
from tests.kernels.products import error_of_bank, paths, relative_error, rows

CPU = torch.device("cpu")
EXACT = 2e-6  # the usual error of a token
FLIPPED = 5e-3  # that of the few in which an input lies between two bytes and is rounded to the other one
NOTICED = 1e-3  # bytes err by more
needs_library = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


def as_bytes(values: Tensor) -> Tensor:
    """Rounded to 127ths of the largest along the last dimension: where to, as float32 has it."""
    largest = values.float().abs().amax(-1, keepdim=True)
    return (values.float() * (127 / largest)).round().double() * largest.double() / 127


def assert_rounded_alike(found: Tensor, expected: Tensor) -> None:
    miss = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(miss.median()) < EXACT and float(miss.max()) < FLIPPED


def trellis_reference(inputs: Tensor, encoding: TrellisEncoding, tensors: dict[str, Tensor]) -> Tensor:
    weight = encoding.rotated_in_torch(tensors, inputs.shape[-1]).double()
    return as_bytes(rotate(inputs.double(), encoding.block)) @ weight.T


def affine_reference(inputs: Tensor, encoding: AffineEncoding, tensors: dict[str, Tensor]) -> Tensor:
    grouped = inputs.double().unflatten(-1, (-1, encoding.group_size))
    return test_affine.reference(as_bytes(grouped).flatten(-2), encoding, tensors)


@needs_library
@pytest.mark.parametrize("path", sorted(PATHS))
def test_trellis_products_are_of_rounded_inputs(path: int) -> None:
    if path not in paths(trellis):
        pytest.skip(f"this machine has no {PATHS[path]}")
    for outputs, inputs in test_trellis.SHAPES:
        encoding, tensors = test_trellis.packed(outputs, inputs, 2.5)
        bank = trellis.Bank([(encoding, tensors, inputs)])
        for count in (1, 2, 3, 5, 20, 47, 300):
            tokens = rows(count, inputs)
            with inputs_of(8, CPU):
                found = bank.product(tokens, path=path)
            assert_rounded_alike(found, trellis_reference(tokens, encoding, tensors))
            if inputs > 1:  # the largest input of all is never rounded
                assert relative_error(found, test_trellis.reference(tokens, encoding, tensors)) > NOTICED
            whole = bank.product(tokens, path=path)
            assert relative_error(whole, test_trellis.reference(tokens, encoding, tensors)) < test_trellis.LARGEST_ERROR


@needs_library
@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_affine_products_are_of_rounded_inputs(bits: int, path: int) -> None:
    if path not in paths(affine):
        pytest.skip(f"this machine has no {PATHS[path]}")
    for outputs, inputs, group in test_affine.SHAPES:
        encoding, tensors = test_affine.packed(outputs, inputs, bits, group)
        bank = affine.Bank([(encoding, tensors, inputs)])
        for count in (1, 3, 20, 200):
            tokens = rows(count, inputs)
            with inputs_of(8, CPU):
                found = bank.product(tokens, path=path)
            assert_rounded_alike(found, affine_reference(tokens, encoding, tensors))
            assert relative_error(found, test_affine.reference(tokens, encoding, tensors)) > NOTICED


@needs_library
@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("count", [1, 70])
def test_banks(count: int, path: int) -> None:
    if path not in paths(trellis):
        pytest.skip(f"this machine has no {PATHS[path]}")
    with inputs_of(8, CPU):
        made = [test_trellis.packed(528, 192, bits) for bits in (1, 2.5, 5, 3, 2)]
        of = {"outputs": 528, "inputs": 192, "tokens": count, "path": path}
        assert error_of_bank(trellis.Bank, made, trellis_reference, **of) < FLIPPED
        grids = [test_affine.packed(48, 256, bits, 128) for bits in (1, 8, 5, 3, 2)]
        of |= {"outputs": 48, "inputs": 256}
        assert error_of_bank(affine.Bank, grids, affine_reference, **of) < FLIPPED


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_show_in_their_token_alone(value: float) -> None:
    encoding, tensors = test_trellis.packed(48, 64, 2)
    bank = trellis.Bank([(encoding, tensors, 64)])
    tokens = rows(5, 64)
    with inputs_of(8, CPU):
        expected = bank.product(tokens)
        tokens[1, 5] = value
        found = bank.product(tokens)
    assert bool(found[1].isnan().all()) and torch.equal(found[2:], expected[2:]) and torch.equal(found[0], expected[0])


@pytest.fixture
def read_anew() -> Iterator[None]:
    """The environment is read at the first product; here each test's is."""
    activation_bytes.cache_clear()
    yield
    activation_bytes.cache_clear()


@needs_library
@pytest.mark.usefixtures("read_anew")
def test_what_the_switch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds for a while, is told with the paths, and has many 16-bit tokens multiplied packed."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(kernels.affine, "best_path", lambda: 2)
    many = torch.empty(affine.HALF_TOKENS + 1, 8, dtype=torch.bfloat16)
    encodings = [AffineEncoding(4, 128)]
    assert activation_bytes() == 2 and not affine.runs_packed(many) and "8 bits" not in path_names(encodings, CPU)
    with inputs_of(8, CPU):
        assert activation_bytes() == 1 and affine.runs_packed(many) and "8 bits" in path_names(encodings, CPU)
        with inputs_of(16, CPU):
            assert activation_bytes() == 2
        assert os.environ[SWITCH] == "8"
    assert SWITCH not in os.environ


@pytest.mark.usefixtures("read_anew")
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"on cuda torch multiplies"):
        check_inputs(8, torch.device("cuda"))
    check_inputs(16, torch.device("cuda"))
    monkeypatch.setenv(SWITCH, "4")
    with pytest.raises(InputError, match=r"MC_CLI_ACTIVATION_BITS is '4'"):
        activation_bytes()
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(InputError, match=r"without a C compiler"), inputs_of(8, CPU):
        pass
