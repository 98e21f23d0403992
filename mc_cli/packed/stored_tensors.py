"""Compares what is stored with what a packed model wants, for every loader, before a weight is used.

A loader that finds no tensor of a name leaves memory as it was, so anything that is missing, or more, or of another
shape or dtype is an error, be it a damaged header or a directory whose config.json is another export's.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from mc_cli.artifacts.places import file_inside, require_inside
from mc_cli.errors import ArtifactError, listed
from mc_cli.models.inventory import tied_tensors
from mc_cli.packed.packed_files import StoredTensor, stored_tensors

_FEW_LAYERS = 64
_KEPT_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of checkpoints' weights


def check_stored(
    model: Any, packed: Container[str], stored: Mapping[str, StoredTensor], where: object
) -> dict[str, torch.Tensor]:
    """Name -> (meta) tensor of all that `model`, which has its packed storage already, wants to have stored.

    packed   names of stored parts and of what a policy learned: their dtypes are exact. Others are kept as they were in
             the checkpoint: numbers that are floating stay so, in any of a checkpoint's dtypes, others are exact, too
    stored   what the headers say
    where    the folder, for messages
    A base model, or one with another head than that for the next token, wants no head that is stored, and the head that
    it has is its own. Raises ArtifactError naming all that is missing, too many, or of another shape or dtype.
    """
    tied = tied_tensors(model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    prefix = model.base_model_prefix + "."
    if is_base(model):
        stored = {name.removeprefix(prefix): entry for name, entry in stored.items() if name.startswith(prefix)}
    elif model.get_output_embeddings() is None and not model.can_generate():  # a head inside the text model is one
        stored = {name: entry for name, entry in stored.items() if name.startswith(prefix)}
        wanted = {name: tensor for name, tensor in wanted.items() if name.startswith(prefix)}
    problems = [f"{name}: missing" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"{name}: not part of the model" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        found, tensor = stored[name], wanted[name]
        if found.shape != tuple(tensor.shape):
            problems.append(f"{name}: stored {found.shape}, model {tuple(tensor.shape)}")
        elif name in packed and found.dtype != tensor.dtype:
            problems.append(f"{name}: stored as {found.dtype}, its encoding has {tensor.dtype}")
        elif found.dtype != tensor.dtype and not (tensor.is_floating_point() and found.dtype in _KEPT_FLOATS):
            problems.append(f"{name}: stored as {found.dtype}, the model has {tensor.dtype}")
    if problems:
        raise ArtifactError(
            f"{where}: {len(problems)} tensors do not fit the layout:\n{listed(problems)}\n"
            "The files are damaged or of another model; run quantize or export again with --force, or copy or download "
            "the directory again."
        )
    return wanted


def is_base(model: Any) -> bool:
    """Whether a model is the base of others, which have it under its prefix and a head beside it."""
    prefix = model.base_model_prefix
    return bool(prefix) and not hasattr(model, prefix) and model.get_output_embeddings() is None


def check_loaded(model: Any, packed: Container[str], files: list[str] | None) -> None:
    """`check_stored` for the files that transformers is about to load into `model`.

    Raises ArtifactError also where one is no safetensors file, InputError where one lies outside of the directory.
    """
    named = str(getattr(model.config, "name_or_path", "") or "")
    folder = Path(named) if named and Path(named).is_dir() else None
    paths = [_inside(folder, str(file)) for file in files or ()]
    others = [str(path) for path in paths if path.suffix != ".safetensors"]
    if others or not paths:
        raise ArtifactError(
            f"{named}: a packed model is read from safetensors files alone, not from {', '.join(others) or 'none'}. "
            "Copy, download or make the directory again."
        )
    check_stored(model, packed, stored_tensors(paths), folder or paths[0].parent)


def _inside(folder: Path | None, file: str) -> Path:
    if folder is None:  # files of the hub's cache, where links lead to them
        path = Path(file)
        file_inside(path.parent, path.name)
        require_inside(path.parent, path)
        return path
    begin = str(folder).rstrip("/") + "/"
    return file_inside(folder, file.removeprefix(begin).lstrip("/") if file.startswith(begin) else file)


def check_layer_count(config: Any, names: Mapping[str, object], where: object) -> None:
    """Raises ArtifactError where config.json counts far more decoder layers than there are tensors of.

    Building a model of a million layers, only to find that there is nothing to put into it, would take all memory. A
    few that are missing are named one by one by `check_stored`.
    """
    found = {int(part) for name in names for part in name.split(".") if part.isascii() and part.isdigit()}
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    there = max(found, default=-1) + 1
    if isinstance(count, int) and count > there + _FEW_LAYERS:
        raise ArtifactError(
            f"{where}: config.json says that the model has {count} layers, tensors are there of {there}. It is damaged "
            "or another model's; copy, download or make the directory again."
        )
