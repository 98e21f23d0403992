"""Values that flags and recipes write as text: sizes, lists of widths, of rates and of names, floors."""

from __future__ import annotations

import re

from mc_cli.errors import InputError, shown
from mc_cli.parts import DROPPED, KEPT_BITS, read_width

LARGEST_SIZE = 1 << 62  # bytes
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(B|[KMGT]i?B)?\s*", re.IGNORECASE)
_LEAST_PLAIN_BYTES = 10**6
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes of a size like `16GiB`, `900MB` or `123456`. Raises InputError for anything else."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise InputError(
            f"{text!r} is not a size. Write bytes, or a number with B, kB, MB, GB, KiB, MiB or GiB, for example 16GiB."
        )
    size = float(match[1]) * _UNITS[(match[2] or "B").upper()]
    if size > LARGEST_SIZE:
        raise InputError(f"{shown(text, 40)} is more than any disk holds. Write a size such as 16GiB.")
    return round(size)


def parse_file_size(text: str) -> int:
    """The same for the size of a model or file: a plain number below 1 MB lacks its unit. Raises InputError for one."""
    size = parse_size(text)
    if size < _LEAST_PLAIN_BYTES and text.strip().replace(".", "", 1).isdigit():
        raise InputError(
            f"{text.strip()!r} is {size:,} bytes, too few for a model or a file of it. Write the unit, for example "
            f"{text.strip()}GiB; with B a size of so many bytes is taken as it is."
        )
    return size


def parse_sizes(text: str, flag: str) -> tuple[int, ...]:
    """Bytes of a list like `8GiB,12GiB`. Raises InputError, naming the flag, for anything else and for no bytes."""
    try:
        sizes = tuple(parse_file_size(piece) for piece in text.split(","))
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    if min(sizes) < 1:
        raise InputError(f"{flag} {text!r}: a size is above 0.")
    return sizes


def parse_bits_list(text: str) -> tuple[float, ...]:
    """Candidate widths of a list like `0,1,1.5,2,4`, ascending; 0 drops an expert, 16 keeps what is cut to size.

    Raises InputError for others.
    """
    try:
        widths = tuple(sorted({read_width(piece) for piece in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--bits {text!r}: write widths separated by commas, for example 1,1.5,2,3,4.") from error
    known = (width in (DROPPED, KEPT_BITS) or (1 <= width <= 8 and float(16 * width).is_integer()) for width in widths)
    if not all(known):
        raise InputError(
            f"--bits {text!r}: widths are 1 to 8 in steps of 1/16, 0 for dropping an expert, or with --cut-ratio "
            "16 for keeping the weights that are left."
        )
    if widths == (DROPPED,):
        raise InputError(f"--bits {text!r}: not all experts can be dropped. Add at least one width above 0.")
    return widths


def as_written(bits: tuple[float, ...]) -> tuple[float, ...]:
    """The widths with whole ones as ints, which files and flags give: Python's callers may say 2.0."""
    return tuple(read_width(width) for width in bits)


def parse_floors(texts: list[str]) -> tuple[tuple[int, int], ...]:
    """(width, experts) pairs of texts like `3:1`; `none` alone is no floor. Raises InputError for anything else."""
    if texts == ["none"]:
        return ()
    written = " ".join(texts)
    try:
        floors = tuple((int(width), int(count or 1)) for width, _, count in (text.partition(":") for text in texts))
    except ValueError as error:
        raise InputError(
            f"--floor {written!r}: write WIDTH:EXPERTS, for example 3:1, once per width, or none."
        ) from error
    for width, count in floors:
        if count < 1:
            raise InputError(
                f"--floor {written!r}: it asks for {count} experts of width {width}, and a floor is at least 1 expert. "
                "Write WIDTH:EXPERTS, for example 3:1, or leave this width out."
            )
    return floors


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates of a list like `0.1,0.2,0.3`, ascending. Raises InputError for anything else."""
    try:
        rates = tuple(sorted({float(piece) for piece in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--rates {text!r}: write shares separated by commas, for example 0.1,0.2,0.3.") from error
    if not all(0 < rate < 1 for rate in rates):
        raise InputError(f"--rates {text!r}: a rate is a share of expert calls, above 0 and below 1.")
    return rates


def parse_names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
