"""Extensions from other packages: found by entry points, refused with who brought them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stage_process import run_script

GOOD = """
from mc_cli.quantizers.rtn import RoundToNearest
NAME = "toy"
def build(**settings):
    return RoundToNearest(**settings)
"""


def installed(folder: Path, source: str, module: str = "toy_quantizer", group: str = "mc_cli.quantizers") -> None:
    """A package as pip leaves it, with one entry point."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\ntoy = {module}\n")


def asked(folder: Path, code: str) -> str:
    """Returns what a new process prints that has `folder` among its packages."""
    script = f"import sys; sys.path.append({str(folder)!r})\n{code}"
    done = run_script(script, folder)
    assert done.status == 0, done.err
    return done.out.strip()


NAMES = "from mc_cli.quantizers import quantizer_names\nprint(*quantizer_names())"
ERROR = f"""
from mc_cli.errors import InputError
try:
    exec({NAMES!r})
except InputError as error:
    print(error)
"""


def test_an_entry_point_brings_an_extension(tmp_path: Path) -> None:
    assert asked(tmp_path, NAMES) == "gguf gptq integer mlx rtn trellis"
    installed(tmp_path, GOOD)
    assert asked(tmp_path, NAMES) == "gguf gptq integer mlx rtn toy trellis"
    built = "from mc_cli.quantizers import quantizer_from_name\nprint(quantizer_from_name('toy', clip_search=True))"
    assert asked(tmp_path, built) == "RoundToNearest(clip_search=True)"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (GOOD.replace('"toy"', '"gptq"'), "Two quantizers are called 'gptq'"),
        ("raise ValueError('broken')", "cannot be imported: ValueError('broken')"),
        ("NAME = 'toy'", "defines no build"),
    ],
)
def test_a_bad_one_is_refused_by_the_package_that_brought_it(tmp_path: Path, source: str, said: str) -> None:
    installed(tmp_path, source)
    found = asked(tmp_path, ERROR)
    assert said in found and "entry point toy of toy_quantizer" in found


ENCODING = """
from mc_cli.encodings.affine import AffineEncoding
PATTERN, FAMILY, WIDTHS = "toy", "toy", (2,)
def from_key(key):
    return AffineEncoding(2, 8) if key == "toy" else None
def encoding_at(bits, out_features, in_features, *, group_size_limit):
    return AffineEncoding(2, 8)
"""
POLICY = """
from mc_cli.policies.top_k import keep_scores
NAME, DESCRIPTION, THRESHOLDS, WATCHES_ATTENTION, LEARNED = "toy", "a toy", "shared", False, True
"""
FAMILIES = "from mc_cli.encodings import families\nprint(*families())"
KNOWN = "from mc_cli.policies import policy_from_name\npolicy_from_name('toy')"
FITTED = """
from mc_cli.measuring.policy_fitting import policy_names
from mc_cli.settings import PruneSettings
policy_names(PruneSettings(policy=("top-k", "toy")))
"""


@pytest.mark.parametrize(
    ("group", "source", "code", "said"),
    [
        ("encodings", ENCODING.replace('"toy", (2,)', '"affine", (2,)'), FAMILIES, "Two families of weight encodings"),
        ("encodings", ENCODING.replace("WIDTHS =", "BITS ="), FAMILIES, "no weight encoding: it defines no WIDTHS."),
        ("policies", POLICY.replace("LEARNED =", "TRAINED ="), KNOWN, "no skipping policy: it defines no LEARNED."),
        ("policies", POLICY, FITTED, "--policy toy: it has to be trained, and prune-eval trains otp alone"),
    ],
)
def test_each_kind_says_what_is_missing(tmp_path: Path, group: str, source: str, code: str, said: str) -> None:
    installed(tmp_path, source, "toy_package", f"mc_cli.{group}")
    error = (
        f"from mc_cli.errors import InputError\ntry:\n    exec({code!r})\nexcept InputError as error:\n    print(error)"
    )
    assert said in asked(tmp_path, error)


def test_a_quantizer_of_a_family_that_nobody_makes_is_refused(tmp_path: Path) -> None:
    installed(tmp_path, GOOD + 'FAMILY = "tory"\n')
    code = """
from mc_cli.errors import McError
from mc_cli.settings import QuantizerSettings, ScoreSettings
try:
    ScoreSettings(quantizer=QuantizerSettings(quantizer="toy"))
except McError as error:
    print(error)
"""
    assert (
        asked(tmp_path, code)
        == "Unknown family of encodings 'tory'. Known families: affine, gguf, integer, mlx, trellis."
    )


def test_plans_and_families_know_a_foreign_one(tmp_path: Path) -> None:
    installed(tmp_path, ENCODING.replace("(2,)", "(2, 6.5)"), "toy_package", "mc_cli.encodings")
    assert asked(tmp_path, FAMILIES) == "affine gguf integer mlx toy trellis"
    plan = "schema: 1\nmodel_type: m\nmethod: x\nfamily: {}\nrole_bits: {{head: 16}}\nexpert_bits: {{0: [{}, 2]}}\n"
    code = f"""
from pathlib import Path
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import PlanError
for name, family, bits in (("a", "toy", 6.5), ("b", "tory", 2), ("c", "toy", 7.5)):
    path = Path({str(tmp_path)!r}) / name
    path.write_text({plan!r}.format(family, bits))
    try:
        print(Plan.read(path).family)
    except PlanError as error:
        print(str(error).splitlines()[1])
"""
    known, unknown, width = asked(tmp_path, code).splitlines()
    assert (
        known == "toy"
        and "family is 'tory', not one of affine, gguf, integer, mlx, toy, trellis" in unknown
        and "7.5" in width
    )


BROKEN = (
    GOOD
    + """
SETTINGS = ("rounds",)
def prepare():
    return {}["nothing"]
class Half:
    pass
"""
)


def test_a_defect_is_of_the_package_that_has_it(tmp_path: Path) -> None:
    installed(tmp_path, BROKEN)
    code = """
from mc_cli.errors import McError
from mc_cli.failures import error_message
from mc_cli.quantizers import quantizer_names, settings_taken
quantizer_names()
import toy_quantizer
half = toy_quantizer.Half()
for call in (toy_quantizer.prepare, lambda: half.whole, lambda: {}["ours"], lambda: settings_taken("toy")):
    try:
        call()
    except Exception as error:
        print(error_message(error))
"""
    line, lacking, ours, settings = asked(tmp_path, code).splitlines()
    assert line.startswith("toy_quantizer, line 9, of the package toy_quantizer has a defect: KeyError")
    assert lacking.startswith("toy_quantizer of the package toy_quantizer has a defect: AttributeError")
    assert ours.startswith("mc-cli has a defect: KeyError")
    assert "'toy' names settings that nobody can give: rounds" in settings
