"""A number for the sources that a compiled library was made from. setup.py loads this file without the package."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sources(folder: Path) -> list[Path]:
    """The C files and headers in `folder`, by name."""
    return sorted([*folder.glob("*.c"), *folder.glob("*.h")])


def source_version(folder: Path) -> int | None:
    """The first 64 bits of a SHA-256 of the names and contents of `sources`; None where there are none.

    A build gives it to version.c as MC_VERSION. Line ends do not count: some checkouts have others.
    """
    found = sources(folder)
    digest = hashlib.sha256()
    for path in found:
        text = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.name} {len(text)}\n".encode() + text)
    return int.from_bytes(digest.digest()[:8]) if found else None


def definition(version: int | None) -> str:
    """A version as C writes it."""
    return f"{version or 0:#018x}u"
