"""A packed model's weights for an engine with model code of its own: what its layers call, found by checkpoint names.

The engine builds its model by the names of the original checkpoint, packed tensors have those of transformers' module
tree. transformers knows the way from the one to the other, and does here what it does when it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mc_cli import kernels
from mc_cli.errors import ArtifactError, listed
from mc_cli.models.experts import PRUNER, Experts, experts_at, experts_forward
from mc_cli.models.memory import read_ahead
from mc_cli.models.published_names import as_published
from mc_cli.models.skeleton import build_skeleton
from mc_cli.packed.packed_model import PackedSource
from mc_cli.packed.packed_modules import ask_for_huge_weights
from mc_cli.serving.skipped_calls import CountedPolicy
from mc_cli.skipping.pruning import pruners

_EXPERTS = ".experts"


class Renames(Protocol):
    """A step from one set of module names to another."""

    def map_name(self, key: str, /) -> str | None:
        """The name of a tensor in the other set; None for one that it does not have."""
        ...


class Matrix:
    """One matrix or several over each other, as a linear, a head or an embedding; each packed, or kept as it was."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules
        packed = [weight_owner(module) for module in modules]
        shapes = [
            (owner._mc_weight.out_features, owner._mc_weight.in_features) if owner is not None else module.weight.shape
            for module, owner in zip(modules, packed, strict=True)
        ]
        self.out_features = sum(shape[0] for shape in shapes)
        self.in_features = int(shapes[0][1])
        self.dtype = next(owner._mc_weight.dtype for owner in packed if owner is not None)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., out_features] of inputs [..., in_features]; of token ids [...] their rows [..., in_features]."""
        if not inputs.is_floating_point():
            rows: torch.Tensor = self._modules[0](inputs)
            return rows
        outputs = [_product(module, inputs) for module in self._modules]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def weight_owner(module: Any) -> Any:
    """The module whose packed weight this one multiplies with: itself, or the embedding of a tied head; else None."""
    tied = getattr(module, "_mc_embedding", None)
    owner = module if tied is None else tied[0]
    return owner if hasattr(owner, "_mc_weight") else None


def _product(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    owner = weight_owner(module)
    if owner is None:
        return nn.functional.linear(inputs, module.weight)
    packed = owner._mc_weight
    parts = {part: owner._parameters[part] for part in packed.parts}
    return kernels.packed_linear(inputs, parts, packed.encoding, in_features=packed.in_features)


class LayerExperts:
    """The routed experts of one layer, with the policy that the model was exported with.

    dropped  slots that the engine's router must not choose: what the layout or the policy drops
    """

    def __init__(self, module: Experts, dropped: Iterable[int]) -> None:
        self._module = module
        self.dropped = tuple(sorted(set(dropped)))

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] in the dtype of `hidden`: the weighted sum of each token's experts.

        index    [tokens, k] int64, what the router chose;  weights  [tokens, k]
        A policy that looks at received attention has its calibrated mean for every token: an engine's attention keeps
        no map, and tokens that are decoded have it anyway.
        """
        watch = getattr(getattr(self._module, PRUNER, None), "watch", None)
        if watch is not None:
            watch.alone = len(hidden)
        return experts_forward(self._module, hidden, index, weights)


class PackedWeights:
    """The packed modules of a model, each taken once by the layer of an engine's model that calls it.

    folder   a directory exported for transformers
    dtype    of the engine's activations, and of kept weights
    rate     share of expert calls to skip; None for the one that the model was exported with, 0 for none
    counts   where given, `counted` has the policies' counts: those of forwards for which it gives True
    Raises ArtifactError as `PackedSource` where the directory is damaged, InputError for a rate that was not fitted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        rate: float | None = None,
        counts: Callable[[], bool] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        source = PackedSource(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        self._source = source
        self._plain: Any = build_skeleton(source.config, dtype=dtype)
        self._shapes = dict(self._plain.state_dict())
        self._renames: list[Renames] = []
        self._paths: dict[str, str] | None = None  # the engine's name of a matrix or experts -> path
        self._taken: set[str] = set()  # paths of experts modules, and of linears and embeddings
        pruning = source.layout.pruning
        self._pruners = pruners(pruning, pruning.at_rate(rate)) if pruning is not None and rate != 0 else {}
        self._counts, self._device = counts, device
        self.counted: dict[str, CountedPolicy] = {}  # path of experts -> the policy that counts

    def rename(self, renames: Renames) -> None:
        """Adds a step from the names of a checkpoint to those of the engine's modules; twice the same is one."""
        if renames not in self._renames:
            self._renames.append(renames)
            self._paths = None

    def take_experts(self, name: str) -> LayerExperts:
        """The routed experts that the engine has under a name. Raises ArtifactError where there are none."""
        path = self._by_name().get(name)
        blocks = {block.path: block for block in self._source.layout.experts}
        if path is None or path not in blocks:
            raise ArtifactError(
                f"{self._source.folder}: the engine has routed experts {name!r}, the packed layout {sorted(blocks)}. "
                "Serve this family with transformers: mc-cli serve DIR --engine transformers."
            )
        self._taken.add(path)
        pruner = self._pruners.get(path)
        module = experts_at(self._source.model, path)
        if pruner is not None and self._counts is not None:
            self.counted[path] = CountedPolicy(pruner, self._device, self._counts)
        if pruner is not None:
            setattr(module, PRUNER, self.counted.get(path, pruner))
        return LayerExperts(module, [*blocks[path].dropped, *(pruner.layer.dropped if pruner is not None else ())])

    def take_matrix(self, name: str, shards: Sequence[str] | None = None) -> Matrix | None:
        """The matrix that the engine has under a name, or those that it merges there; None where all are kept.

        shards   last names of those that the engine puts over each other as one matrix, where the model has no `name`
        """
        parent = name.rpartition(".")[0]
        names = (
            [name]
            if shards is None or name in self._by_name()
            else [f"{parent}.{shard}" if parent else shard for shard in shards]
        )
        paths = [self._by_name().get(each) for each in names]
        modules = [None if path is None else self._source.model.get_submodule(path) for path in paths]
        if not any(module is not None and weight_owner(module) is not None for module in modules):
            return None
        missing = [each for each, path in zip(names, paths, strict=True) if path is None]
        if missing:
            raise ArtifactError(f"{self._source.folder}: {name} is merged of {names}; the model has no {missing}.")
        self._taken |= {path for path in paths if path is not None}
        return Matrix(modules)

    def require_all_taken(self, engine: str) -> None:
        """Raises ArtifactError naming what is packed, and what no layer of the engine's model has taken."""
        layout = self._source.layout
        left = sorted({*layout.linears, *(block.path for block in layout.experts)} - self._taken)
        if left:
            raise ArtifactError(
                f"{engine} calls {len(left)} of the packed modules under no name that is known here:\n{listed(left)}\n"
                "Serve this family with transformers: mc-cli serve DIR --engine transformers."
            )

    def kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the original checkpoint, tensor) of all that the engine's own layers hold."""
        own = set(self._own_names())
        for name, tensor in self._source.files.read(sorted(self._source.files.tensors.keys() - own)):
            yield from as_published(self._plain, {name: tensor}).items()

    def load(self) -> None:
        """Reads what was taken; files are mapped, not copied, where the device is the CPU."""
        read_ahead({tensor.path for tensor in self._source.files.tensors.values()})
        self._source.load_names(self._own_names())
        ask_for_huge_weights(self._source.model)

    def _own_names(self) -> list[str]:
        """Stored names of what was taken: all that experts modules have, weights of matrices but not their biases."""
        experts = {block.path for block in self._source.layout.experts}
        names = []
        for name in self._source.files.tensors:
            path, _, leaf = name.rpartition(".")
            if (
                path in experts
                or any(name.startswith(f"{each}.") for each in experts)
                or (path in self._taken and leaf != "bias")
            ):
                names.append(name)
        return names

    def _by_name(self) -> dict[str, str]:
        if self._paths is None:
            experts = {block.path for block in self._source.layout.experts}
            self._paths = {}
            for name, shape in self._shapes.items():
                path, _, leaf = name.rpartition(".")
                if path in experts:
                    found = {_before_experts(each) for each in self._engine_names(name) if _EXPERTS in each}
                elif leaf == "weight" and shape.ndim == 2:
                    found = {each.removesuffix(".weight") for each in self._engine_names(name)}
                else:
                    continue
                self._paths |= dict.fromkeys(found, path)
            # checkpoints of some families have no module for experts; engines call it as transformers does then
            self._paths = {**{path: path for path in experts}, **self._paths}
        return self._paths

    def _engine_names(self, name: str) -> list[str]:
        """The engine's names of what a checkpoint has for one tensor of the module tree."""
        found = list(as_published(self._plain, {name: self._shapes[name]}))
        for renames in self._renames:
            found = [mapped for each in found if (mapped := renames.map_name(each)) is not None]
        return found


def _before_experts(name: str) -> str:
    """`model.layers.0.mlp.experts` of `model.layers.0.mlp.experts.3.w1.weight`."""
    begin, experts, _ = name.rpartition(_EXPERTS)
    return begin + experts
