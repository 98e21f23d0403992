"""Every quantizer: what it stores, what it reports, what it refuses. And that GPTQ is worth its name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mc_cli.encodings import encoding_from_key
from mc_cli.errors import InputError, McError, ShapeError
from mc_cli.quantizers import Prepared, quantizer_from_name, quantizer_names
from tests.numerics.twins import column_by_column, correlated_hessian, decoded, loss, nearest, weights

KINDS = [
    pytest.param("rtn", {}, id="rtn"),
    pytest.param("rtn", {"clip_search": True}, id="rtn-clip"),
    pytest.param("gptq", {}, id="gptq"),
    pytest.param("gptq", {"sweeps": 0}, id="gptq-plain"),
    pytest.param("gptq", {"sweeps": 1, "activation_order": False}, id="gptq-natural"),
]
WIDTHS = range(1, 9)
INPUTS, GROUP = 48, 16


def affine(bits, group_size=GROUP):
    return encoding_from_key(f"affine_b{bits}_g{group_size}")


def quantized(name, settings, weight, hessian, bits):
    quantizer = quantizer_from_name(name, **settings)
    return quantizer.quantize(weight, quantizer.prepare(hessian, basis=f"g{GROUP}"), affine(bits))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("name", "settings"), KINDS)
def test_stored_tensors_decode_to_the_reported_loss(name, settings, bits):
    weight, hessian = weights(2, 5, INPUTS, seed=bits), correlated_hessian(2, INPUTS, seed=bits)
    copies = weight.clone(), hessian.clone()
    result = quantized(name, settings, weight, hessian, bits)
    specs = affine(bits).tensor_specs(5, INPUTS)
    assert {part: (tuple(tensor.shape[1:]), str(tensor.dtype)) for part, tensor in result.tensors.items()} == {
        part: (spec.shape, f"torch.{spec.dtype}") for part, spec in specs.items()
    }
    assert all(tensor.is_contiguous() and len(tensor) == 2 for tensor in result.tensors.values())
    values = decoded(result.tensors, bits, INPUTS)
    torch.testing.assert_close(affine(bits).dequantize(result.tensors, INPUTS).double(), values, rtol=1e-6, atol=1e-12)
    assert result.proxy_loss.dtype == torch.float64
    torch.testing.assert_close(result.proxy_loss, loss(weight, values, hessian), rtol=1e-4, atol=0)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])
    assert result.encoding == affine(bits) and result.notes == ()


@pytest.mark.parametrize("bits", WIDTHS)
def test_gptq_beats_rounding_and_every_part_of_it_helps(bits):
    weight, hessian = weights(3, 24, INPUTS, seed=bits), correlated_hessian(3, INPUTS, seed=bits + 10)
    losses = [
        quantized(name, settings, weight, hessian, bits).proxy_loss
        for name, settings in (
            ("rtn", {"clip_search": True}),
            ("gptq", {"sweeps": 0, "activation_order": False}),
            ("gptq", {"sweeps": 0}),
            ("gptq", {}),
        )
    ]
    assert bool((quantized("rtn", {}, weight, hessian, bits).proxy_loss > losses[1]).all())
    assert bool((losses[1] < 0.8 * losses[0]).all())
    assert float(losses[2].log().mean()) < float(losses[1].log().mean())
    assert bool((losses[3] < 0.95 * losses[2]).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_clip_search_more_than_pays_at_few_bits(bits):
    weight, hessian = weights(2, 16, INPUTS, seed=0), correlated_hessian(2, INPUTS, seed=1)
    plain = quantized("rtn", {}, weight, hessian, bits).proxy_loss
    searched = quantized("rtn", {"clip_search": True}, weight, hessian, bits).proxy_loss
    assert bool((searched < (0.85 if bits == 2 else 0.95) * plain).all())


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("activation_order", [False, True])
def test_plain_gptq_is_the_definition_from_end_to_end(bits, activation_order):
    weight, hessian = weights(1, 6, INPUTS, seed=bits), correlated_hessian(1, INPUTS, seed=bits)
    settings = {"sweeps": 0, "activation_order": activation_order, "damping": 0.05}
    result = quantized("gptq", settings, weight, hessian, bits)
    order = hessian[0].diagonal().argsort(descending=True) if activation_order else torch.arange(INPUTS)
    damped = hessian[0].double() + 0.05 * hessian[0].double().diagonal().mean() * torch.eye(INPUTS)
    scales = result.tensors["scales"][0].double().repeat_interleave(GROUP, 1)
    zero_points = result.tensors["zero_points"][0].double().repeat_interleave(GROUP, 1) / 2 ** (8 - bits)
    codes = torch.empty_like(scales)
    codes[:, order] = column_by_column(
        weight[0][:, order], damped[order][:, order], scales[:, order], zero_points[:, order], bits
    )
    differing = decoded(result.tensors, bits, INPUTS)[0] != (codes - zero_points) * scales
    assert float(differing.double().mean()) < 0.01, "more than float32 ties explain"


@pytest.mark.parametrize(("name", "settings"), KINDS)
def test_a_batch_is_its_items_and_a_shared_hessian_is_repeated_ones(name, settings):
    weight, hessian = weights(3, 6, INPUTS, seed=0), correlated_hessian(3, INPUTS, seed=0)
    batch = quantized(name, settings, weight, hessian, 2)
    for item in range(3):
        alone = quantized(name, settings, weight[item : item + 1], hessian[item : item + 1], 2)
        torch.testing.assert_close(alone.proxy_loss, batch.proxy_loss[item : item + 1], rtol=1e-3, atol=0)
        same = decoded(alone.tensors, 2, INPUTS) == decoded(batch.tensors, 2, INPUTS)[item]
        assert float(same.double().mean()) > 0.97
    shared = quantized(name, settings, weight, hessian[:1], 2)
    repeated = quantized(name, settings, weight, hessian[:1].repeat(3, 1, 1), 2)
    torch.testing.assert_close(shared.proxy_loss, repeated.proxy_loss, rtol=1e-3, atol=0)
    again = quantized(name, settings, weight, hessian, 2)
    assert all(torch.equal(again.tensors[part], batch.tensors[part]) for part in batch.tensors)


@pytest.mark.parametrize(("name", "settings"), KINDS)
def test_eight_bits_lose_next_to_nothing_and_keep_the_order_of_inputs(name, settings):
    weight, hessian = weights(2, 8, INPUTS, seed=3), correlated_hessian(2, INPUTS, seed=3)
    result = quantized(name, settings, weight, hessian, 8)
    assert bool((result.proxy_loss < 5e-5 * loss(weight, torch.zeros_like(weight), hessian)).all())
    assert float((decoded(result.tensors, 8, INPUTS) - weight).abs().max()) < 0.05 * float(weight.abs().max())


@pytest.mark.parametrize("sweeps", [0, 3])
def test_dead_inputs_are_rounded_to_nearest_and_reported(sweeps):
    weight, hessian = weights(1, 8, INPUTS, seed=4), correlated_hessian(1, INPUTS, seed=4)
    dead = [3, 20]
    for place in dead:
        hessian[:, place] = hessian[:, :, place] = 0
    result = quantized("gptq", {"sweeps": sweeps, "activation_order": False}, weight, hessian, 3)
    assert result.notes == (f"item 0: 2 of {INPUTS} inputs were zero on every token, rounded on their own",)
    values = decoded(result.tensors, 3, INPUTS)
    if sweeps == 0:  # sweeps refit grids for the other inputs after the dead ones are rounded
        for place in dead:
            scales, zero_points = (
                result.tensors[part][0, :, place // GROUP].double() for part in ("scales", "zero_points")
            )
            expected = nearest(weight[0, :, place : place + 1], scales, zero_points / 32, 3)
            torch.testing.assert_close(values[0, :, place : place + 1], expected, rtol=1e-6, atol=1e-12)
    without = [place for place in range(INPUTS) if place not in dead]
    live = loss(weight[..., without], values[..., without], hessian[:, without][:, :, without])
    torch.testing.assert_close(result.proxy_loss, live, rtol=1e-4, atol=0)


def test_a_singular_hessian_is_reported_and_no_data_means_nearest():
    weight = weights(2, 4, INPUTS, seed=5)
    hessian = torch.stack([torch.ones(INPUTS, INPUTS), torch.zeros(INPUTS, INPUTS)])
    result = quantized("gptq", {"damping": 0.0}, weight, hessian, 2)
    assert [note.split(",")[0] for note in result.notes] == ["item 0: singular Hessian", "item 1: no calibration data"]
    assert float(result.proxy_loss[1]) == 0.0
    tensors = {part: tensor[1].unflatten(-1, (3, -1)) for part, tensor in result.tensors.items()}
    scales, zero_points = tensors["scales"].squeeze(-1), tensors["zero_points"].squeeze(-1) / 64
    expected = nearest(weight[1].unflatten(-1, (3, -1)), scales, zero_points, 2).flatten(-2)
    torch.testing.assert_close(decoded(result.tensors, 2, INPUTS)[1], expected, rtol=1e-6, atol=1e-12)
    assert quantized("gptq", {}, weight, hessian, 2).notes == result.notes[1:]


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_one_preparation_serves_all_widths(name):
    weight, hessian = weights(1, 4, INPUTS, seed=7), correlated_hessian(1, INPUTS, seed=7)
    quantizer = quantizer_from_name(name)
    prepared = quantizer.prepare(hessian, basis=f"g{GROUP}")
    for bits in (3, 2, 3):
        found = quantizer.quantize(weight, prepared, affine(bits))
        fresh = quantized(name, {}, weight, hessian, bits)
        assert all(torch.equal(found.tensors[part], fresh.tensors[part]) for part in fresh.tensors)


def test_rounding_needs_no_hessian_and_has_no_loss_then():
    quantizer = quantizer_from_name("rtn", clip_search=True)
    result = quantizer.quantize(weights(2, 3, INPUTS, seed=0), quantizer.prepare(None, basis=f"g{GROUP}"), affine(4))
    assert bool(result.proxy_loss.isnan().all())
    with pytest.raises(InputError, match="use the quantizer rtn"):
        quantizer_from_name("gptq").prepare(None, basis=f"g{GROUP}")


@dataclass(frozen=True)
class Foreign:
    """An encoding that is not affine."""

    key: str = "foreign"


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_what_does_not_fit_is_refused(name):
    weight, hessian = weights(2, 3, INPUTS, seed=0), correlated_hessian(2, INPUTS, seed=0)
    quantizer = quantizer_from_name(name)
    prepared = quantizer.prepare(hessian, basis=f"g{GROUP}")
    with pytest.raises(ShapeError, match="not foreign"):
        quantizer.quantize(weight, prepared, Foreign())
    with pytest.raises(ShapeError, match="prepared for g16, asked for affine_b2_g24"):
        quantizer.quantize(weight, prepared, affine(2, 24))
    with pytest.raises(ShapeError, match="does not divide"):
        quantizer.quantize(weight, prepared, affine(2, 20))
    with pytest.raises(ShapeError, match=r"\[batch, out_features, in_features\]"):
        quantizer.quantize(weight[0], prepared, affine(2))
    with pytest.raises(ShapeError, match="do not belong"):
        quantizer.quantize(weights(3, 3, INPUTS, seed=0), prepared, affine(2))
    with pytest.raises(McError, match="non-finite"):
        quantizer.quantize(weight * torch.inf, prepared, affine(2))


def test_gptq_refuses_the_preparation_of_another_quantizer():
    weight = weights(1, 3, INPUTS, seed=0)
    with pytest.raises(InputError, match="another quantizer"):
        quantizer_from_name("gptq").quantize(
            weight, Prepared(correlated_hessian(1, INPUTS, seed=0), f"g{GROUP}"), affine(2)
        )


def test_quantizers_are_found_and_unknown_names_and_settings_refused():
    assert quantizer_names() == ["gguf", "gptq", "integer", "mlx", "rtn", "trellis"]
    assert [quantizer_from_name(name).name for name in quantizer_names()] == quantizer_names()
    known = ", ".join(quantizer_names())
    with pytest.raises(InputError, match=rf"Unknown quantizer 'awq'\. Known quantizers: {known}"):
        quantizer_from_name("awq")
    with pytest.raises(InputError, match="bits"):
        quantizer_from_name("rtn", bits=3)
    with pytest.raises(InputError, match="0 or more, not -1"):
        quantizer_from_name("gptq", damping=-1)
