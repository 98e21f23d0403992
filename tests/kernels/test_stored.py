"""Arguments of compiled code: parts that do not fit, that are changed later, or are gone."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from mc_cli import native
from mc_cli.encodings import encoding_from_key
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.errors import ArtifactError, McError, ShapeError
from mc_cli.kernels import affine, bank_for, experts_output, packed_linear, trellis
from mc_cli.policies import Cut, LayerValues, Routed, compiled_rule, odp, otp

pytestmark = pytest.mark.skipif(native.library() is None, reason="nothing is compiled here")
KEYS = ("trellis_b2_h8", "trellis_b1p5_h16", "trellis_b5_h16", "affine_b3_g8", "affine_b8_g16")
OUTPUTS, INPUTS = 32, 48


def part(key: str, outputs: int = OUTPUTS, inputs: int = INPUTS) -> tuple[Any, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    encoding = encoding_from_key(key)
    tensors = {}
    for name, spec in encoding.tensor_specs(outputs, inputs).items():
        values = torch.randint(0, 200, spec.shape, generator=generator)
        tensors[name] = values.to(torch.uint8) if spec.dtype == "uint8" else (values / 200).half()
    return encoding, tensors


def bank_class(encoding: Any) -> Any:
    return affine.Bank if isinstance(encoding, AffineEncoding) else trellis.Bank


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "other dtype": lambda tensor: tensor.float(),
    "narrower dtype": lambda tensor: tensor.to(torch.int8),
    "shorter": lambda tensor: tensor[: len(tensor) // 2].clone(),
    "flat": lambda tensor: tensor.reshape(-1, 1),
    "without memory": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("key", KEYS)
def test_parts_that_do_not_fit_never_become_addresses(key: str, change: str) -> None:
    encoding, tensors = part(key)
    for name in tensors:
        wrong = {**tensors, name: CHANGES[change](tensors[name])}
        with pytest.raises(ShapeError):
            bank_class(encoding)([(encoding, wrong, INPUTS)])
        with pytest.raises(ShapeError):
            packed_linear(torch.ones(1, INPUTS), wrong, encoding, in_features=INPUTS)
        if change != "without memory":  # there torch multiplies, and looks itself
            with pytest.raises(ShapeError):
                packed_linear(torch.ones(500, INPUTS).requires_grad_(), wrong, encoding, in_features=INPUTS)


@pytest.mark.parametrize("key", KEYS)
def test_a_part_that_is_cast_later_is_noticed_at_the_next_product(key: str) -> None:
    encoding, tensors = part(key)
    parts = {name: torch.nn.Parameter(tensor.clone(), requires_grad=False) for name, tensor in tensors.items()}
    rows = torch.ones(1, INPUTS)
    expected = packed_linear(rows, parts, encoding, in_features=INPUTS)
    for _ in range(20):  # memory that is given back is given out again
        parts["scales"].data = parts["scales"].data.clone()
        assert torch.equal(packed_linear(rows, parts, encoding, in_features=INPUTS), expected)
        parts["scales"].data = torch.zeros(3, dtype=torch.uint8)
        with pytest.raises(ShapeError, match=r"scales: torch.uint8, stored as torch.float16"):
            packed_linear(rows, parts, encoding, in_features=INPUTS)
        parts["scales"].data = tensors["scales"].clone()


@pytest.mark.parametrize("key", KEYS)
def test_a_bank_whose_memory_is_gone_refuses(key: str) -> None:
    encoding, tensors = part(key)
    bank = bank_class(encoding)([(encoding, tensors, INPUTS)])
    assert bank.product(torch.ones(2, INPUTS)).shape == (2, OUTPUTS)
    tensors.pop("codes")
    with pytest.raises(McError, match="freed or exchanged"):
        bank.product(torch.ones(2, INPUTS))


def test_rows_and_slots_that_do_not_fit_are_refused() -> None:
    encoding, tensors = part("affine_b3_g8")
    bank: Any = bank_for([(encoding, tensors, INPUTS)] * 3)
    numbers = torch.zeros(4, dtype=torch.int64)
    wrong: list[tuple[Any, ...]] = [
        (torch.ones(2, INPUTS + 1), None, 1),
        (torch.ones(2, 2, INPUTS), None, 1),
        (torch.ones(2, INPUTS), numbers, 3),
        (torch.ones(2, INPUTS), numbers.int(), 2),
        (torch.ones(2, INPUTS), numbers.to("meta"), 2),
        (torch.ones(2, INPUTS, device="meta"), None, 1),
        (torch.ones(2**16, INPUTS), None, 2**16),
    ]
    for rows, experts, top_k in wrong[:-1]:
        with pytest.raises(ShapeError):
            bank.product(rows, experts, top_k=top_k)
    weights = torch.rand(2, 2)
    with pytest.raises(ShapeError, match="outputs of gate and up"):
        experts_output(bank, bank, torch.ones(2, INPUTS), numbers.view(2, 2), weights, "silu")
    with pytest.raises(ShapeError, match="weights"):
        experts_output(bank, bank, torch.ones(2, INPUTS), numbers.view(2, 2), weights[:1], "silu")


@pytest.mark.parametrize("key", ["trellis_b2_h24", "trellis_b2_h15", "trellis_b2_h3", "trellis_b2p5_h120"])
def test_blocks_that_are_no_powers_of_two_are_no_encoding(key: str) -> None:
    with pytest.raises(ArtifactError, match=f"{key}.*powers of two"):
        encoding_from_key(key)
    with pytest.raises(ShapeError, match="powers of two"):
        TrellisEncoding(Fraction(2), int(key.rpartition("h")[2]))


def test_widths_that_the_formats_have_not_are_no_encoding() -> None:
    for bits, group in ((0, 8), (9, 8), (2, 0), (2, 2**31)):
        with pytest.raises(ShapeError, match="affine grids have 1 to 8 bits"):
            AffineEncoding(bits, group)
    with pytest.raises(ShapeError, match="in half steps"):
        TrellisEncoding(Fraction(11, 4), 8)
    for key in ("affine_b2_g" + "9" * 5000, 5, None, ["affine_b2_g8"]):
        with pytest.raises(ArtifactError, match="Unknown weight encoding") as raised:
            encoding_from_key(key)
        assert len(str(raised.value)) < 400


def test_matrices_of_different_kinds_and_groups_share_no_bank() -> None:
    parts = [(*part("affine_b2_g8"), INPUTS), (*part("affine_b3_g16"), INPUTS)]
    assert bank_for(parts) is None
    with pytest.raises(ShapeError, match=r"groups of one size, not of \[8, 16\]"):
        affine.Bank(parts)
    assert bank_for([parts[0], (*part("trellis_b2_h8"), INPUTS)]) is None
    with pytest.raises(ShapeError, match="another kind"):
        trellis.Bank([(*part("trellis_b2_h8"), INPUTS), parts[0]])


def test_a_learned_router_of_another_shape_is_refused() -> None:
    tokens = Routed(torch.ones(3, 16), torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2))
    shapes = otp.learned_shapes(16, 2)
    assert shapes == {"weight": (1, 17), "bias": (1,)}
    for name, wrong in (("weight", (1, 1)), ("weight", (1, 16)), ("weight", (17, 1)), ("bias", (0,))):
        tensors = {key: torch.zeros(shape) for key, shape in (shapes | {name: wrong}).items()}
        rule = compiled_rule(otp, LayerValues(0, tensors=tensors), Cut(0.0, 8, True))
        assert rule is not None
        with pytest.raises(ShapeError, match=r"need \[1, 17\] and \[1\]"):
            rule(tokens)


def test_tokens_that_do_not_belong_together_and_odd_thresholds_are_refused() -> None:
    rule = compiled_rule(odp, LayerValues(0, numbers={odp.PROTECT_AT: 1.0}), Cut(0.3, 8, True))
    assert rule is not None
    index, weights = torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2)
    for hidden, numbers in ((torch.ones(2, 16), index), (torch.ones(3, 16), index[:, :1])):
        with pytest.raises(ShapeError, match="not of the same tokens"):
            rule(Routed(hidden, numbers, weights))
    with pytest.raises(ShapeError, match="attention received"):
        rule(Routed(torch.ones(3, 16), index, weights, torch.ones(2)))
    for threshold, absent in (("0.3", 8), (float("nan"), 8), (None, 8), (0.3, -1), (0.3, 2**31)):
        with pytest.raises(ShapeError, match="threshold"):
            Cut(threshold, absent, True)  # type: ignore[arg-type]
