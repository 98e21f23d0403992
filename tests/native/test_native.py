"""The compiled library is used only where it was made from these sources."""

from __future__ import annotations

import pytest

from mc_cli import native
from mc_cli.errors import McError


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = native._VERSION
    monkeypatch.setattr(native, "_VERSION", made + 1)
    native.library.cache_clear()
    try:
        with pytest.raises(McError, match=rf"version {made} of its sources, this is version {made + 1}\. Install"):
            native.library()
    finally:
        native.library.cache_clear()


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_a_library_from_before_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        """A library without the routine that tells its version."""

    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Older())
    native.library.cache_clear()
    try:
        with pytest.raises(McError, match="version 0 of its sources"):
            native.library()
    finally:
        native.library.cache_clear()
