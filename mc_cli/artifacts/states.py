"""States, which an unfinished stage leaves for its resume: tensors with a digest of themselves and of files beside.

No manifest vouches for a stage that has not finished, and a value that was changed meanwhile would give another result
without a word. So a state carries sha256 of its tensors in its metadata, and there, too, the digests of all that was
finished when it was written. Written in one step, it is there with them or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.damage import ALL_BYTES, RecordedFile, damaged_files, record_of
from mc_cli.artifacts.files import content_digest, read_json, read_tensors, write_json
from mc_cli.artifacts.scratch import InMemory
from mc_cli.artifacts.streamed import Pieces, bytes_of, write_pieces
from mc_cli.artifacts.strict_json import JsonError, parse_json
from mc_cli.errors import ArtifactError, listed

if TYPE_CHECKING:
    import torch

_DIGEST, _FILES = "sha256", "files"
_STATE = "state"  # the one entry of the metadata: safetensors writes several in any order, and bytes must not differ
_HASHED = 1 << 24  # numbers at a time
_ANEW = "Use --force to begin this stage anew."

Recorded = dict[str, RecordedFile]  # file, relative to the stage's folder


def recorded(folder: Path, paths: Iterator[Path]) -> Recorded:
    """Digest and size of files below `folder`, by name; each is read once per process."""
    return {path.relative_to(folder).as_posix(): record_of(path) for path in sorted(paths)}


def write_state(
    path: Path, tensors: Mapping[str, torch.Tensor], files: Recorded | None = None, store: InMemory | None = None
) -> None:
    """Writes tensors for a resume.

    files   what was finished before, which a resume goes on with
    store   that tensors may lie in: some of them at a time is in memory
    """
    text = json.dumps(files or {}, sort_keys=True)
    release = (store or InMemory()).release
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_STATE: json.dumps({_DIGEST: _digest(ready, text, release), _FILES: text})}
    write_pieces(path, {name: Pieces.of(tensor, after=release) for name, tensor in ready.items()}, metadata)


def read_state(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state, once they and the files in `folder` that it vouches for are found as they were written.

    Raises ArtifactError naming each file that is not.
    """
    from safetensors import safe_open

    tensors = read_tensors(path)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata() or {}
    try:
        state = parse_json(metadata.get(_STATE, "{}").encode("utf-8", "surrogatepass"), finite=True, unique=True)
        text = state.get(_FILES, "") if isinstance(state, dict) else ""
        if not isinstance(text, str) or not isinstance(state, dict) or state.get(_DIGEST) != _digest(tensors, text):
            raise ArtifactError(f"{path} is damaged: its values are not those that were written. {_ANEW}")
        files = parse_json(text.encode("utf-8", "surrogatepass"), finite=True, unique=True)
    except JsonError as error:
        raise ArtifactError(f"{path} is damaged: its record of files is not JSON ({error}). {_ANEW}") from error
    wrong = damaged_files(folder, files, up_to_bytes=ALL_BYTES)
    if wrong:
        raise ArtifactError(
            f"What an earlier run of this stage had finished in {folder} is damaged:\n{listed(wrong)}\n{_ANEW}"
        )
    return tensors


def _digest(
    tensors: Mapping[str, torch.Tensor], text: str, after: Callable[[torch.Tensor], None] = lambda piece: None
) -> str:
    """Digest of all values; `after` is called with each piece that was read."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        for flat in tensor.reshape(-1).split(_HASHED):
            found.update(bytes_of(flat))
            after(flat)
    return found.hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with a digest of itself."""
    write_json(path, {"content": dict(content), _DIGEST: content_digest(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote. Raises ArtifactError where it is not as it was written."""
    found = read_json(path)
    content = found.get("content")
    if not isinstance(content, dict) or found != {"content": content, _DIGEST: content_digest(content)}:
        raise ArtifactError(f"{path} is damaged: it is not as it was written. {_ANEW}")
    return content
