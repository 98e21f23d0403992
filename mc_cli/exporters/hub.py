"""Sends an exported directory to a model hub, by huggingface_hub: to a new private repository, or one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from mc_cli import __version__
from mc_cli.errors import InputError, first_line
from mc_cli.settings.export import hub_name_problem


def push(folder: Path, name: str, *, endpoint: str | None = None) -> str:
    """The address of the repository `name`, which then has all files of the directory in one commit.

    endpoint   of the hub; None: the one that HF_ENDPOINT names, else the public one
    A repository that is not there yet is made, and is private. Raises InputError saying what the hub refused; the
    directory is whole, and the same command sends it again.
    """
    if problem := hub_name_problem(name):
        raise InputError(f"--push-to-hub {name!r:.100}: {problem}")
    api = HfApi(endpoint=endpoint, library_name="mc_cli", library_version=__version__)
    message = f"Packed model, made by mc-cli {__version__}"
    try:
        made: Any = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the hub client raises its own, its transport's and file system errors
        raise InputError(
            f"--push-to-hub {name}: {first_line(error)} The directory {folder} is finished: run the same command to "
            "send it again. `hf auth login`, or a token in HF_TOKEN, tells the hub who you are; it needs the right to "
            "write."
        ) from error
    return str(made)
