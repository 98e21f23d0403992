"""Where a layer-by-layer stage goes on after it was killed: the hidden states after the last finished layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from mc_cli.artifacts.leftovers import PARTIAL_SUFFIX
from mc_cli.artifacts.manifest import BEGUN, MANIFEST
from mc_cli.artifacts.scratch import InMemory
from mc_cli.artifacts.states import read_state as read_tensors_of
from mc_cli.artifacts.states import recorded, write_state
from mc_cli.artifacts.store import RESUME, StageFolder
from mc_cli.errors import ArtifactError, InputError
from mc_cli.models.weight_digests import RECORD
from mc_cli.walking.layerwise import LayerWalk

_NAME = re.compile(r"before_([0-9]+)\.safetensors")
_STATE = re.compile(r"[a-z_]*before_[0-9]+\.safetensors")  # they hold their own digests, and go when the next comes


def save_progress(folder: StageFolder, walk: LayerWalk, beside: Mapping[str, LayerWalk] = MappingProxyType({})) -> None:
    """Keeps the input of the walk's next layer; older states are removed after the new ones are safely on disk.

    beside  name -> a walk at the same depth that is to go on with it
    """
    name = f"before_{walk.depth}.safetensors"
    states = walk.state()
    for beside_name, other in beside.items():
        states |= other.state(beside_name)
    save_state(folder, name, states, walk.store)
    path = folder.path(f"{RESUME}/{name}")
    for earlier in path.parent.glob("before_*.safetensors"):
        if earlier != path:
            earlier.unlink()


def restore_progress(
    folder: StageFolder, walk: LayerWalk, beside: Mapping[str, LayerWalk] = MappingProxyType({})
) -> int:
    """Moves the walks to the first layer that is not finished, and returns its index (0 on a fresh start).

    Raises ArtifactError where the state, or anything that was finished before it, is not as it was written.
    """
    depths = [int(match[1]) for path in folder.path(RESUME).glob("*") if (match := _NAME.fullmatch(path.name))]
    if not depths:
        return 0
    depth = max(depths)
    if depth > walk.num_layers:
        raise ArtifactError(
            f"{folder.path(RESUME)} holds states behind layer {depth}, and the model has {walk.num_layers}. Use "
            "--force to begin this stage anew."
        )
    walks = {"hidden": walk, **beside}
    found = read_states(folder, f"before_{depth}.safetensors", list(walks))
    for name, moved in walks.items():
        try:
            moved.restore(found[name], depth, found.get(f"{name}_handed"))
        except InputError as error:  # a state of another walk, such as one under another's name
            raise ArtifactError(f"{folder.path(f'{RESUME}/before_{depth}.safetensors')}: {error}") from error
    return depth


def save_state(folder: StageFolder, file: str, tensors: Mapping[str, torch.Tensor], store: InMemory) -> None:
    """Keeps tensors, which may lie in `store`, for a resume, with the digests of all that is finished by now."""
    write_state(folder.path(f"{RESUME}/{file}"), tensors, recorded(folder.folder, _finished(folder.folder)), store)


def _finished(folder: Path) -> Iterator[Path]:
    """The files that a resume will not write again; notes that change while a stage runs vouch for themselves."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if parts[0] == RESUME and (path.name == RECORD or _STATE.fullmatch(path.name)):
            continue
        if path.name in (BEGUN, MANIFEST) or any(part.endswith(PARTIAL_SUFFIX) for part in parts):
            continue
        if path.is_file():
            yield path


def read_states(folder: StageFolder, file: str, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors that an earlier run left for a resume. Raises ArtifactError where one is not in its file, or damaged."""
    path = folder.path(f"{RESUME}/{file}")
    found = read_tensors_of(path, folder.folder)
    for name in names:
        if name not in found:
            raise ArtifactError(f"{path} is damaged: it has no tensor {name!r}. Use --force to begin this stage anew.")
    return found


def read_state(folder: StageFolder, file: str, name: str) -> torch.Tensor:
    """One of the tensors of `read_states`."""
    return read_states(folder, file, [name])[name]
