"""Finds the folder of a model by its name. Imports nothing heavy, so that a wrong name is refused at once."""

from __future__ import annotations

import re
from pathlib import Path

from mc_cli.artifacts.places import require_ordinary
from mc_cli.bundled import named
from mc_cli.errors import CheckpointError, InputError, first_line


def resolve_model(name: str, *, revision: str | None = None, asked_as: str = "--model", fetch: bool = True) -> Path:
    """The folder of a model: a directory, `bundled:NAME`, or a hub id, whose files are downloaded to the hub's cache.

    asked_as  the option that named it, for messages
    fetch     whether files of a hub id may be downloaded; without it they have to be in the hub's cache
    Raises InputError if it is none of these.
    """
    if not name:
        raise InputError(f"{asked_as} is empty. Give a folder with config.json and *.safetensors, or a hub id.")
    bundled = named(name)
    if bundled is not None:
        return bundled
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{asked_as} {name} is a file. Give the folder that holds config.json and *.safetensors.")
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"{asked_as} {name}: no such directory. Give a folder with config.json and *.safetensors, or a hub id like "
            "org/name."
        )
    return _download(name, revision, asked_as, fetch=fetch)


def _download(name: str, revision: str | None, asked_as: str, *, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download

    from mc_cli.models.model_files import DOWNLOADED, NOT_DOWNLOADED

    wanted, unwanted = list(DOWNLOADED), list(NOT_DOWNLOADED)
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=unwanted,
                local_files_only=not fetch,
            )
        )
    except Exception as error:  # the hub client raises its own, its transport's and file system errors
        if not fetch:
            raise InputError(
                f"{asked_as} {name}: not on this machine. A run would fetch it from the hub first; a dry run fetches "
                "nothing. Download it, or give a directory."
            ) from error
        raise InputError(
            f"{asked_as} {name}: not a directory here, and not to be had from the hub: {first_line(error)} "
            f"{advice_for(error, revision)}"
        ) from error


def advice_for(error: Exception, revision: str | None) -> str:
    """The advice for a failure of the hub's client."""
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return "The environment (HF_HUB_OFFLINE) forbids downloads: unset it, or give a directory."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"Check --revision {revision or 'main'}, or give a directory."
    if isinstance(error, errors.RepositoryNotFoundError):  # also of private models, and of gated ones
        return (
            "Either the hub has no model of this name, or it shows it to some users only: check the name and the "
            "revision, accept the model's terms on its page, and log in with `hf auth login`; or give a directory."
        )
    if isinstance(error, ValueError) and not isinstance(error, errors.HFValidationError):
        return (
            f"The server that answered for {constants.ENDPOINT} is not the hub, but perhaps a proxy or a login page of "
            "the network. See to the network and to HF_ENDPOINT, or give a directory."
        )
    return (
        "Check the name, the revision and the network, or give a directory. Whole files are kept in the hub's cache, "
        "and the same command goes on after them."
    )


def check_model_folder(folder: Path) -> None:
    """Raises CheckpointError where there is no config.json, InputError where it is a pipe or device."""
    require_ordinary(folder / "config.json")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no model folder. Give the one that export made.")
