"""Whether --split and --text-field, where they were given, say anything of the text that they were given for."""

from __future__ import annotations

from mc_cli.data.dataset_names import TEXT_FIELD
from mc_cli.data.documents import Reading, has_splits, resolve_data
from mc_cli.errors import InputError


def check_split(data: str, split: str, flag: str) -> None:
    """Raises InputError for a split that was asked of files, which have none. Nothing is read."""
    path = resolve_data(data, flag=flag)
    if path is not None and not has_splits(path):
        raise InputError(
            f"--split {split} changes nothing with {flag} {data}, which is no `datasets` name: files have no splits. "
            "Leave it out, or name the files of that split."
        )


def check_field(data: str, text_field: str, reading: Reading, flag: str) -> None:
    """Raises InputError where no row that was read has the field that was asked for."""
    taken = (f"field {text_field}", f"chat: {text_field}")
    if text_field == TEXT_FIELD or not reading.rows or any(name.startswith(taken) for name in reading.rows):
        return
    held = ", ".join(f"{count:,} by {name}" for name, count in sorted(reading.rows.items()))
    raise InputError(
        f"--text-field {text_field} changes nothing with {flag} {data}: no row has this field (read were {held}). "
        "Leave it out, or name a field that is there."
    )
