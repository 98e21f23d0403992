"""The trellis quantizer: what is stored, what it minimises, and what its forecast is worth."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings import encoding_for, encoding_from_key, stored_bytes
from mc_cli.encodings.trellis import TrellisEncoding, trellis_for
from mc_cli.errors import ArtifactError, InputError, McError, ShapeError
from mc_cli.numerics import drawn_errors
from mc_cli.numerics.drawn_errors import noise
from mc_cli.numerics.hessian import trace_error
from mc_cli.numerics.rotation import rotate_back
from mc_cli.numerics.rounding import propagate
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.quantizers import Prepared, QuantizedLinear, quantizer_from_name
from mc_cli.quantizers.trellis import _Coder
from tests.dense_twin import _decode_trellis
from tests.numerics.twins import correlated_hessian

INPUTS = 64
COMPILED = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


def weights(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * (0.5 + torch.rand(shape[-2], 1, generator=generator))


def quantized(
    weight: Tensor, hessian: Tensor, bits: float, *, importance: Tensor | RowHessian | None = None, **settings: float
) -> QuantizedLinear:
    quantizer = quantizer_from_name("trellis", **settings)
    encoding = encoding_for("trellis", bits, *weight.shape[1:])
    prepared = quantizer.prepare(hessian, basis=encoding.basis)
    return quantizer.quantize(weight, prepared, encoding, row_importance=importance)


def matrix_of(result: QuantizedLinear) -> Tensor:
    return result.encoding.dequantize(result.tensors, INPUTS)


@pytest.mark.parametrize("outputs", [16, 24, 40, 272, 512])
@pytest.mark.parametrize("bits", [1, 1.5, 2, 3.5, 4, 4.5, 5])
def test_stored_tensors_are_as_specified_and_mean_what_is_documented(outputs: int, bits: float) -> None:
    weight, hessian = weights(2, outputs, INPUTS), correlated_hessian(2, INPUTS, seed=0)
    result = quantized(weight, hessian, bits)
    specs = result.encoding.tensor_specs(outputs, INPUTS)
    assert {name: (tuple(t.shape[1:]), str(t.dtype)) for name, t in result.tensors.items()} == {
        name: (spec.shape, f"torch.{spec.dtype}") for name, spec in specs.items()
    }
    assert stored_bytes(result.encoding, outputs, INPUTS) == -(-outputs // 16) * 16 * INPUTS * bits / 8 + 2 * outputs
    for item in range(2):
        twin = _decode_trellis(result.encoding.key, {name: t[item] for name, t in result.tensors.items()}.__getitem__)
        assert torch.allclose(matrix_of(result)[item], twin, atol=1e-5)
    loss = trace_error((weight - matrix_of(result)).double(), hessian.double())
    assert torch.allclose(result.proxy_loss, loss, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fewer_bytes_and_less_error_than_affine_grids(bits: int) -> None:
    weight, hessian = weights(2, 256, INPUTS), correlated_hessian(2, INPUTS, seed=1)
    affine = encoding_for("affine", bits, 256, INPUTS)
    gptq = quantizer_from_name("gptq")
    other = gptq.quantize(weight, gptq.prepare(hessian, basis=affine.basis), affine)
    result = quantized(weight, hessian, bits)
    assert stored_bytes(result.encoding, 256, INPUTS) < stored_bytes(affine, 256, INPUTS)
    assert bool((result.proxy_loss < 0.9 * other.proxy_loss).all())


def test_more_bits_are_better_in_every_half_step() -> None:
    weight, hessian = weights(1, 128, INPUTS), correlated_hessian(1, INPUTS, seed=2)
    losses = [float(quantized(weight, hessian, half / 2).proxy_loss) for half in range(2, 9)]
    assert all(more < 0.7 * fewer for fewer, more in pairwise(losses))


def test_errors_are_fed_back() -> None:
    """Under correlated inputs the loss is far below that of the same codes chosen without them."""
    weight, hessian = weights(1, 128, INPUTS), correlated_hessian(1, INPUTS, seed=3)
    alone = quantized(weight, torch.eye(INPUTS)[None], 2)
    assert float(quantized(weight, hessian, 2).proxy_loss) < 0.7 * float(
        trace_error(weight - matrix_of(alone), hessian)
    )


@pytest.mark.parametrize("bits", [1, 1.5, 3])
def test_as_much_is_left_along_the_weights_as_there_was(bits: float) -> None:
    """Row weights included. The nearest matrix is shorter, and this one is longer by one factor."""
    weight, hessian = weights(2, 96, INPUTS), correlated_hessian(2, INPUTS, seed=23)
    importance = 0.1 + torch.rand(2, 96, generator=torch.Generator().manual_seed(24))
    for given in (None, importance):
        matrix = matrix_of(quantized(weight, hessian, bits, importance=given))
        felt = (weight @ hessian) * (1.0 if given is None else given[..., None])
        assert torch.allclose((matrix * felt).sum((1, 2)), (weight * felt).sum((1, 2)), rtol=1e-3)


def test_a_matrix_that_is_mostly_lost_is_noted() -> None:
    """One input only, so that rotated rows have two values, which codes of one bit cannot follow."""
    weight = weights(1, 16, INPUTS)
    weight[:, :, 1:] = 0
    result = quantized(weight, torch.eye(INPUTS)[None], 1)
    assert bool(torch.isfinite(matrix_of(result)).all())
    (note,) = result.notes
    assert note.startswith("item 0: its codes lack ") and note.endswith("33% is made up for")
    assert quantized(weight, torch.eye(INPUTS)[None], 2).notes == ()


def test_scales_are_the_best_for_their_values_but_for_one_factor() -> None:
    weight, hessian = weights(1, 48, INPUTS), correlated_hessian(1, INPUTS, seed=4)
    matrix = matrix_of(quantized(weight, hessian, 1.5))
    best = matrix * float((matrix @ hessian * weight).sum() / (matrix @ hessian * matrix).sum())
    assert float((matrix / best).mean()) > 1.005
    for factor in (0.99, 1.01):  # float16 keeps a scale to 0.05 %
        rows = (weight - factor * best)[0].double(), (weight - best)[0].double()
        changed, kept = ((row @ hessian[0].double() * row).sum(-1) for row in rows)
        assert bool((changed > kept).all())


def test_sweeps_lower_the_error() -> None:
    weight, hessian = weights(2, 96, INPUTS), correlated_hessian(2, INPUTS, seed=5)
    losses = [quantized(weight, hessian, 2, sweeps=sweeps).proxy_loss for sweeps in (0, 1, 2)]
    assert bool((losses[1] < losses[0]).all()) and bool((losses[2] <= losses[1] * (1 + 1e-4)).all())


def test_important_rows_get_the_better_codes() -> None:
    weight, hessian = weights(1, 128, INPUTS), correlated_hessian(1, INPUTS, seed=6)
    importance = torch.ones(1, 128)
    importance[0, ::4] = 30.0
    plain, weighed = (quantized(weight, hessian, 2, importance=given) for given in (None, importance))

    def felt(result: QuantizedLinear) -> float:
        miss = weight - matrix_of(result)
        return float((importance * (miss @ hessian * miss).sum(-1)).sum())

    assert felt(weighed) < 0.75 * felt(plain)


def related(outputs: int, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, RowHessian]:
    """A Hessian of the outputs, of which some directions and the two halves are related; and its groups for trellis."""
    rows = torch.arange(outputs) % (outputs // 2)
    whole = correlated_hessian(batch, outputs, seed=seed) / outputs + 0.9 * (rows[:, None] == rows)
    whole = 0.7 * whole + 0.3 * torch.diag_embed(whole.diagonal(dim1=-2, dim2=-1))
    encoding = encoding_for("trellis", 2, outputs, INPUTS)
    groups = quantizer_from_name("trellis").row_groups(encoding, outputs)
    assert groups is not None
    padded = torch.nn.functional.pad(whole, (0, groups.numel() - outputs, 0, groups.numel() - outputs))
    return whole, RowHessian(padded[:, groups[:, :, None], groups[:, None]], groups)


@pytest.mark.parametrize("outputs", [24, 128, 512, 768])
def test_errors_are_fed_into_later_rows(outputs: int) -> None:
    weight, hessian = weights(8, outputs, INPUTS), correlated_hessian(8, INPUTS, seed=13)
    whole, row_hessian = related(outputs, batch=8, seed=14)
    plain = quantized(weight, hessian, 2, importance=whole.diagonal(dim1=-2, dim2=-1))
    fed = quantized(weight, hessian, 2, importance=row_hessian)

    def felt(result: QuantizedLinear) -> float:
        matrix = matrix_of(result)  # at the lengths at which they are nearest
        product = whole @ matrix @ hessian
        length = (product * weight).sum((1, 2)) / (product * matrix).sum((1, 2))
        miss = weight - length[:, None, None] * matrix
        return float((whole @ miss @ hessian * miss).sum())

    assert felt(fed) < (0.8 if outputs > 256 else 1.0) * felt(plain)
    assert fed.notes == plain.notes


@COMPILED
# items: with a Hessian for both, or one each. 768 outputs have three rings in one group, which takes long in torch.
@pytest.mark.parametrize(
    ("outputs", "related_rows", "items"),
    [(24, False, 1), (24, False, 2), (24, True, 1), (24, True, 2), (128, False, 2), (128, True, 1), (768, True, 2)],
)
def test_compiled_panels_are_the_torch_columns(
    monkeypatch: pytest.MonkeyPatch, outputs: int, related_rows: bool, items: int
) -> None:
    """Sums are in another order, so a code that is as good as another may be another: few are.

    Errors are fed into all that comes after, so a tie at an early input changes most of an item: these seeds have none.
    """
    inputs = 16 if outputs == 768 else INPUTS
    weight, hessian = weights(2, outputs, inputs), correlated_hessian(items, inputs, seed=29)
    importance = related(outputs, batch=2, seed=20)[1] if related_rows else None
    found = quantized(weight, hessian, 1.5, importance=importance)
    monkeypatch.setattr(native, "library", lambda: None)
    expected = quantized(weight, hessian, 1.5, importance=importance)
    same = (found.tensors["codes"] == expected.tensors["codes"]).float().mean()
    assert same > 0.9
    assert torch.allclose(found.proxy_loss, expected.proxy_loss, rtol=0.01)


def test_unrelated_rows_are_coded_by_importance_alone() -> None:
    weight, hessian = weights(1, 128, INPUTS), correlated_hessian(1, INPUTS, seed=15)
    row_hessian = RowHessian(torch.eye(128)[None, None], torch.arange(128)[None])
    plain, given = quantized(weight, hessian, 2), quantized(weight, hessian, 2, importance=row_hessian)
    assert torch.equal(plain.tensors["codes"], given.tensors["codes"])
    assert torch.allclose(plain.tensors["scales"].float(), given.tensors["scales"].float(), rtol=1e-3)


def test_groups_of_rows_hold_every_row_once_and_partners_together() -> None:
    quantizer = quantizer_from_name("trellis")
    for outputs in (16, 24, 256, 512, 768, 1280, 2816):
        groups = quantizer.row_groups(encoding_for("trellis", 2, outputs, INPUTS), outputs)
        assert groups is not None and groups.flatten().sort().values.tolist() == list(range(-(-outputs // 16) * 16))
    paired = quantizer.row_groups(encoding_for("trellis", 2, 1024, INPUTS), 1024)
    assert paired is not None and torch.equal(paired[:, :256] + 512, paired[:, 256:])
    assert quantizer.row_groups(encoding_for("affine", 2, 1024, INPUTS), 1024) is None


def test_rings_that_are_no_pairs_are_noted() -> None:
    weight, hessian = weights(2, 1280, INPUTS), correlated_hessian(2, INPUTS, seed=16)
    notes = quantized(weight, hessian, 1, importance=related(1280, batch=2)[1]).notes
    assert notes == tuple(
        f"item {item}: 5 rings of 256 rows are no pairs: errors are fed into later rows of the same ring only"
        for item in range(2)
    )


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_forecast_is_as_wrong_as_the_search(bits: int) -> None:
    weight, hessian = weights(3, 256, INPUTS), correlated_hessian(3, INPUTS, seed=7)
    quantizer = quantizer_from_name("trellis")
    encoding = encoding_for("trellis", bits, 256, INPUTS)
    prepared = quantizer.prepare(hessian, basis=encoding.basis)
    forecast = trace_error(weight - quantizer.forecast(weight, prepared, encoding), hessian)
    ratio = forecast / quantizer.quantize(weight, prepared, encoding).proxy_loss
    assert bool(((ratio > 0.8) & (ratio < 1.25)).all()), ratio


@pytest.mark.parametrize("way", [pytest.param("compiled", marks=COMPILED), "torch"])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("tokens", [2, 40, 4000])  # fewer than inputs: errors are handed on with little loss
def test_forecasts_are_drawn_as_if_column_by_column(
    bits: int, tokens: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr(drawn_errors, "native", SimpleNamespace(library=lambda: None))
    inputs = 160
    generator = torch.Generator().manual_seed(bits)
    mixing = torch.eye(inputs) + 0.1 * torch.randn(inputs, inputs, generator=generator)
    drawn = torch.randn(2, tokens, inputs, generator=generator) @ mixing
    weight, hessian = weights(2, 48, inputs), drawn.mT @ drawn
    quantizer, encoding = quantizer_from_name("trellis"), encoding_for("trellis", bits, 48, inputs)
    prepared = quantizer.prepare(hessian, basis=encoding.basis)
    forecast = quantizer.forecast(weight, prepared, encoding)
    expected = _drawn_column_by_column(weight, prepared, encoding)
    close = 0.01 if way == "torch" else 1e-4
    assert float((forecast - expected).norm() / (expected - weight).norm()) < close
    again = quantizer.forecast(weight, prepared, encoding)  # by what was remembered
    other = quantizer.forecast(weight.clone(), prepared, encoding)
    assert torch.equal(again, forecast) and torch.equal(other, forecast)


def _drawn_column_by_column(weight: Tensor, prepared: Prepared, encoding: TrellisEncoding) -> Tensor:
    """The same noise, each column with the errors of all before it; scales by products with the Hessian."""
    coder = _Coder(weight, prepared, encoding, None, quick=False)
    error, count = coder._sampled_error(), weight.shape[-1]
    random = noise(0, count, error.shape[-1], seed=0)
    kept, divisors, scales = 1 - error, coder._divisors(), coder._scales
    size = (error * kept / error.shape[-1]).sqrt()

    def draw(position: int, column: Tensor) -> Tensor:
        wanted = column / divisors
        values = kept * wanted + random[position] * size * wanted.norm(dim=-1, keepdim=True)
        coder._values[:, position] = values
        return values * scales

    propagate(coder._columns, coder._factor, draw)
    coder._refit()
    coder.lengthen()
    return rotate_back(coder.matrix(), encoding.block)


@COMPILED
def test_threads_that_share_a_matrix_draw_the_same_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(1, 70, 4500, generator=generator)  # outputs of five threads, the last with few
    factor = torch.eye(70) + 0.1 * torch.randn(70, 70, generator=generator).triu(1)
    given = {"scales": columns.square().mean(1).sqrt(), "error": torch.full((1, 4500), 0.1)}
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(drawn_errors.drawn_values(columns, factor[None], **given, seed=0))
    finally:
        torch.set_num_threads(before)
    close = {"rtol": 1e-5, "atol": 1e-6}  # products of torch's own before them add up in another order
    for alone, shared in zip(*found, strict=True):
        assert torch.equal(alone[:, :64], shared[:, :64])
        torch.testing.assert_close(shared, alone, **close)


def test_what_a_forecast_remembers_is_not_taken_for_another_basis() -> None:
    weight, hessian = weights(1, 64, INPUTS), correlated_hessian(1, INPUTS, seed=5)
    quantizer, encoding = quantizer_from_name("trellis"), encoding_for("trellis", 2, 64, INPUTS)
    prepared = quantizer.prepare(hessian, basis=encoding.basis)
    quantizer.forecast(weight, prepared, encoding)
    with pytest.raises(ShapeError, match="prepared for"):
        quantizer.forecast(weight, prepared, trellis_for(2, INPUTS // 2))


def test_noise_is_nearly_normal_and_of_independent_places() -> None:
    whole = noise(0, 512, 384, seed=3)
    assert torch.equal(noise(100, 30, 384, seed=3), whole[100:130])
    assert not torch.equal(noise(0, 512, 384, seed=4), whole)
    assert abs(float(whole.mean())) < 0.01 and abs(float(whole.var()) - 1) < 0.01
    assert 2.6 < float(whole.pow(4).mean()) < 2.8  # a normal one has 3
    columns, rows = torch.corrcoef(whole), torch.corrcoef(whole.T)
    for correlation, count in ((columns, 384), (rows, 512)):
        beside = correlation[~torch.eye(len(correlation), dtype=torch.bool)]
        assert abs(float(beside.std()) * count**0.5 - 1) < 0.05  # as of independent numbers


def test_equal_inputs_give_equal_bytes_and_items_do_not_mix() -> None:
    weight, hessian = weights(3, 64, INPUTS), correlated_hessian(3, INPUTS, seed=8)
    together, again = quantized(weight, hessian, 2.5), quantized(weight, hessian, 2.5)
    alone = quantized(weight[1:2], hessian[1:2], 2.5)
    for name, tensor in together.tensors.items():
        assert torch.equal(tensor, again.tensors[name]) and torch.equal(tensor[1:2], alone.tensors[name])


def test_one_hessian_serves_all_items() -> None:
    weight, hessian = weights(2, 32, INPUTS), correlated_hessian(1, INPUTS, seed=9)
    shared, repeated = quantized(weight, hessian, 2), quantized(weight, hessian.expand(2, -1, -1), 2)
    assert all(torch.equal(tensor, repeated.tensors[name]) for name, tensor in shared.tensors.items())


def test_rows_of_zeros_stay_zero() -> None:
    weight = weights(1, 32, INPUTS)
    weight[0, 5] = 0
    result = quantized(weight, correlated_hessian(1, INPUTS, seed=10), 2)
    assert not matrix_of(result)[0, 5].any() and bool(torch.isfinite(matrix_of(result)).all())


def test_wide_widths_and_few_outputs_get_affine_grids() -> None:
    assert encoding_for("trellis", 8, 64, INPUTS).key == "affine_b8_g64"
    assert encoding_for("trellis", 4, 8, INPUTS).key == "affine_b4_g64"
    weight, hessian = weights(1, 32, INPUTS), correlated_hessian(1, INPUTS, seed=11)
    assert quantized(weight, hessian, 8).encoding.key == "affine_b8_g64"
    with pytest.raises(ShapeError, match="affine grids have whole widths"):
        encoding_for("affine", 2.5, 64, INPUTS)


def test_keys_name_encodings() -> None:
    for bits in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5):
        encoding = encoding_for("trellis", bits, 32, 96)
        assert encoding_from_key(encoding.key) == encoding and encoding.bits == bits and "." not in encoding.key
    for key in ("trellis_b6_h32", "trellis_b5p5_h32", "trellis_b2_h0", "trellis_b2"):
        with pytest.raises(ArtifactError, match="Unknown weight encoding"):
            encoding_from_key(key)


def test_what_does_not_fit_is_refused() -> None:
    weight, hessian = weights(1, 32, INPUTS), correlated_hessian(1, INPUTS, seed=12)
    quantizer = quantizer_from_name("trellis")
    encoding = encoding_for("trellis", 2, 32, INPUTS)
    prepared = quantizer.prepare(hessian, basis="h32")
    with pytest.raises(ShapeError, match="prepared for h32, asked for trellis_b2_h64"):
        quantizer.quantize(weight, prepared, encoding)
    with pytest.raises(InputError, match="needs calibration data"):
        quantizer.prepare(None, basis=encoding.basis)
    fitting = quantizer.prepare(hessian, basis=encoding.basis)
    with pytest.raises(McError, match="not finite"):
        quantizer.quantize(weight * torch.nan, fitting, encoding)
    with pytest.raises(ShapeError, match="does not fit float16"):
        quantizer.quantize(weight * 1e6, fitting, encoding)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_forecasts_of_dead_experts_and_rows_are_zeros(bits: int) -> None:
    weight, hessian = weights(3, 48, INPUTS), correlated_hessian(3, INPUTS, seed=18)
    weight[0], weight[1, 3], hessian[2] = 0, 0, 0  # an expert, a row; and an expert that saw no tokens
    quantizer, encoding = quantizer_from_name("trellis"), encoding_for("trellis", bits, 48, INPUTS)
    forecast = quantizer.forecast(weight, quantizer.prepare(hessian, basis=encoding.basis), encoding)
    assert not forecast[0].any() and not forecast[1, 3].any()
    assert bool(torch.isfinite(forecast).all()) and bool(forecast[2].any())
