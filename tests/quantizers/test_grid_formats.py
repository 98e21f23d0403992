"""Quantizers for formats of others: what they store is read by the formats' own arithmetic, bit by bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from mc_cli.encodings import encoding_for, encoding_from_key
from mc_cli.errors import ShapeError
from mc_cli.numerics.grid_rules import BIASES, MIDDLE_ZERO, WHOLE_ZEROS, GridRule, short
from mc_cli.numerics.grids import minmax_grid, search_grid
from mc_cli.quantizers import QuantizedLinear, quantizer_from_name
from tests.numerics.twins import correlated_hessian, loss, weights

INPUTS = 64
KEYS = [f"mlx_b{bits}_g32" for bits in (2, 3, 4, 5, 6, 8)] + [f"integer_b{bits}_g32" for bits in (2, 3, 4, 8)]


def codes_of(rows: Tensor, bits: int) -> npt.NDArray[np.int64]:
    """Codes [..., n] of a little-endian bit stream uint8 [..., bytes], from single bits."""
    single = np.unpackbits(rows.numpy(), axis=-1, bitorder="little")
    fields = single.reshape(*single.shape[:-1], -1, bits).astype(np.int64)
    return (fields << np.arange(bits)).sum(-1)


def values(key: str, tensors: dict[str, Tensor]) -> Tensor:
    """float64: scale * code + bias for MLX, scale * (code - zero) for the others."""
    family, width, group = key.split("_")
    bits = int(width[1:])
    codes = torch.from_numpy(codes_of(tensors["codes"], bits)).double()
    parts = {name: part.double().repeat_interleave(int(group[1:]), -1) for name, part in tensors.items()}
    if family == "mlx":
        return parts["scales"] * codes + parts["biases"]
    zero = parts.get("zero_points", torch.full_like(codes, 2 ** (bits - 1)))
    return parts["scales"] * (codes - zero)


def made(name: str, key: str, weight: Tensor, hessian: Tensor, **settings: object) -> QuantizedLinear:
    quantizer = quantizer_from_name(name, **settings)
    return quantizer.quantize(weight, quantizer.prepare(hessian, basis="g32"), encoding_from_key(key))


@pytest.mark.parametrize("key", KEYS)
def test_what_is_stored_is_the_formats_and_its_loss_is_told(key: str) -> None:
    weight, hessian = weights(2, 32, INPUTS, seed=1), correlated_hessian(2, INPUTS, seed=1)
    found = made(key.split("_")[0], key, weight, hessian)
    expected = values(key, found.tensors)
    decoded = encoding_from_key(key).dequantize(found.tensors, INPUTS)
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.proxy_loss, loss(weight, expected, hessian), rtol=1e-4, atol=0)
    for part in found.tensors.keys() & {"scales", "biases"}:  # the same numbers in whatever dtype an engine computes
        assert torch.equal(found.tensors[part].half().float(), found.tensors[part].float())
    if "zero_points" in found.tensors:
        assert int(found.tensors["zero_points"].min()) >= 1


@pytest.mark.parametrize("key", KEYS)
def test_feedback_on_the_formats_grid_is_what_is_done(key: str) -> None:
    """Far better than rounding; as good as our own grids where there are biases; else better than moving those."""
    family, width, _ = key.split("_")
    weight, hessian = weights(2, 32, INPUTS, seed=2), correlated_hessian(2, INPUTS, seed=3)
    best = float(made(family, key, weight, hessian).proxy_loss.sum())
    assert best < 0.8 * float(made("rtn", key, weight, hessian, clip_search=True).proxy_loss.sum())
    ours = made("gptq", f"affine_{width}_g32", weight, hessian)
    if family == "mlx":
        assert best < 1.05 * float(ours.proxy_loss.sum())
        return
    decoded = ours.encoding.dequantize(ours.tensors, INPUTS).unflatten(-1, (-1, 32))
    nearest = minmax_grid(decoded, bits=int(width[1:]), rule=encoding_from_key(key).rule)
    moved = nearest.values(nearest.codes(decoded)).flatten(-2)
    assert best < 0.9 * float(loss(weight, moved.double(), hessian).sum())


@pytest.mark.parametrize("rule", [BIASES, WHOLE_ZEROS, MIDDLE_ZERO])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 300.0])
def test_grids_are_stored_exactly_and_search_is_never_worse(rule: GridRule, scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 5, 32) * scale + scale
    weight[0, 0] = 0
    plain, found = minmax_grid(weight, bits=4, rule=rule), search_grid(weight, bits=4, rule=rule)
    for grid in (plain, found):
        stored = {name: part.float() for name, part in grid.stored().items()}
        assert torch.equal(stored["scales"], grid.scales) and bool((grid.scales > 0).all())
        if rule is BIASES:
            offset = stored["biases"].unsqueeze(-1) + stored["scales"].unsqueeze(-1) * grid.codes(weight)
            torch.testing.assert_close(grid.values(grid.codes(weight)), offset, rtol=1e-5, atol=scale * 1e-6)
        elif rule is WHOLE_ZEROS:
            assert torch.equal(stored["zero_points"], grid.zero_points)
        assert not bool(grid.values(grid.codes(weight))[0, 0].any())
    errors = [(grid.values(grid.codes(weight)) - weight).square().sum(-1) for grid in (found, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


def test_short_numbers_survive_every_dtype_and_are_near() -> None:
    numbers = torch.cat([torch.logspace(-8, 4.8, 4001), -torch.logspace(-6, 4.8, 997), torch.zeros(1)])
    rounded = short(numbers)
    assert torch.equal(rounded.bfloat16().float(), rounded) and torch.equal(rounded.half().float(), rounded)
    normal = numbers.abs() >= 2.0**-14
    assert float(((rounded - numbers).abs() / numbers.abs())[normal].max()) <= 2.0**-8
    assert float((rounded - numbers)[~normal].abs().max()) <= 2.0**-22


def test_a_bias_beyond_the_dtypes_is_refused() -> None:
    with pytest.raises(ShapeError, match="keep this tensor at 16 bits"):
        minmax_grid(torch.full((1, 1, 32), -65400.0), bits=4, rule=BIASES)


def test_groups_are_the_largest_that_divide_rows() -> None:
    for family in ("mlx", "integer"):
        keys = [encoding_for(family, 4, 32, inputs).key for inputs in (1408, 192, 96, 2880)]
        assert [key.split("_g")[1] for key in keys] == ["128", "64", "32", "64"]
        assert encoding_for(family, 4, 32, 1408, group_size_limit=64).key == f"{family}_b4_g64"
