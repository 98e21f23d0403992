"""Reads Linux's account of this process's memory, page by page."""

from __future__ import annotations

from pathlib import Path


def flags_of_page(address: int) -> list[str]:
    """The flags of the mapping that an address is in, as proc(5) lists them; `hg`: huge pages are asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(word, 16) for word in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")
