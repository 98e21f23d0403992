"""Trellis codes against enumeration, the torch search against the compiled one, and errors against what is stated."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mc_cli import native
from mc_cli.errors import ShapeError
from mc_cli.kernels.compiled import PATHS, best_path
from mc_cli.numerics.trellis import (
    _reversed_bits,
    _ring_states,
    check_rate,
    decode,
    decode_windows,
    encode,
    encode_in_torch,
    encode_panel,
    encode_together,
    offsets,
)
from mc_cli.numerics.trellis_code import CODES, RATES, UNIT, code_values

ERRORS = dict(
    zip(RATES, (0.2713, 0.1387, 0.0702, 0.0358, 0.0182, 0.0093, 0.0050, 0.0028, 0.00168), strict=True)
)  # as documented


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(codes: Tensor) -> list[int]:
    """The bits of one sequence, in the order of the ring."""
    return [(byte >> bit) & 1 for byte in codes.tolist() for bit in range(8)]


def values_of(ring: list[int], length: int, rate: Fraction) -> list[float]:
    """Decodes a ring of bits window by window, from the format's description."""
    values = []
    for place in range(length):
        first = place * rate.numerator // rate.denominator
        window = sum(ring[(first + bit) % len(ring)] << bit for bit in range(12))
        parts, levels = (bytes.fromhex(text) for text in CODES[rate])
        mixed = parts[window % 16] ^ parts[16 + window // 16 % 16] ^ parts[32 + window // 256]
        level = (levels[mixed % 64] + 128) % 256 - 128
        values.append((-level if mixed >= 128 else level) * UNIT)
    return values


@pytest.mark.parametrize("rate", RATES, ids=float)
def test_values_are_those_that_the_bits_say(rate: Fraction) -> None:
    for length in (16, 48, 256):
        codes, values = encode(normal(3, length), rate)
        assert codes.shape == (3, int(length * rate) // 8)
        assert torch.equal(decode(codes, rate), values)
        expected = torch.tensor([values_of(bits_of(row), length, rate) for row in codes])
        assert torch.allclose(values, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rate", "seam"), [(Fraction(1), 11), (Fraction(3, 2), 10)], ids=["1", "1.5"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_ring_with_the_same_seam_is_better(rate: Fraction, seam: int, weighted: bool) -> None:
    """All rings of 16 weights that share the bits across the seam, one by one."""
    length = 16
    targets = normal(2, length, seed=1)
    weights = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) + 0.05 if weighted else None
    codes, values = encode(targets, rate, weights)
    for row in range(2):
        weight = torch.ones(length) if weights is None else weights[row]
        found = float((weight * (values[row] - targets[row]).square()).sum())
        fixed = bits_of(codes[row])[:seam]
        rest = itertools.product((0, 1), repeat=int(length * rate) - seam)
        rings = [values_of([*fixed, *bits], length, rate) for bits in rest]
        best = float((weight * (torch.tensor(rings) - targets[row]).square()).sum(1).min())
        assert found == pytest.approx(best, rel=1e-4)


def test_seams_are_nearly_the_best() -> None:
    """Beside searches that are held to each of the 1024 seams there are at 2 bits; a look at both sides lost 6 %."""
    count, length, rate = 4, 64, Fraction(2)
    targets, weights = normal(count, length, seed=11), normal(count, length, seed=12).exp()
    found = (weights * (encode(targets, rate, weights)[1] - targets).square()).sum(1)
    by_state = code_values(rate)[_reversed_bits()]
    least = []
    for target, weight in zip(targets, weights, strict=True):
        each = target.expand(1024, -1), weight.expand(1024, -1)
        states, closed, _ = _ring_states(*each, rate, by_state, None, torch.arange(1024))
        assert bool(closed.all())
        least.append((weight * (by_state[states] - target).square()).sum(1).min())
    assert bool((found >= torch.stack(least) * (1 - 1e-5)).all())
    assert found.sum() < 1.03 * torch.stack(least).sum()


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.parametrize("rate", RATES, ids=float)
@pytest.mark.parametrize("length", [16, 96, 256])
def test_compiled_search_is_the_torch_search(rate: Fraction, length: int) -> None:
    targets, weights = normal(9, length, seed=3), normal(9, length, seed=4).abs() + 0.01
    for given in (None, weights):
        codes, values = encode(targets, rate, given)
        grouped = None if given is None else given[:, None]
        expected_codes, expected_values = encode_in_torch(targets[:, None], rate, grouped, None)
        assert torch.equal(codes, expected_codes[:, 0]) and torch.equal(values, expected_values[:, 0])


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.parametrize("rate", RATES, ids=float)
@pytest.mark.parametrize(("rings", "length"), [(3, 16), (2, 96), (1, 256)])
def test_compiled_feedback_is_that_of_torch(rate: Fraction, rings: int, length: int) -> None:
    targets, weights = normal(2, rings, length, seed=6), normal(2, rings, length, seed=7).abs() + 0.01
    feedback = 0.05 * normal(2, rings * length, rings * length, seed=8)
    found = encode_together(targets, rate, weights, feedback)
    assert all(
        torch.equal(*pair) for pair in zip(found, encode_in_torch(targets, rate, weights, feedback), strict=True)
    )
    assert torch.equal(decode(found[0], rate), found[1])
    assert not torch.equal(found[1], encode_together(targets, rate, weights, None)[1])


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.parametrize("path", [path for path in sorted(PATHS) if path < 3], ids=lambda path: PATHS[path])
@pytest.mark.parametrize("rate", RATES, ids=float)
def test_every_path_of_the_compiled_search_is_the_torch_search(path: int, rate: Fraction) -> None:
    if path > best_path():
        pytest.skip(f"this machine has no {PATHS[path]}")
    targets, weights = normal(5, 2, 48, seed=15), normal(5, 2, 48, seed=16).abs() + 0.01
    feedback = 0.05 * normal(5, 96, 96, seed=17)
    codes = torch.empty((5, 2, 1, int(48 * rate) // 8), dtype=torch.uint8)
    values = torch.empty((5, 1, 96))
    encode_panel(
        targets.flatten(1)[:, None],
        0,
        rate,
        factor=None,
        scales=None,
        members=torch.arange(96)[None],
        rings=2,
        weights=weights,
        feedback=feedback,
        codes=codes,
        values=values,
        errors=None,
        path=path,
    )
    expected_codes, expected_values = encode_in_torch(targets, rate, weights, feedback)
    assert torch.equal(codes[:, :, 0], expected_codes) and torch.equal(values.view(5, 2, 48), expected_values)


def test_without_feedback_rings_are_coded_as_if_alone() -> None:
    targets, weights = normal(2, 3, 64, seed=9), normal(2, 3, 64, seed=10).abs() + 0.01
    alone = encode(targets.flatten(0, 1), Fraction(2), weights.flatten(0, 1))
    for feedback in (None, torch.zeros(2, 192, 192)):
        for found, expected in zip(encode_together(targets, Fraction(2), weights, feedback), alone, strict=True):
            assert torch.equal(found.flatten(0, 1), expected)


def test_later_rings_aim_at_what_errors_leave() -> None:
    """Between rings all is settled: the second is coded as a ring of its own would be for the targets that are left."""
    targets, feedback = normal(1, 2, 64, seed=11), 0.3 * normal(1, 128, 128, seed=12)
    feedback[:, :64, :64] = 0
    feedback[:, 64:] = 0
    _, values = encode_together(targets, Fraction(2), None, feedback)
    owed = (values[:, 0] - targets[:, 0]) @ feedback[0, :64, 64:]
    assert torch.allclose(values[:, 1], encode(targets[:, 1] - owed, Fraction(2))[1])


def test_only_later_weights_take_in_errors() -> None:
    targets, feedback = normal(1, 1, 256, seed=13), normal(1, 256, 256, seed=14)
    later = torch.arange(256) // 32
    within = feedback.masked_fill(later[:, None] < later, 0.0)  # what would be owed to the same piece or an earlier one
    assert torch.equal(
        encode_together(targets, Fraction(2), None, within)[0], encode_together(targets, Fraction(2), None, None)[0]
    )


def test_without_the_compiled_routines_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = normal(5, 64)
    expected = encode(targets, Fraction(2))
    monkeypatch.setattr(native, "library", lambda: None)
    for found, wanted in zip(encode(targets, Fraction(2)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_threads_change_nothing() -> None:
    targets, threads = normal(7, 128), torch.get_num_threads()
    expected = encode(targets, Fraction(5, 2))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(*pair) for pair in zip(encode(targets, Fraction(5, 2)), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rate", RATES, ids=float)
def test_errors_on_normal_weights_are_as_documented(rate: Fraction) -> None:
    targets = normal(400, 256, seed=5)
    error = float((encode(targets, rate)[1] - targets).square().mean())
    # At 5 bits the few weights beyond the largest level are a good part of the error.
    assert error == pytest.approx(ERRORS[rate], rel=0.05 if rate < 5 else 0.15)
    assert error > 2.0 ** (-2 * float(rate))  # what no code can beat


def test_another_table_of_values_is_searched_as_well() -> None:
    targets = normal(3, 64, seed=18)
    for table in (code_values(Fraction(3)), torch.linspace(-2, 2, 4096)):
        codes, values = encode(targets, Fraction(2), table=table)
        assert torch.equal(table[decode_windows(codes, Fraction(2)).long()], values)
        found = encode_in_torch(targets[:, None], Fraction(2), None, None, table)
        assert torch.equal(found[0][:, 0], codes) and torch.equal(found[1][:, 0], values)


def test_offsets_alternate_at_half_rates() -> None:
    assert offsets(6, Fraction(3, 2)).tolist() == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("length", "rate"), [(16, Fraction(1, 2)), (16, Fraction(11, 2)), (8, Fraction(1)), (4, Fraction(5, 2))]
)
def test_rates_that_do_not_fit_are_refused(length: int, rate: Fraction) -> None:
    with pytest.raises(ShapeError, match=f"{length} weights cannot have {float(rate):g} bits"):
        check_rate(length, rate)
