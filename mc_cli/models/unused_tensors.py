"""Tensors of a checkpoint beside the model that its class makes of it, such as layers of multi-token prediction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mc_cli.artifacts.files import read_json
from mc_cli.errors import StaleArtifactError, listed
from mc_cli.models.model_files import with_counts_of
from mc_cli.models.session import Session
from mc_cli.models.weight_digests import changed_files


class UnusedTensors:
    """The tensors that no stage reads, taken from the original checkpoint.

    names     their keys in its files
    unplaced  those, and what transformers calls them when it says that it has no place for them
    Raises StaleArtifactError where the files that hold them are not those that calibrate read.
    """

    def __init__(self, session: Session) -> None:
        checkpoint = session.open_checkpoint()
        self._files = checkpoint.files
        self._folder = session.folder
        self.names = tuple(checkpoint.unused)
        self.unplaced = frozenset((*checkpoint.unused, *checkpoint.unplaced))
        weights = session.recorded_weights()
        held = {file for name in self.names for file in self._files.tensors[name].files}
        wanted = {} if weights is None else {file: weights.digests[file] for file in held}
        wrong = changed_files(session.folder, wanted, session.digests(), read=True)
        if wrong:
            raise StaleArtifactError(
                f"--keep-unused takes tensors from the original, whose files are not those that calibrate read:\n"
                f"{listed(wrong)}\nPut the files of that time back, or export without it."
            )

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) one by one: as they are stored, or where that is in codes their values in `dtype`."""
        for name in self.names:
            with self._files.reading([name], {name: dtype}) as slices:
                tensor = slices[name][...]
            yield name, tensor if self._files.tensors[name].layout is None else tensor.to(dtype)

    def config(self, plain: dict[str, Any]) -> dict[str, Any]:
        """config.json of a result, which counts these tensors' layers again."""
        return with_counts_of(plain, read_json(self._folder / "config.json", foreign=True))
