"""Exports in formats of other tools as sources of logits: files decoded by us, logits of transformers' classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.files import read_json
from mc_cli.data.batches import Batch
from mc_cli.errors import ArtifactError, McError, first_line, listed
from mc_cli.measuring.logit_source import Reading, Walked
from mc_cli.models.checkpoint import Checkpoint
from mc_cli.models.model_class import model_class
from mc_cli.models.model_folder import read_config
from mc_cli.packed.packed_files import stored_tensors, weight_files


@contextmanager
def decoding(place: Path) -> Iterator[None]:
    """Turns what libraries say of files that were changed after export into one error that names the place.

    place  the directory, or the one file that it is about
    """
    try:
        yield
    except McError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):  # of the machine, not of the files
            raise
        files = " (config.json, model.safetensors)" if place.is_dir() else ""
        raise ArtifactError(
            f"{place}{files} is not as export wrote it ({type(error).__name__}: {first_line(error)}) Export it again."
        ) from error


class StoredFiles:
    """The tensors of an exported directory by name, memory-mapped, and its config.json."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / "config.json", foreign=True)
        self._stored = stored_tensors(weight_files(directory))
        self.names = tuple(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        """Raises ArtifactError for a name that is not there."""
        if name not in self._stored:
            raise ArtifactError(f"{self.directory} lacks {name}. Export it again.")
        from safetensors import safe_open

        with safe_open(self._stored[name].path, "pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor


class WalkedCheckpoint(Walked):
    """A directory in a format of published checkpoints (mc_cli/sources/), with one decoder layer in memory.

    method  how it is read, in words
    Raises ArtifactError where the directory holds more than the model, CheckpointError where it holds less.
    """

    def __init__(self, directory: Path, reading: Reading, *, method: str) -> None:
        self.method = method
        source = Checkpoint(directory, read_config(directory), dtype=reading.dtype, device=reading.device)
        if source.unused:
            raise ArtifactError(
                f"{directory}: {len(source.unused)} tensors are not of the model:\n{listed(source.unused)}\n"
                "Export it again."
            )
        super().__init__(source)


class DecodedModel:
    """A model of transformers with numbers that were decoded from a directory.

    checkpoint (name in the original checkpoint, tensor) of everything that the directory holds
    Raises ArtifactError naming what is missing or left over.
    """

    def __init__(
        self, directory: Path, reading: Reading, checkpoint: Iterator[tuple[str, Tensor]], *, method: str
    ) -> None:
        self.method = method
        config = read_config(directory)
        for key in ("quantization", "quantization_config"):
            if hasattr(config, key):
                delattr(config, key)
        tensors = {
            name: tensor.to(reading.dtype) if tensor.is_floating_point() else tensor for name, tensor in checkpoint
        }
        model, info = model_class(config).kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=reading.dtype, output_loading_info=True
        )
        wrong = [
            f"{name}: {what.replace('_', ' ')}"
            for what, names in info.items()
            for name in sorted(map(str, names or ()))
        ]
        if wrong:
            raise ArtifactError(
                f"{directory}: {len(wrong)} tensors do not fit as they are read:\n{listed(wrong)}\nExport it again."
            )
        self.model: Any = model.to(reading.device).eval()

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """[rows, length, vocabulary] float32 on the CPU."""
        logits: Tensor = self.model(**batch.to(self.model.device), use_cache=False).logits.float().cpu()
        return logits

    def close(self) -> None:
        self.model = None
