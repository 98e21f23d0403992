"""Rows that the library `datasets` gives: by a name, which it may have to fetch, or saved in a folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mc_cli.errors import InputError

TEXT_FIELD = "text"  # where a row has it, it is taken; it is also what --text-field is unless given


def check_field_of(data: str, kind: str, text_field: str, names: Collection[str]) -> None:
    """Raises InputError for a field that was named and is not there."""
    if text_field != TEXT_FIELD and text_field not in names:
        raise InputError(f"{data} has no {kind} {text_field!r}; it has {', '.join(names)}. Name one with --text-field.")


def dataset_rows(name: str, split: str, flag: str) -> Any:
    """The rows of a dataset by its name. Raises InputError where the library cannot load it."""
    import datasets

    base, _, config = name.partition(":")
    try:
        return datasets.load_dataset(base, config or None, split=split)
    except Exception as error:
        raise _not_loaded(name, split, flag, error) from error


def check_dataset(name: str, split: str, text_field: str, flag: str) -> None:
    """Raises InputError for a name that the library cannot find, and for a split or field that it says is not there.

    No row is fetched: the library reads the dataset's description, from its cache where there is no network.
    """
    import datasets

    base, _, config = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(base, config or None)
    except Exception as error:
        raise _not_loaded(name, split, flag, error) from error
    splits = [str(name) for name in builder.info.splits or getattr(builder.config, "data_files", None) or ()]
    parts = {part.partition("[")[0].strip() for part in split.split("+")}
    if splits and not parts <= {*splits, "all"}:
        raise InputError(f"{flag} {name} has no split {split!r}; it has {', '.join(splits)}. Name one with --split.")
    if builder.info.features:
        check_field_of(f"{flag} {name}", "field", text_field, list(builder.info.features))


def saved_rows(path: Path, split: str, flag: str) -> Any:
    """The rows of a folder that the library has saved. Raises InputError for a damaged one or an unknown split."""
    import datasets

    try:
        found: Any = datasets.load_from_disk(path)
    except Exception as error:
        raise InputError(
            f"{flag} {path}: the saved dataset cannot be read ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise InputError(f"{flag} {path} has no split {split!r}; it has {', '.join(found)}. Name one with --split.")
    return found[split]


def _not_loaded(name: str, split: str, flag: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [""])[0]
    return InputError(
        f"{flag} {name}: neither a file here nor a dataset that `datasets` can load, split {split!r} "
        f"({type(error).__name__}: {reason}). Check the name, --split and the network."
    )
