"""Costs of coding the parts beside the experts: each role by itself at one width, measured at the model's output.

Errors of attention, of shared experts and of the embedding pass through all layers after them and change what routers
choose, so that no measure at the matrix itself says what they cost. For every role some calibration sequences walk
through the model a second time, with this role's matrices coded and everything else as in the checkpoint. The KL
divergence of what comes out from what the original gives is the cost. Matrices get the errors that quantize would make
of them, on inputs of the original model: drawn at random, where a search would take long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mc_cli.artifacts.importance import RoleCost
from mc_cli.coding.layer_result import LayerResult
from mc_cli.coding.linears import LinearCoder
from mc_cli.data.kinds import IMAGE, PADDING
from mc_cli.numerics.divergence import divergence
from mc_cli.parts import ModelInventory, Role, TensorPart
from mc_cli.quantizers import Quantizer
from mc_cli.quantizers.job import Executor
from mc_cli.walking.layerwise import LayerWalk

TOKENS = 4096  # of calibration that walk again for every role, about
IN_LAYERS = (Role.ATTENTION, Role.SHARED, Role.DENSE)
MEASURED = (*IN_LAYERS, Role.EMBEDDING, Role.HEAD)


def trial_rows(rows: int, length: int) -> slice:
    """The sequences that walk again, of so many of that length: from all over, as text may be ordered by its kinds."""
    count = min(rows, max(1, TOKENS // length))
    return slice(0, None, -(-rows // count))


@dataclass(frozen=True)
class OneRole:
    """A plan that codes one role and keeps everything else."""

    role_bits: Mapping[Role, float]
    family: str
    group_size_limit: int


class RoleTrials:
    """The walks of one model in which one role is coded.

    twins  role -> walk over some of the calibration sequences, at the depth of the main walk. The head has none, as it
           only sees what the last layer gives
    """

    def __init__(
        self,
        walk: LayerWalk,
        inventory: ModelInventory,
        widths: Mapping[Role, float],
        quantizer: Quantizer,
        executor: Executor,
        *,
        family: str,
        group_size_limit: int,
    ) -> None:
        """Codes the embedding, and begins the walks.

        walk    the main walk, before the first layer
        widths  of the roles to measure, of which the model has matrices that can be packed
        """
        self._walk, self._inventory = walk, inventory
        self._rows = trial_rows(walk.inputs.rows, walk.inputs.length)
        self._widths = widths
        self._coders = {
            role: LinearCoder(walk, OneRole({role: bits}, family, group_size_limit), quantizer, executor, forecast=True)
            for role, bits in widths.items()
        }
        self._embedding: dict[str, torch.Tensor] = {}  # its weights as they become, where they are the head's as well
        self.twins: dict[Role, LayerWalk] = {}
        if in_layers := [role for role in widths if role in IN_LAYERS]:
            begun = walk.of_rows(self._rows)
            self.twins = {role: begun.twin() for role in in_layers}
        if Role.EMBEDDING in self._coders:
            self._begin_embedding()

    def states(self) -> dict[str, LayerWalk]:
        """The walks by the names under which a resume keeps them."""
        return {f"with_{role.value}": twin for role, twin in self.twins.items()}

    def layer(self, layer: int) -> None:
        """Takes every walk through the resident layer, which the main walk has not passed yet."""
        for role, twin in self.twins.items():
            parts = [part for part in self._parts(role) if part.layer == layer and part.packable]
            if role not in IN_LAYERS or not parts:
                twin.run_layer(advance=True)
                continue
            with self._unharmed(parts):
                self._coders[role].layer(parts, LayerResult())
                twin.run_layer(advance=True)

    def costs(self) -> tuple[RoleCost, ...]:
        """The cost of every role, once the main walk and all others have passed the last layer."""
        heads = {Role.EMBEDDING: self._embedding}
        found = [self._cost(role, twin.hidden, heads.get(role, {})) for role, twin in self.twins.items()]
        if Role.HEAD in self._coders:
            parts = [part for part in self._parts(Role.HEAD) if part.packable]
            with self._unharmed(parts):
                self._coders[Role.HEAD].head(parts, LayerResult())
                coded = {part.name: self._walk.store.copy(self._weight(part)) for part in parts}
            found.append(self._cost(Role.HEAD, self._walk.hidden[self._rows], coded))
        return tuple(found)

    def _cost(self, role: Role, hidden: torch.Tensor, head: Mapping[str, torch.Tensor]) -> RoleCost:
        """The mean KL divergence of logits made of `hidden`, with the weights by name in `head` instead of the own."""
        total, tokens = 0.0, 0
        parts = [part for part in self._inventory.tensors if part.name in head]
        for place, row in enumerate(range(self._walk.inputs.rows)[self._rows]):
            rows = slice(row, row + 1)
            counted = self._counted(rows)
            original = self._predictions(rows, self._walk.hidden[rows])[counted]
            with self._unharmed(parts):
                for part in parts:
                    self._weight(part).copy_(head[part.name])
                changed = self._predictions(rows, hidden[place : place + 1])[counted]
            total += float(divergence(original, changed).sum())
            tokens += len(original)
        weights = sum(math.prod(part.shape) for part in self._parts(role) if part.packable)
        return RoleCost(role.value, self._widths[role], max(0.0, total / max(1, tokens)), weights, tokens)

    def _predictions(self, rows: slice, hidden: torch.Tensor) -> torch.Tensor:
        """[length, vocabulary] logarithms of probabilities of one sequence."""
        return self._walk.logits(rows, hidden)[0].float().log_softmax(-1)

    def _counted(self, rows: slice) -> torch.Tensor:
        """[length] bool: tokens of one sequence whose prediction counts; of answers alone where there are some."""
        batch = self._walk.inputs
        if batch.predicting is not None:
            counted = batch.predicting[rows][0]
        elif batch.kinds is not None:
            counted = (batch.kinds[rows][0] != IMAGE) & (batch.kinds[rows][0] != PADDING)
        else:
            counted = torch.ones(batch.length, dtype=torch.bool)
        return counted.to(self._walk.source.device)

    def _begin_embedding(self) -> None:
        parts = [part for part in self._parts(Role.EMBEDDING) if part.packable]
        with self._unharmed(parts):
            self._coders[Role.EMBEDDING].embedding(parts, LayerResult())
            self.twins[Role.EMBEDDING] = self._walk.of_rows(self._rows)
            if self._inventory.tied_head:
                self._embedding = {part.name: self._walk.store.copy(self._weight(part)) for part in parts}

    @contextmanager
    def _unharmed(self, parts: Sequence[TensorPart]) -> Iterator[None]:
        """Puts the weights back as they were."""
        store = self._walk.store
        before = [store.copy(self._weight(part)) for part in parts]
        try:
            yield
        finally:
            for part, weight in zip(parts, before, strict=True):
                self._weight(part).copy_(weight)
                store.release(weight)

    def _parts(self, role: Role) -> list[TensorPart]:
        return [part for part in self._inventory.tensors if part.role is role]

    def _weight(self, part: TensorPart) -> torch.Tensor:
        return self._walk.source.model.get_parameter(part.name).data
