"""Single experts of a checkpoint, read from its files when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from mc_cli.errors import CheckpointError
from mc_cli.models.conversion_targets import Target, joined_rows
from mc_cli.models.finite import is_finite, weights_not_finite
from mc_cli.models.tensor_files import TensorFiles
from mc_cli.sources.layout import StoredTensor


@dataclass(frozen=True)
class FusedExperts:
    """A fused parameter of a layer's experts: the stored tensors that it is made of, and one expert's shape in it."""

    target: Target
    shape: Sequence[int]

    def stored_of(self, expert: int) -> list[StoredTensor]:
        """The stored tensors that hold one expert's part."""
        if not self.target.fuses_experts:
            return self.target.all_pieces
        return [self.target.pieces[pattern][expert] for pattern in self.target.patterns]

    def read(self, files: TensorFiles, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's part, as the model lays it out."""
        whole = torch.empty(tuple(self.shape), dtype=dtype)
        if self.target.fuses_experts:
            keys = [stored.key for stored in self.stored_of(expert)]
            with files.reading(keys) as slices:
                return joined_rows([slices[key] for key in keys], whole)
        (stored,) = self.target.all_pieces
        with files.reading([stored.key], {stored.key: dtype}) as slices:
            return whole.copy_(slices[stored.key][expert])


class ExpertReader:
    """Reads the experts of one layer; the first time each is looked at, whether its weights are finite."""

    def __init__(
        self,
        files: TensorFiles,
        fused: Mapping[str, FusedExperts | None],
        dtype: torch.dtype,
        device: torch.device,
        where: str,
    ) -> None:
        """`fused` by parameter of the experts module, all of them known;  where: in words, for errors."""
        self._files = files
        self._fused = fused
        self._dtype = dtype
        self._device = device
        self._where = where
        self._checked: set[tuple[str, int]] = set()

    def read(self, projection: str, expert: int) -> torch.Tensor:
        """One expert's part of a fused parameter, on the device. Raises CheckpointError where it is not finite."""
        fused = self._fused[projection]
        assert fused is not None
        try:
            weight = fused.read(self._files, expert, self._dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._where}: cannot be read: {error}. Download the files again.") from error
        if (projection, expert) not in self._checked:
            if not is_finite(weight):
                count = weight.numel() - int(weight.isfinite().sum())
                wrong = [f"{fused.target.name}: {count:,} of {weight.numel():,} values of expert {expert}"]
                stored = fused.stored_of(expert)
                raise weights_not_finite(self._where, wrong, self._dtype, self._files, stored)
            self._checked.add((projection, expert))
        return weight.to(self._device)
