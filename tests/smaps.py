"""Reads Linux's account of this process's memory, page by page."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path


def flags_of_pages(addresses: Iterable[int]) -> list[list[str]]:
    """The flags of the mappings that addresses are in, as proc(5) lists them; `hg`: huge pages are asked for."""
    mappings: list[tuple[int, int]] = []
    flags: list[list[str]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *words = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(word, 16) for word in first.split("-"))
            mappings.append((begin, end))
        elif first == "VmFlags:":
            flags.append(words)
    found = []
    for address in addresses:
        place = bisect_right(mappings, address, key=lambda mapping: mapping[0]) - 1
        assert place >= 0 and address < mappings[place][1], f"nothing is mapped at {address:#x}"
        found.append(flags[place])
    return found


def flags_of_page(address: int) -> list[str]:
    """Those of one page."""
    return flags_of_pages([address])[0]
