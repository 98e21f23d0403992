"""The compiled library is used only where it was made from these sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mc_cli import native
from mc_cli.errors import McError
from mc_cli.native.sources import source_version, sources
from tests.faults.sanitized import compiler


@pytest.fixture
def loaded_anew() -> Iterator[None]:
    """The library is looked for again, in the test and after it."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The folder of the sources and the library, in another place."""
    return Path(shutil.copytree(Path(native.__file__).parent, tmp_path / "native"))


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.usefixtures("loaded_anew")
def test_a_library_of_other_sources_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = source_version(copied)
    monkeypatch.setattr(native, "__file__", str(copied / "__init__.py"))
    assert native.library() is not None
    native.library.cache_clear()
    header = copied / "threads.h"
    header.write_text(header.read_text("utf-8").replace("void *context", "void *contexts"), "utf-8")
    message = rf"version {made:016x} of its sources, these are version {source_version(copied):016x}\. Install"
    with pytest.raises(McError, match=message):
        native.library()


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.usefixtures("loaded_anew")
def test_a_library_without_its_sources_beside_it_is_used(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both came with one package, which nobody can have updated in part."""
    for path in sources(copied):
        path.unlink()
    monkeypatch.setattr(native, "__file__", str(copied / "__init__.py"))
    assert source_version(copied) is None and native.library() is not None


def test_the_version_is_of_names_and_contents_alone(tmp_path: Path) -> None:
    def version(**files: bytes) -> int | None:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in files.items():
            (tmp_path / name.replace("_", ".")).write_bytes(content)
        return source_version(tmp_path)

    first = version(a_c=b"one\n", b_h=b"two\n")
    assert first is not None
    assert first == version(b_h=b"two\n", a_c=b"one\n", c_so=b"a library", d_py=b"Python")
    assert first == version(a_c=b"one\r\n", b_h=b"two\r\n")
    others = [
        version(a_c=b"one\n", b_h=b"tw0\n"),
        version(a_c=b"one\n", c_h=b"two\n"),
        version(a_c=b"one\ntwo\n", b_h=b""),
        version(a_c=b"one\n"),
    ]
    assert len({first, *others}) == 5
    assert version() is None


_THREADS_STARTED = """
import os, sys, torch
from mc_cli import native
from mc_cli.encodings.trellis import trellis_for
from mc_cli.kernels.trellis import Bank

if sys.argv[1] == "pool":
    native.library().mc_use_team(None)
torch.set_num_threads(3)
torch.ones(2**22).exp().sum()
before = len(os.listdir("/proc/self/task"))
encoding = trellis_for(2, 512)
specs = encoding.tensor_specs(2048, 512)
tensors = {name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}
Bank([(encoding, tensors, 512)]).product(torch.ones(4, 512))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or native.library() is None or "OpenMP" not in torch.__config__.parallel_info(),
    reason="torch's threads are of another kind",
)
@pytest.mark.parametrize(("threads", "started"), [("team", 0), ("pool", 2)])
def test_products_start_no_threads_beside_those_of_torch(threads: str, started: int) -> None:
    command = [sys.executable, "-c", _THREADS_STARTED, threads]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == started


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.usefixtures("loaded_anew")
@pytest.mark.parametrize("text", ["int mc_product(void) { return 0; }", "int mc_native_version(void) { return 13; }"])
def test_a_library_from_before_such_versions_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that says nothing of its version, and one whose version was raised by hand."""
    source, library = tmp_path / "older.c", tmp_path / "older.so"
    source.write_text(text, "utf-8")
    subprocess.run([compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setenv(native.SWITCH, str(library))
    with pytest.raises(McError, match=r"version 00000000000000(00|0d) of its sources"):
        native.library()
