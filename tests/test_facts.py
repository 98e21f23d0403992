"""Facts that quantizers and encodings state of themselves, and settings that follow from it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from mc_cli.coding.quantization import quantizer_for
from mc_cli.encodings import TensorSpec, deals_channels, encoding_for, families, family_of, family_of_role
from mc_cli.errors import InputError, ShapeError
from mc_cli.flags import build
from mc_cli.parts import Role
from mc_cli.quantizers import quantizer_names, settings_taken
from mc_cli.recipe import Recipe, plan_run
from mc_cli.registry import candidate_widths, widths_of
from mc_cli.settings import QuantizerSettings, QuantizeSettings, ScoreSettings

HALVES = (1, 1.5, 2, 2.5, 3, 3.5, 4)
GIVEN = {"model": "m", "data": "d"}


@pytest.mark.parametrize(
    ("name", "family", "corrects", "widths"),
    [
        ("trellis", "trellis", True, HALVES),
        ("gptq", "affine", False, (1, 2, 3, 4)),
        ("rtn", "affine", False, (1, 2, 3, 4)),
        ("gguf", "gguf", True, (2.0625, 2.3125, 2.5625, 3.0625, 3.4375, 4.25)),
        ("mlx", "mlx", True, (2, 3, 4)),
        ("integer", "integer", True, (2, 3, 4)),
    ],
)
def test_defaults_follow_the_quantizer(name: str, family: str, corrects: bool, widths: tuple[float, ...]) -> None:
    settings = QuantizerSettings(quantizer=name)
    assert (settings.family, settings.corrects_errors, settings.joins_rows) == (family, corrects, name == "trellis")
    assert ScoreSettings(quantizer=settings).bits == widths == settings.candidate_widths(3.5)
    for given in (True, False):
        assert QuantizerSettings(quantizer=name, error_correction=given).corrects_errors is given


# A value other than the default of every field that a quantizer may leave unread.
OTHERS = {"damping": 0.02, "activation_order": False, "sweeps": 3, "search": "quick"}


@pytest.mark.parametrize("make", [ScoreSettings, QuantizeSettings])
@pytest.mark.parametrize("name", quantizer_names())
def test_what_a_quantizer_does_not_read_is_refused(name: str, make: type[ScoreSettings | QuantizeSettings]) -> None:
    for field, value in OTHERS.items():
        given = replace(QuantizerSettings(quantizer=name), **{field: value})
        if field in settings_taken(name):
            assert make(quantizer=given).quantizer.effective == given
            continue
        with pytest.raises(InputError, match=rf"{field.replace('_', '-')} changes nothing with --quantizer {name}"):
            make(quantizer=given)
        assert given.effective == QuantizerSettings(quantizer=name)


def test_what_nobody_gave_is_left_out_where_it_has_no_effect() -> None:
    """An effort's settings, and those that quantize would take over from score."""
    sections = {"calibrate": {**GIVEN, "gradient_tokens": 0}, "score": {"quantizer": "gptq", "bits": (2, 4)}}
    sections |= {"allocate": {"target_stored_bits": 2.5}, "export": {"out": "o"}}
    plan = plan_run(Recipe(sections, "w", effort="best"))
    assert plan.stages["score"].quantizer == plan.stages["quantize"].quantizer == QuantizerSettings(quantizer="gptq")
    assert plan.stages["score"].loss_tokens == 4096 and not plan.stages["score"].all_widths
    assert plan.stages["calibrate"].gradient_samples == 4
    told = {"quantizer": "trellis", "damping": 0.02, "search": "quick"}
    assert build("quantize", {"quantizer": "rtn"}, told).quantizer == QuantizerSettings(quantizer="rtn")
    assert build("quantize", {}, told).quantizer == QuantizerSettings(**told)
    with pytest.raises(InputError, match=r"^--search changes nothing with --quantizer gptq"):
        build("quantize", {"quantizer": "gptq", "search": "quick"}, told)


def test_wide_targets_have_more_scored() -> None:
    assert candidate_widths("trellis", 3.6) == (*HALVES, 4.5, 5)
    assert candidate_widths("affine", 7.9) == (1, 2, 3, 4)


def planned(quantizer: str, target: float) -> tuple[float, ...]:
    sections = {"calibrate": GIVEN, "score": {"quantizer": quantizer}, "export": {"out": "o"}}
    return plan_run(Recipe({**sections, "allocate": {"target_stored_bits": target}}, "w")).stages["score"].bits


def test_run_asks_the_family() -> None:
    assert planned("trellis", 4.0)[-1] == 5 and planned("trellis", 3.0)[-1] == 4 and planned("gptq", 4.0)[-1] == 4


def test_an_unknown_quantizer_is_left_to_those_who_build_it() -> None:
    """Who look ahead tell it beside all else that is wrong."""
    assert planned("awq", 4.0) == (1, 2, 3, 4)
    with pytest.raises(InputError, match="Unknown quantizer 'awq'"):
        quantizer_for(QuantizerSettings(quantizer="awq"))


@pytest.mark.parametrize(
    ("name", "bits"), [("gptq", (1, 1.5)), ("rtn", (2.5, 4)), ("trellis", (5.5,)), ("trellis", (7.5, 8))]
)
def test_widths_that_are_not_made_are_refused(name: str, bits: tuple[float, ...]) -> None:
    with pytest.raises(
        InputError, match=rf"--quantizer {name} does not make {next(b for b in bits if b % 1)}, but 1, "
    ):
        build("score", {"quantizer": name, "bits": bits})


@pytest.mark.parametrize(("name", "bits"), [("gptq", (0, 8)), ("trellis", (0, 1.5, 4.5, 6, 8))])
def test_whole_widths_are_always_made(name: str, bits: tuple[float, ...]) -> None:
    assert build("score", {"quantizer": name, "bits": bits}).bits == bits


@pytest.mark.parametrize("family", families())
def test_widths_are_those_that_have_an_encoding(family: str) -> None:
    for half in range(2, 17):
        bits = half / 2 if half % 2 else half // 2
        if bits in widths_of(family):
            assert encoding_for(family, bits, 256, 256).bits == bits
        else:
            alone = {"mlx": "MLX has 2, 3, 4, 5, 6 and 8 bits", "integer": "have 2, 3, 4 and 8 bits"}
            with pytest.raises(ShapeError, match=alone.get(family, "affine grids have whole widths")):
                encoding_for(family, bits, 256, 256)


@pytest.mark.parametrize("family", families())
def test_facts_of_a_family_are_those_of_its_encodings(family: str) -> None:
    encoding = encoding_for(family, 2, 32, 32)
    assert family_of(encoding) == family and deals_channels(family) == (family == "trellis")
    assert (family_of_role(Role.EMBEDDING, family) == family) == encoding.rows_apart
    assert family_of_role(Role.HEAD, family) == family


@pytest.mark.parametrize(("family", "shape"), [("mlx", (32, 48)), ("integer", (32, 48)), ("integer", (40, 64))])
def test_families_that_stand_alone_have_no_grids_of_ours_instead(family: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"{shape[0]} outputs and {shape[1]} inputs cannot have 4 bits"):
        encoding_for(family, 4, *shape)
    with pytest.raises(ShapeError, match="groups of up to 16"):
        encoding_for(family, 4, 32, 64, group_size_limit=16)


def test_quantizers_are_built_with_the_settings_that_they_take() -> None:
    assert {name: settings_taken(name) for name in quantizer_names()} == {
        "gguf": ("damping", "sweeps"),
        "gptq": ("damping", "activation_order", "sweeps"),
        "integer": ("damping", "activation_order", "sweeps"),
        "mlx": ("damping", "activation_order", "sweeps"),
        "rtn": (),
        "trellis": ("damping", "activation_order", "sweeps", "search"),
    }


def test_settings_and_help_import_no_quantizer() -> None:
    asked = (
        "import sys, mc_cli.settings as s; s.QuantizerSettings(); s.QuantizeSettings(); "
        "print(*[name for name in ('torch', 'mc_cli.quantizers', 'mc_cli.encodings') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_stored_tensors_are_of_what_files_hold() -> None:
    assert TensorSpec((3, 4), "int32").size_bytes == 48
    with pytest.raises(ShapeError, match="a stored tensor of dtype 'int64'; packed files hold uint8"):
        TensorSpec((3,), "int64")
