"""From the name of a model to its folder and configuration, with errors that say what is wrong with either."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from mc_cli.errors import CheckpointError, FamilyError, InputError
from mc_cli.families import CONTRACT_TESTED

TESTED_TRANSFORMERS = "5.23."
SUPPORTED = f"Contract-tested families: {', '.join(CONTRACT_TESTED)}."


def check_transformers_version() -> None:
    """Raises InputError for a transformers release whose internals this version was not tested with."""
    if not transformers.__version__.startswith(TESTED_TRANSFORMERS):
        raise InputError(
            f"transformers {transformers.__version__} is installed; mc-cli reads checkpoints through internals of "
            f"transformers {TESTED_TRANSFORMERS}x and is tested with it alone. Run `pip install "
            f"'transformers=={TESTED_TRANSFORMERS}0'`."
        )


def resolve_model(name: str, *, revision: str | None = None, asked_as: str = "--model", fetch: bool = True) -> Path:
    """The folder of a model: a directory, `bundled:NAME`, or a hub id, whose files are downloaded to the hub's cache.

    asked_as  the option that named it, for messages
    fetch     whether files of a hub id may be downloaded; without it they have to be in the hub's cache
    Raises InputError if it is none of these.
    """
    if name.startswith("bundled:"):
        from mc_cli.bundled import bundled_path

        return bundled_path(name.removeprefix("bundled:"))
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
    return _download(name, revision, fetch=fetch)


def _download(name: str, revision: str | None, *, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]
    # Folders and `consolidated` files hold a second copy of the weights in the publisher's own layout.
    second_copies = ["*/*", "consolidated*"]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=second_copies,
                local_files_only=not fetch,
            )
        )
    except Exception as error:  # the hub client raises its own, requests' and file system errors
        if not fetch:
            raise InputError(
                f"--model {name}: not on this machine. A run would fetch it from the hub first; a dry run fetches "
                "nothing. Download it, or give a directory."
            ) from error
        raise InputError(
            f"--model {name}: not a directory here, and not to be had from the hub: {first_line(error)} Check the "
            "name, the revision and the network, or give a directory."
        ) from error


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration. Raises CheckpointError or FamilyError saying what is wrong with it."""
    check_transformers_version()
    path = folder / "config.json"
    raw = _read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} names no model_type: it is not the configuration of a transformers model.")
    brings_code = "AutoConfig" in (raw.get("auto_map") or {})
    if model_type not in CONFIG_MAPPING and not brings_code:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=1)
        raise FamilyError(
            f"{path}: transformers {transformers.__version__} knows no model_type {model_type!r}"
            + (f"; did you mean {near[0]!r}? " if near else ". ")
            + SUPPORTED
        )
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise FamilyError(
            f"{path}: model_type {model_type!r} comes with Python code of its own, which is run only with "
            f"--trust-remote-code. {SUPPORTED}"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validation raises many types, custom code any
        raise CheckpointError(f"{path} (model_type {model_type!r}) cannot be used: {first_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} does not exist. Give the folder of a Hugging Face checkpoint.")
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: it is not a Hugging Face checkpoint.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not an object. Download it again.")
    return raw


def first_line(error: Exception) -> str:
    """The beginning of an error's message as one sentence, without the names of exception types where it has words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\b[A-Z]\w*(Error|Exception): ", "", " ".join(lines[:2])) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
