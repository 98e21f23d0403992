"""Environments with the package installed as its users do, beside the dependencies of the one that runs the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTUP = "mixture_compressor.pth"
DISTRIBUTION = "mixture-compressor"
_SOURCES = (
    "mc_cli",
    "docs",
    "recipes",
    "tests",
    ".ci",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "Makefile",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
_SOURCES += ("README.md", "LICENSE", ".gitignore", STARTUP)
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.partial")


# Variables that the process of the tests may have set: where it imports from, and how much transformers tells.
_OURS = ("PYTHON", "MC_CLI", "TRANSFORMERS_VERBOSITY")


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a folder in which its processes run."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def packages(self) -> Path:
        (found,) = (self.folder / "lib").glob("python*/site-packages")
        return found

    def run(self, *arguments: str, **variables: str) -> str:
        """Standard output of the environment's Python. Raises AssertionError, with its errors, where it fails."""
        done = self.process(*arguments, **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def process(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A finished process of the environment's Python, whatever its exit status."""
        return subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=self.variables(**variables),
            cwd=self.folder,
        )

    def variables(self, **more: str) -> dict[str, str]:
        """Nothing that would show a process the checkout, and no network."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hub")}
        return {**kept, **own, **more}

    def pip(self, *arguments: str, **variables: str) -> None:
        """pip of the running environment, at work in this one; offline, and with the build tools that are there."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        variables = self.variables(PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1", **variables)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=self.folder)
        assert done.returncode == 0, done.stderr[-3000:]


def new_environment(folder: Path) -> Environment:
    """An environment without packages of its own that sees those of the running one, without its .pth lines."""
    venv.create(folder, symlinks=True)
    environment = Environment(folder)
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (environment.packages / "zz_dependencies.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
    return environment


def copy_of_sources(folder: Path) -> Path:
    """A checkout of its own, so that building writes nothing into the one that is being tested."""
    for name in _SOURCES:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=_LEFT_OUT)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    return folder
