"""Checks of the headers of a checkpoint's files, before the first weight is read.

Tensors are compared with config.json's counts, with each other, and with the skeleton of the model. Each check raises
one CheckpointError that names everything it found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from mc_cli.errors import CheckpointError, listed
from mc_cli.models.conversion_targets import Target
from mc_cli.sources.layout import StoredTensor

__all__ = ["check_counts", "check_dtypes", "check_names", "check_shapes", "check_twice"]

_LAYERS_TO_LIST = 64  # a skeleton with this many layers too many is still built at once

Targets = Mapping[str, Target]  # module-tree name -> the tensors of the files that make it


def check_counts(folder: Path, config: PretrainedConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError where config.json counts far more than the files hold, before a model of that is built.

    Counts that are a little too high are listed tensor by tensor, once there is a skeleton to compare with.
    """
    text: Any = config.get_text_config()
    numbers = {number for key in tensors for number in re.findall(r"\.(\d+)\.", f".{key}")[:1]}
    longest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    largest = max(longest, len(tensors))
    wrong = []
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(numbers) + _LAYERS_TO_LIST:
        wrong.append(f"num_hidden_layers: {layers:,}, the files hold tensors of {len(numbers):,} layers")
    elif isinstance(layers, int) and layers < 1:
        wrong.append(f"num_hidden_layers: {layers:,}, and a model has one layer at least")
    for name, value in sorted(text.to_dict().items()):
        if name.endswith(("experts", "expert")) and isinstance(value, int) and value > largest:
            wrong.append(f"{name}: {value:,}, no tensor of the files has more than {longest:,} rows or columns")
    if wrong:
        raise CheckpointError(
            f"{folder / 'config.json'} counts what the files do not hold:\n{listed(wrong)}\n"
            f"The {len(tensors):,} tensors there are {', '.join(sorted(tensors)[:3])} and others. The download may be "
            "incomplete, or config.json may be of another model."
        )


def check_names(folder: Path, targets: Targets) -> None:
    """Raises CheckpointError for tensors of experts that are named otherwise than those of the other experts."""
    misnamed = [key for target in targets.values() for key in target.misnamed]
    if misnamed:
        raise CheckpointError(
            f"{folder}: the files hold {len(misnamed)} tensors that are not named like those of the other "
            f"experts:\n{listed(misnamed)}\nCopy or download the files again."
        )


def check_twice(folder: Path, targets: Targets) -> None:
    """Raises CheckpointError for tensors that are there under two names, or fused and apart: they may differ."""
    twice = [
        f"{target.name}: {', '.join(piece.key for piece in target.all_pieces[:4])}"
        for target in targets.values()
        if target.is_twice
    ]
    if twice:
        raise CheckpointError(
            f"{folder}: the files hold {len(twice)} tensors twice, under different names:\n{listed(twice)}\n"
            "Keep the tensors of one checkpoint."
        )


def check_shapes(folder: Path, targets: Targets, known: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError for tensors that do not fit the skeleton, as far as the headers tell."""
    wrong, lost = [], []
    for name, target in targets.items():
        wanted = tuple(known[name].shape)
        if target.fuses_experts:
            lost += target.lost_experts(wanted[0])
        if not target.fits(wanted):
            pieces = target.all_pieces
            shapes = ", ".join(sorted({str(piece.shape) for piece in pieces}))
            parts = f" of {len(pieces)} parts" if len(pieces) > 1 else ""
            wrong.append(f"{name}: checkpoint {shapes}{parts}, config {wanted}")
    if lost:
        raise CheckpointError(
            f"{folder} lacks {len(lost)} tensors of experts that config.json counts:\n{listed(lost)}\n"
            "The download may be incomplete, or config.json may be of another model."
        )
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors do not fit config.json:\n{listed(wrong)}\n"
            "config.json may be of another model, or the files of another revision."
        )


def check_dtypes(folder: Path, targets: Targets, known: Mapping[str, torch.Tensor], model: str) -> None:
    """Raises CheckpointError for integers where the model computes with floats, and the other way round."""
    wrong = [
        f"{piece.key}: {str(piece.dtype).removeprefix('torch.')}"
        for name, target in targets.items()
        for piece in target.all_pieces
        if piece.dtype is not None and piece.dtype.is_floating_point != known[name].is_floating_point()
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors are stored as integers where {model} has "
            f"floating-point numbers, or the other way round:\n{listed(wrong)}\nThe safetensors files are damaged, "
            "or quantized in a way that config.json does not name. Download them again."
        )
