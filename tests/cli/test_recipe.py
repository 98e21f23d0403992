"""Recipes: what they may hold, what is said of what they may not, and who wins over whom."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mc_cli import settings as s
from mc_cli.errors import InputError
from mc_cli.flags import build
from mc_cli.recipe import Recipe, plan_run, plan_runs, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
WHOLE = """
work_dir: runs/x
calibrate: {model: m, data: d.txt, sequences: 4}
score: {bits: [2, 3], quantizer: gptq, damping: 0.5}
allocate: {target_size_bytes: 2MiB, floors: {3: 1, 2: 2}, gap: 1e-3, dense_bits: null}
quantize: {damping: 0.25}
prune-eval: {tasks: [a, b]}
export: {out: o}
compute: {device: cpu}
"""


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def test_every_recipe_of_this_repository_is_whole() -> None:
    for path in sorted(RECIPES.glob("*.yaml")):
        assert plan_runs(read_recipe(path).override([("calibrate", "model", "m")], None))


def test_values_reach_the_settings(tmp_path: Path) -> None:
    plan = plan_run(recipe(tmp_path, WHOLE))
    assert plan.work.path == Path("runs/x")
    assert plan.compute == s.RunSettings(device="cpu")
    assert plan.stages["calibrate"] == s.CalibrateSettings(model="m", data="d.txt", sequences=4)
    assert plan.stages["score"].bits == (2, 3)
    assert plan.stages["allocate"].target_size_bytes == 2 * 2**20
    assert plan.stages["allocate"].floors == ((3, 1), (2, 2))
    assert plan.stages["allocate"].gap == 1e-3
    assert plan.stages["prune-eval"].tasks == ("a", "b")


def test_quantize_rounds_as_score_did_unless_told(tmp_path: Path) -> None:
    quantizer = plan_run(recipe(tmp_path, WHOLE)).stages["quantize"].quantizer
    assert quantizer == s.QuantizerSettings(quantizer="gptq", damping=0.25)


def test_run_never_evaluates_on_nothing(tmp_path: Path) -> None:
    assert plan_run(recipe(tmp_path, WHOLE)).stages["prune-eval"].data == "bundled:heldout"


def test_flags_go_over_the_recipe(tmp_path: Path) -> None:
    flags = [("calibrate", "sequences", 8), ("allocate", "target_stored_bits", 2.25)]
    plan = plan_run(recipe(tmp_path, WHOLE).override(flags, "elsewhere"))
    assert plan.stages["calibrate"].sequences == 8
    assert plan.stages["allocate"].target_stored_bits == 2.25
    assert plan.stages["allocate"].target_size_bytes is None
    assert plan.work.path == Path("elsewhere")


def test_a_recipe_may_name_its_variant(tmp_path: Path) -> None:
    assert plan_run(recipe(tmp_path, WHOLE)).work.variant == "main"
    named = recipe(tmp_path, WHOLE + "\nvariant: small\n")
    assert plan_run(named).work.folder("quantize") == Path("runs/x/variants/small/packed")
    assert plan_run(named.override([], None, None, "other")).work.variant == "other"
    with pytest.raises(InputError, match="--variant"):
        plan_run(named.override([], None, None, "a/b"))
    with pytest.raises(InputError, match="variant: a whole number"):
        recipe(tmp_path, WHOLE + "\nvariant: 2\n")


def test_all_offenders_are_named_at_once(tmp_path: Path) -> None:
    text = """
    calibrate: {sequenses: 4, length: long, seed: true, model: [a]}
    scores: {bits: [2]}
    score: {bits: [2, x], loss_tokens: 1.5, activation_order: "yes"}
    export: out
    """
    with pytest.raises(InputError) as caught:
        recipe(tmp_path, text)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("recipe.yaml has 9 entries that cannot be used:")
    said = "\n".join(lines)
    for words in (
        "unknown key in calibrate: 'sequenses' (did you mean sequences?); known: model, ",
        "calibrate: length: is a text ('long'), should be a whole number",
        "calibrate: seed: is true or false (True), should be a whole number",
        "calibrate: model: is a list (['a']), should be a text",
        "score: bits: '2,x': write widths separated by commas",
        "score: loss_tokens: is a number (1.5), should be a whole number",
        "score: activation_order: is a text ('yes'), should be true or false",
        "export: a text, should be settings",
        "unknown section 'scores' (did you mean score?); known: description, work_dir, variant, effort, ",
    ):
        assert words in said


def test_a_plan_takes_the_place_of_a_target(tmp_path: Path) -> None:
    given = {"calibrate": {"model": "m", "data": "d"}, "quantize": {"plan": "my.yaml"}, "export": {"out": "o"}}
    found = plan_run(Recipe(given, "w"))
    assert list(found.stages) == ["calibrate", "score", "quantize", "prune-eval", "export"]
    assert found.stages["quantize"].plan == "my.yaml"
    for asked, named in (({"target_bits": 2.0}, "--target-bits"), ({"method": "pmq", "gap": 0.1}, "--method, --gap")):
        with pytest.raises(InputError, match=f"--plan my.yaml: .*allocate is not run, and {named} would change"):
            plan_run(Recipe({**given, "allocate": asked}, "w"))
    with pytest.raises(InputError, match="or a --plan"):
        plan_run(Recipe({**given, "quantize": {}}, "w"))


def test_what_is_missing_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        plan_run(Recipe())
    said = str(caught.value)
    for flag in ("--work-dir", "--model", "--data", "--target-stored-bits", "--out"):
        assert flag in said
    assert said.startswith("run lacks 5 settings:")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("calibrate: {seed: 1, seed: 2}", "given twice: seed"),
        ("- a", "should hold sections"),
        ("calibrate: {", "is not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("calibrate: {length: null}", "calibrate: length: is empty"),
        ("work_dir: 3", "work_dir: a whole number, should be a text"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("calibrate:\n" + "".join(f"  k{n}: {n}\n" for n in range(60_000)), "more than 10,000 entries at line 5002"),
        ("".join(f"k{n}: {n}\n" for n in range(60_000)), "more than 10,000 entries at line 5001"),
        ("score: {bits: [" + "2, " * 60_000 + "2]}", "more than 10,000 entries"),
        ("description: " + "x" * 3_000_000, "more than the 1,048,576 characters"),
    ],
    ids=("keys", "sections", "list", "text"),
)
def test_too_long_for_a_recipe(tmp_path: Path, text: str, words: str) -> None:
    begun = time.process_time()
    with pytest.raises(InputError, match=words):
        recipe(tmp_path, text)
    assert time.process_time() - begun < 1


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_values_the_settings_refuse(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"calibrate.sequences 0: at least 1"):
        plan_run(recipe(tmp_path, WHOLE.replace("sequences: 4", "sequences: 0")))


def test_effort_lies_beneath_recipe_and_flags(tmp_path: Path) -> None:
    plain, best = (plan_run(recipe(tmp_path, text)) for text in (WHOLE, WHOLE + "\neffort: best\n"))
    assert best.stages["score"].loss_tokens == 4096 > plain.stages["score"].loss_tokens
    assert best.stages["calibrate"].gradient_samples == 8 > plain.stages["calibrate"].gradient_samples
    assert best.stages["calibrate"].sequences == plain.stages["calibrate"].sequences == 4  # the recipe says so
    fast = plan_run(recipe(tmp_path, WHOLE).override([("score", "loss_tokens", 99)], None, "fast"))
    assert fast.stages["score"].loss_tokens == 99 and fast.stages["calibrate"].gradient_tokens == 8192
    with pytest.raises(InputError, match="effort 'most': known are fast, default, best"):
        plan_run(recipe(tmp_path, WHOLE + "\neffort: most\n"))


@pytest.mark.parametrize(
    ("asked", "widest"), [("target_stored_bits: 3.5", 4), ("target_stored_bits: 4.25", 5), ("target_bits: 4", 5)]
)
def test_wide_targets_have_wide_widths_scored(tmp_path: Path, asked: str, widest: float) -> None:
    text = f"work_dir: w\ncalibrate: {{model: m, data: d}}\nallocate: {{{asked}}}\nexport: {{out: o}}\n"
    assert max(plan_run(recipe(tmp_path, text)).stages["score"].bits) == widest
    for chosen in (("bits", (2, 3)), ("quantizer", "gptq")):
        narrow = recipe(tmp_path, text).override([("score", *chosen)], None)
        assert max(plan_run(narrow).stages["score"].bits) <= 4


def test_every_effort_names_settings_that_exist() -> None:
    for sections in s.EFFORTS.values():
        for section, values in sections.items():
            build(section, values)
