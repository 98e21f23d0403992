"""A model of the hub by its description: config.json and the index of its weights, without the weights themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli.errors import CheckpointError, InputError, first_line, listed
from mc_cli.models.checkpoint import REST, build_skeleton, part_of, plain_config_of, quantization_entry
from mc_cli.models.inventory import find_decoder_layers, take_inventory
from mc_cli.models.model_folder import read_model_json
from mc_cli.models.model_name import advice_for, resolve_model
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.tensor_files import INDEX, SINGLE
from mc_cli.parts import ModelInventory
from mc_cli.sources import layouts_of

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class HubDescription:
    """Describes a model's files by its index.

    file_bytes    of all tensors, 0 where the index does not tell;  files, tensors: how many there are
    unread        tensors of layers that the causal language model does not have, such as multi-token prediction
    """

    file_bytes: int
    files: int
    tensors: int
    unread: tuple[str, ...] = ()


def is_on_hub_alone(name: str, *, revision: str | None) -> bool:
    """Whether a name is a hub id of which this machine has no files."""
    if name.startswith(("bundled:", ".", "/", "~")) or Path(name).expanduser().exists():
        return False
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    try:
        resolve_model(name, revision=revision, fetch=False)
    except InputError:
        return True
    return False


def fetch_description(name: str, folder: Path, *, revision: str | None) -> Path:
    """Downloads config.json and the index of a hub id into `folder`, which is given back; no weight is fetched.

    Raises InputError where they are not to be had.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        found = HfApi().model_info(name, revision=revision)
        there = {entry.rfilename for entry in found.siblings or ()}
        for file in sorted({"config.json", INDEX} & there):  # a model in one file has no index
            hf_hub_download(name, file, revision=found.sha, local_dir=folder)
    except Exception as error:  # the hub client raises its own, its transport's and file system errors
        raise InputError(
            f"{name}: not a directory here, and its description is not to be had from the hub: {first_line(error)} "
            f"{advice_for(error, revision)}"
        ) from error
    return folder


def described(folder: Path, config: Any, *, dtype: Any) -> tuple[ModelInventory, HubDescription]:
    """The inventory of a model by its configuration, and what the index says of its files.

    Kept tensors are taken as of the dtype that config.json names, since an index tells none.
    Raises a McError where it could not be taken through all stages.
    """
    layouts_of(folder, quantization_entry(config))
    model = build_skeleton(plain_config_of(config), dtype=dtype)
    stored = config.get_text_config().dtype or dtype
    inventory = take_inventory(model, stored_dtypes=dict.fromkeys(model.state_dict(), stored))
    run_our_experts(model)
    index = folder / INDEX
    if not index.is_file():
        return inventory, HubDescription(0, 1, 0)
    content = read_model_json(index)
    placed = content.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index} is damaged: its weight_map does not name a file for each tensor.")
    layers = {part_of(name, find_decoder_layers(model)) for name in model.state_dict()} - {REST}
    beyond = [key for key in placed if (found := _LAYER.search(key)) and int(found[1]) > max(layers)]
    total = content.get("metadata", {}).get("total_size", 0)
    size = total if isinstance(total, int) else 0
    return inventory, HubDescription(size, len(set(placed.values())), len(placed), tuple(sorted(beyond)))


def told(description: HubDescription) -> list[str]:
    """Warnings about what is known of a model that is on the hub alone."""
    found = [
        f"the weights are not on this machine: shapes are those of config.json, {SINGLE} or its shards unread, and "
        "tokenizer and other files not counted."
    ]
    if description.unread:
        found.append(
            f"{len(description.unread)} tensors are of layers that nobody reads, and are left out:\n"
            f"{listed(description.unread, 5)}"
        )
    return found
