"""Batches, which a model is fed: its inputs by name, rows of one length side by side.

Text has `input_ids` alone. The other inputs of an image-text model (`pixel_values`, `image_grid_thw`,
`mm_token_type_ids`, ...) travel under the names that the model's own forward takes, so that nobody between the data
and the model has to know of them.
"""

from __future__ import annotations

from collections.abc import KeysView, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.calibration import INPUTS, read_inputs, read_token_ids
from mc_cli.data.kinds import KINDS, PADDING, token_weights
from mc_cli.errors import ArtifactError, ShapeError

TOKENS = "input_ids"


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs by name; `model(**batch)` feeds them all.

    inputs   name -> tensor; `input_ids` is [rows, length] int64, and there always
    counts   name -> entries of each row, for inputs of which a row has none, one or many in the first dimension, such
             as images or their patches; in the rows' order. Inputs that are not named here have one entry per row.
    lists    names of inputs that the model takes as lists of numbers; a batch holds them as tensors
    kinds    [rows, length] uint8, the place of each token's kind in KINDS; None: all are text
    answers  [rows, length] bool, tokens whose prediction is measured; None: all but the first of a row

    >>> batch = Batch.of_text(torch.zeros(4, 16, dtype=torch.int64))
    >>> batch.rows, batch.length, batch.select(slice(0, 2)).tokens
    (4, 16, 32)
    """

    inputs: Mapping[str, Tensor]
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kinds: Tensor | None = None
    answers: Tensor | None = None
    lists: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        tokens = self.inputs.get(TOKENS)
        if tokens is None or tokens.ndim != 2 or tokens.dtype != torch.int64:
            found = "none" if tokens is None else f"{list(tokens.shape)} {tokens.dtype}"
            raise ShapeError(f"A batch has {TOKENS} of [rows, length] int64; here it has {found}.")
        for name, counts in self.counts.items():
            if len(counts) != self.rows or name not in self.inputs:
                held = ", ".join(self.inputs)
                raise ShapeError(f"A batch counts {name} for {len(counts)} rows; it has {self.rows}, and holds {held}.")
        for name, tensor in self.inputs.items():
            wanted = sum(self.counts[name]) if name in self.counts else self.rows
            if tensor.ndim == 0 or len(tensor) != wanted:
                raise ShapeError(
                    f"A batch of {self.rows} rows holds {wanted} entries of {name}, here {list(tensor.shape)}."
                )
        for mask, dtype in ((self.kinds, torch.uint8), (self.answers, torch.bool)):
            if mask is not None and (mask.shape != tokens.shape or mask.dtype != dtype):
                raise ShapeError(
                    f"A mask of a batch is {list(tokens.shape)} {dtype}, here {list(mask.shape)} {mask.dtype}."
                )
        if self.kinds is not None and int(self.kinds.max()) >= len(KINDS):
            raise ShapeError(f"Kinds of token are 0 to {len(KINDS) - 1}, here {int(self.kinds.max())}.")

    @classmethod
    def of_text(cls, token_ids: Tensor) -> Batch:
        """token_ids  [rows, length] int64"""
        return cls({TOKENS: token_ids})

    @property
    def token_ids(self) -> Tensor:
        """[rows, length] int64."""
        return self.inputs[TOKENS]

    @property
    def rows(self) -> int:
        return len(self.inputs[TOKENS])

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.inputs[TOKENS].shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length

    @property
    def flat_kinds(self) -> Tensor | None:
        """[tokens] uint8, row after row; None where all tokens are text."""
        return None if self.kinds is None else self.kinds.reshape(-1)

    @property
    def real_kinds(self) -> Tensor | None:
        """The same without padding, [real tokens]."""
        kinds, real = self.flat_kinds, self.real
        return kinds if kinds is None or real is None else kinds[real]

    @property
    def real(self) -> Tensor | None:
        """[tokens] bool, row after row: all but padding; None where there is none."""
        return self.real_of(slice(None))

    def real_of(self, rows: slice) -> Tensor | None:
        """The same of some rows, whose other inputs are not touched."""
        if self.kinds is None:
            return None
        real = (self.kinds[rows] != PADDING).reshape(-1)
        return None if bool(real.all()) else real

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.tokens if self.real is None else int(self.real.sum())

    @property
    def predicting(self) -> Tensor | None:
        """[rows, length] bool: tokens behind which a token of an answer stands; None without answers."""
        return None if self.answers is None else torch.nn.functional.pad(self.answers[:, 1:], (0, 1))

    def weights(self) -> Tensor | None:
        """[rows, length] float32: how much each token counts in second moments; None where all count alike."""
        return None if self.kinds is None else token_weights(self.kinds)

    def keys(self) -> KeysView[str]:
        return self.inputs.keys()

    def __getitem__(self, name: str) -> Any:
        """An input as the model takes it: a tensor, or a list."""
        return self.inputs[name].tolist() if name in self.lists else self.inputs[name]

    def select(self, rows: slice | Tensor) -> Batch:
        """The rows of a range, or those with the given numbers, [n] int64; text comes as a view of a range.

        An input of which none of these rows has an entry is left out: models take no empty ones.
        """
        inputs, counts = {}, {}
        for name, tensor in self.inputs.items():
            if name not in self.counts:
                inputs[name] = tensor[rows]
                continue
            numbers = torch.arange(self.rows)[rows].tolist()
            entries = tensor.split(list(self.counts[name]))
            chosen = [entries[number] for number in numbers if len(entries[number])]
            if chosen:
                inputs[name] = torch.cat(chosen)
                counts[name] = tuple(self.counts[name][number] for number in numbers)
        kinds, answers = (None if mask is None else mask[rows] for mask in (self.kinds, self.answers))
        return Batch(inputs, counts, kinds, answers, self.lists)

    def text_alone(self) -> Batch:
        """The batch's rows with their token ids and nothing else."""
        return Batch.of_text(self.token_ids)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The batch with all tensors on `device`, those of numbers with a fraction in `dtype`; None: as they are."""
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.inputs.items()
        }
        return replace(self, inputs=inputs)

    def stored(self) -> dict[str, Tensor]:
        """Tensors that `read_calibration` takes from the file beside the token ids; empty for text alone."""
        found = {
            f"{'lists' if name in self.lists else 'inputs'}.{name}": tensor
            for name, tensor in self.inputs.items()
            if name != TOKENS
        }
        found |= {f"counts.{name}": torch.tensor(counts) for name, counts in self.counts.items()}
        masks = {"kinds": self.kinds, "answers": self.answers}
        return found | {name: mask for name, mask in masks.items() if mask is not None}


def read_calibration(calibration: Path, *, vocabulary: int) -> Batch:
    """The calibration rows of a folder that stage calibrate wrote. Raises ArtifactError where a file is damaged.

    vocabulary  how many ids the model knows
    """
    tokens = read_token_ids(calibration, vocabulary=vocabulary)
    stored = read_inputs(calibration)
    if not stored:
        return Batch.of_text(tokens)
    inputs, lists, counts = (
        {name.removeprefix(kind): tensor for name, tensor in stored.items() if name.startswith(kind)}
        for kind in ("inputs.", "lists.", "counts.")
    )
    try:
        return Batch(
            {TOKENS: tokens, **inputs, **lists},
            {name: tuple(tensor.tolist()) for name, tensor in counts.items()},
            stored.get("kinds"),
            stored.get("answers"),
            frozenset(lists),
        )
    except ShapeError as error:
        raise ArtifactError(
            f"{calibration / INPUTS} does not fit the token ids: {error} Run calibrate --force."
        ) from error
