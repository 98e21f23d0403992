"""Fixtures shared by the tests of looking ahead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mc_cli.ahead import disk


@pytest.fixture
def much_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk has 10 TB free."""
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**13))
