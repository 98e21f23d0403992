"""Writing one part of the packed model after another: a decoder layer, or what is outside of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.packed import PackedLayout, part_file, part_name
from mc_cli.artifacts.quantization import write_report
from mc_cli.artifacts.store import RESUME, StageFolder
from mc_cli.artifacts.streamed import Pieces, write_pieces
from mc_cli.coding.layer_result import LayerResult
from mc_cli.models.checkpoint import Checkpoint
from mc_cli.models.session import Session
from mc_cli.parts import Role, TensorPart


class PartWriter:
    """Writes one part of the packed model: its tensors in final form, and its report."""

    def __init__(self, folder: StageFolder, checkpoint: Checkpoint, session: Session) -> None:
        self._folder = folder
        self._model = checkpoint.model
        self._store = checkpoint.store
        self._compute_dtype = session.dtype

    def write(self, part: int, parts: list[TensorPart], result: LayerResult) -> None:
        """`part`: the decoder layer, or REST;  parts: its tensors in the checkpoint."""
        tensors: dict[str, Pieces] = {}
        replaced = {f"{path}.weight" for path in result.linears}
        state = self._model.state_dict()
        for each in parts:
            if each.role is not Role.EXPERT and each.name not in replaced:
                tensors[each.name] = Pieces.of(self._kept(state[each.name], each.dtype))
        for path, (_, packed) in result.linears.items():
            tensors |= {f"{path}.{stored}": Pieces.of(tensor) for stored, tensor in packed.items()}
        if result.layout is not None:
            dtype = next(each.dtype for each in parts if each.role is Role.EXPERT)
            tensors |= self._stacked(result, dtype)
        layout = PackedLayout(
            (result.layout,) if result.layout else (), {path: key for path, (key, _) in result.linears.items()}
        )
        write_json(self._folder.path(f"{RESUME}/layout_{part_name(part)}.json"), layout.to_json())
        write_report(self._folder.path(f"report/{part_name(part)}.json"), result.report)
        write_pieces(self._folder.path(part_file(part)), tensors)

    def _kept(self, tensor: torch.Tensor, stored: str) -> torch.Tensor:
        """The tensor in the checkpoint's dtype: exact, unless computing was narrower than storing, then as computed."""
        dtype = getattr(torch, stored)
        if tensor.is_floating_point() and dtype.itemsize > tensor.dtype.itemsize:
            return tensor
        return tensor.to(dtype)

    def _stacked(self, result: LayerResult, dtype: str) -> dict[str, Pieces]:
        """The matrices of each stack behind each other: never all in memory."""
        assert result.layout is not None
        tensors = {}
        for projection in result.layout.projections:
            for stack in result.layout.stacks(projection):
                packed = [result.experts[projection][member][1] for member in stack.members]
                for stored, first in packed[0].items():
                    name = f"{result.layout.path}.{stack.name(stored)}"
                    kept = dtype if stored == "weight" else None
                    tensors[name] = self._stack([entry[stored] for entry in packed], first, kept)
        return tensors

    def _stack(
        self, members: Sequence[torch.Tensor | Pieces], first: torch.Tensor | Pieces, kept: str | None
    ) -> Pieces:
        """One tensor of several matrices like the `first`; kept: the checkpoint's dtype, where they are weights."""

        def pieces() -> Iterator[torch.Tensor]:
            for member in members:
                whole = member if isinstance(member, Pieces) else Pieces.of(member, after=self._store.release)
                for piece in whole.pieces():
                    yield piece if kept is None else self._kept(piece, kept)

        sample = torch.empty(0, dtype=first.dtype)
        stored = sample if kept is None else self._kept(sample, kept)
        return Pieces((len(members), *first.shape), stored.dtype, pieces)
