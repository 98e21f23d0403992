"""Extensions from other packages: found by entry points, refused with who brought them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
from mc_cli.quantizers.rtn import RoundToNearest
NAME = "toy"
def build(**settings):
    return RoundToNearest(**settings)
"""


def installed(folder: Path, source: str, module: str = "toy_quantizer") -> None:
    """A package as pip leaves it, with one entry point."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mc_cli.quantizers]\ntoy = {module}\n")


def asked(folder: Path, code: str) -> str:
    """What a new process prints that has `folder` among its packages."""
    script = f"import sys; sys.path.append({str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


NAMES = "from mc_cli.quantizers import quantizer_names\nprint(*quantizer_names())"
ERROR = f"""
from mc_cli.errors import InputError
try:
    exec({NAMES!r})
except InputError as error:
    print(error)
"""


def test_an_entry_point_brings_an_extension(tmp_path: Path) -> None:
    assert asked(tmp_path, NAMES) == "gptq rtn trellis"
    installed(tmp_path, GOOD)
    assert asked(tmp_path, NAMES) == "gptq rtn toy trellis"
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
