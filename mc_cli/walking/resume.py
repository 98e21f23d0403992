"""Where a layer-by-layer stage goes on after it was killed: the hidden states after the last finished layer."""

from __future__ import annotations

import re

import torch

from mc_cli.artifacts.files import read_tensors, write_tensors
from mc_cli.artifacts.store import RESUME, StageFolder
from mc_cli.errors import ArtifactError
from mc_cli.walking.layerwise import LayerWalk

_NAME = re.compile(r"before_([0-9]+)\.safetensors")


def save_progress(folder: StageFolder, walk: LayerWalk, original: LayerWalk | None = None) -> None:
    """Keeps the input of the walk's next layer; older states are removed after the new ones are safely on disk.

    original  a walk at the same depth that is to go on with it
    """
    path = folder.path(f"{RESUME}/before_{walk.depth}.safetensors")
    write_tensors(path, {"hidden": walk.hidden} | ({} if original is None else {"original": original.hidden}))
    for other in path.parent.glob("before_*.safetensors"):
        if other != path:
            other.unlink()


def restore_progress(folder: StageFolder, walk: LayerWalk, original: LayerWalk | None = None) -> int:
    """Moves the walks to the first layer that is not finished, and returns its index (0 on a fresh start)."""
    depths = [int(match[1]) for path in folder.path(RESUME).glob("*") if (match := _NAME.fullmatch(path.name))]
    if not depths:
        return 0
    depth = max(depths)
    if depth > walk.num_layers:
        raise ArtifactError(
            f"{folder.path(RESUME)} holds states behind layer {depth}, and the model has {walk.num_layers}. Use "
            "--force to begin this stage anew."
        )
    name = f"before_{depth}.safetensors"
    walk.restore(read_state(folder, name, "hidden"), depth)
    if original is not None:
        original.restore(read_state(folder, name, "original"), depth)
    return depth


def read_state(folder: StageFolder, file: str, name: str) -> torch.Tensor:
    """The tensor `name` that an earlier run left for a resume. Raises ArtifactError where it is not in its file."""
    path = folder.path(f"{RESUME}/{file}")
    found = read_tensors(path)
    if name not in found:
        raise ArtifactError(f"{path} is damaged: it has no tensor {name!r}. Use --force to begin this stage anew.")
    return found[name]
