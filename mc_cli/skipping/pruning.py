"""Runs a skipping policy: the experts of a layer ask it before each forward; it is put on a model and taken off again.

A skipped slot gets the index that the experts interface skips, so its expert is neither computed nor its weights read.
It works on the experts interface alone: for every family, dense or packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mc_cli.artifacts.pruning import TENSOR_PREFIX, OperatingPoint, PrunedLayer, Pruning
from mc_cli.data.kinds import MEASURED, PADDING
from mc_cli.errors import ArtifactError, listed, shown
from mc_cli.models.experts import PRUNER, Experts, hidden_size_of, is_standard_experts
from mc_cli.models.inventory import router_path_of, top_k_of
from mc_cli.models.packed_experts import has_halves
from mc_cli.models.router_masks import mask_router
from mc_cli.policies import (
    CompiledRule,
    Cut,
    LayerValues,
    Routed,
    compiled_rule,
    kept_slots,
    learned_shapes,
    policies,
    policy_from_name,
    runs_halves,
)
from mc_cli.skipping.received_attention import AttentionWatch, watch_attention
from mc_cli.skipping.token_kinds import GivenKinds, Parts, TokenKinds, WalkedKinds

_HANDLES = "_mc_pruning_handles"
_ANY = ""  # stands for a kind of token where kinds share a threshold, or are not known


@dataclass(frozen=True)
class _Bound:
    """State that a pruner needs in every forward.

    held   learned tensors that the experts module has, by attribute
    rules  kind of token -> its cut and, where there is one, its compiled rule; ANY: of tokens whose kind is not known
    """

    device: torch.device
    held: Sequence[tuple[str, Tensor]]
    values: LayerValues
    rules: Mapping[str, tuple[Cut, CompiledRule | None]]

    def fits(self, module: Experts) -> bool:
        return not self.held or all(getattr(module, name) is tensor for name, tensor in self.held)


class LayerPruner:
    """Decides for one layer which slots are computed.

    kept      with `count`: per forward, [tokens] slots kept;  calls: [experts] how often each expert was computed.
              A slot that runs half of its expert counts half
    chosen    with `count`: per forward, [tokens] slots in which the router chose an expert

    by_kind   kind of token -> its threshold; `threshold` is then of tokens whose kind is not known
    tensors   the policy's learned tensors by name; None: they are attributes of the experts module
    kinds     [tokens] uint8 of all forwards, one behind the other: padding is not counted; or what tells the kinds of
              each forward; None: none is padding, and kinds are not known
    """

    def __init__(
        self,
        pruning: Pruning,
        layer: PrunedLayer,
        threshold: float,
        *,
        by_kind: Mapping[str, float] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        count: bool = False,
        kinds: Tensor | GivenKinds | None = None,
    ) -> None:
        self.policy = policy_from_name(pruning.policy)
        self.layer = layer
        self.thresholds = {_ANY: threshold, **(by_kind or {})}
        real = kinds != PADDING if isinstance(kinds, Tensor) else None
        real = None if real is None or bool(real.all()) else real
        self.dropped = (layer.router_path, layer.dropped) if layer.dropped else None
        self.halves = runs_halves(self.policy)
        self.watch = AttentionWatch(real) if self.policy.WATCHES_ATTENTION else None
        self.kept: list[Tensor] | None = [] if count else None
        self.chosen: list[Tensor] = []
        self.calls: Tensor | None = None
        self._kinds: TokenKinds | None = WalkedKinds(kinds) if isinstance(kinds, Tensor) else kinds
        self._real = real
        self._seen = 0  # tokens of the forwards before
        self._seed = pruning.seed
        self._tensors = tensors
        self._bound: _Bound | None = None

    def __call__(
        self, module: Experts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(index, weights) with skipped slots at the index that is skipped and weight 0; shapes as given.

        With `halves` the index may name first blocks alone, see models/half_experts.py.
        """
        weights, index = top_k_weights, top_k_index
        if weights.ndim != 2:
            weights = weights.reshape(-1, weights.shape[-1])
            index = index.reshape(weights.shape)
        for expert in self.layer.dropped:  # chosen with no weight, where the groups of a router leave too few others
            index = index.masked_fill(index == expert, module.num_experts)
        routed = Routed(hidden, index, weights, self._received(len(weights)))
        bound = self._bound_to(module, hidden.device)
        parts = None
        if len(bound.rules) > 1 and self._kinds is not None:
            parts = self._kinds.parts(len(weights), hidden.device)
        kept_index, kept_weights = self._decided(routed, bound, parts)
        if self.kept is not None:
            self._count(self.kept, top_k_index.reshape(kept_index.shape), kept_index, module.num_experts)
        return kept_index, kept_weights

    def _decided(self, routed: Routed, bound: _Bound, parts: Parts | None) -> tuple[Tensor, Tensor]:
        """(index, weights) of what stays, by the threshold of each token's kind."""
        if parts is None or len(parts) == 1:
            kind = _ANY if parts is None else next(iter(parts))
            cut, rule = bound.rules.get(kind, bound.rules[_ANY])
            found = None if rule is None else rule(routed)
            return found or kept_slots(self.policy, routed, bound.values, cut)
        index, weights = torch.empty_like(routed.index), torch.empty_like(routed.weights)
        for kind, places in parts.items():
            index[places], weights[places] = self._decided(routed.at(places), bound, {kind: places})
        return index, weights

    def _count(self, kept: list[Tensor], before: Tensor, index: Tensor, experts: int) -> None:
        """Notes what was chosen of the slots [tokens, k] and what is computed of those that are left."""
        if self._real is not None:
            real = self._real[self._seen : self._seen + len(index)].to(index.device)
            self._seen += len(index)
            before, index = before[real], index[real]
        self.chosen.append((before < experts).sum(-1).to("cpu", torch.int16))
        mask = index < experts
        calls = torch.bincount(index[mask], minlength=experts).cpu()
        if self.halves:
            half = index > experts
            kept.append((mask.sum(-1) + 0.5 * half.sum(-1)).cpu())
            calls = calls + 0.5 * torch.bincount(index[half] - experts - 1, minlength=experts).cpu()
        else:
            kept.append(mask.sum(-1).to("cpu", torch.int16))
        self.calls = calls if self.calls is None else self.calls + calls

    def _received(self, tokens: int) -> Tensor | float | None:
        """The attention that this forward's tokens received; None where the layer has none that could be watched."""
        if self.watch is None or self.layer.prior is None:
            return None
        return self.watch.estimate(tokens, self.layer.prior)

    def _bound_to(self, module: Experts, device: torch.device) -> _Bound:
        """Made once, and anew where the learned tensors have moved or are others by now."""
        bound = self._bound
        if bound is None or bound.device != device or not bound.fits(module):
            bound = self._bound = self._new_bound(module, device)
        return bound

    def _new_bound(self, module: Experts, device: torch.device) -> _Bound:
        held = []
        if self._tensors is None:
            held = [(TENSOR_PREFIX + name, getattr(module, TENSOR_PREFIX + name)) for name in self.layer.tensors]
            tensors = {name: tensor for name, (_, tensor) in zip(self.layer.tensors, held, strict=True)}
        else:
            tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        values = LayerValues(self.layer.layer, self._seed, self.layer.numbers, tensors)
        rules = {}
        for kind, threshold in self.thresholds.items():
            cut = Cut(threshold, module.num_experts, self.layer.renormalise)
            rules[kind] = cut, compiled_rule(self.policy, values, cut)
        return _Bound(device, held, values, rules)


def pruners(
    pruning: Pruning,
    point: OperatingPoint,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    count: bool = False,
    kinds: Tensor | GivenKinds | None = None,
) -> dict[str, LayerPruner]:
    """Experts path -> pruner of its layer; the arguments are those of LayerPruner.

    tensors  learned ones by full name; None: the modules hold them
    """
    return {
        layer.path: LayerPruner(
            pruning,
            layer,
            threshold,
            by_kind={kind: values[number] for kind, values in point.by_kind.items()},
            tensors=None if tensors is None else of_layer(tensors, layer),
            count=count,
            kinds=kinds,
        )
        for number, (layer, threshold) in enumerate(zip(pruning.layers, point.thresholds, strict=True))
    }


def of_layer(tensors: Mapping[str, Tensor], layer: PrunedLayer) -> dict[str, Tensor]:
    """One layer's learned tensors by the policy's own names."""
    return {name: tensors[f"{layer.path}.{TENSOR_PREFIX}{name}"] for name in layer.tensors}


@contextmanager
def pruned(model: nn.Module, path: str, pruner: Any) -> Iterator[None]:
    """Inside, the experts at `path` are called through `pruner`."""
    module = model.get_submodule(path)
    handles = _put_on(model, path, pruner)
    try:
        yield
    finally:
        _take_off(module, handles)


def apply_pruning(
    model: nn.Module,
    pruning: Pruning,
    *,
    rate: float | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Puts the policy on a whole model, in the place of one that is on it.

    rate      share of expert calls to skip; None for the chosen point, 0 for none: the policy is taken off
    tensors   learned ones by full name, where the experts modules do not hold them
    Raises InputError for a rate that the policy was not fitted for, ArtifactError where policy and model do not fit.
    """
    remove_pruning(model)
    if rate == 0:
        return
    pruning = pruning_for(model, pruning)
    check_policy(model, pruning)
    kinds = GivenKinds(pruning.kind_tokens) if pruning.kind_tokens else None
    for path, pruner in pruners(pruning, pruning.at_rate(rate), tensors, kinds=kinds).items():
        setattr(model.get_submodule(path), _HANDLES, _put_on(model, path, pruner))
    if kinds is not None:
        first = pruning.layers[0].path
        getattr(model.get_submodule(first), _HANDLES).extend(kinds.watch(model, first))


def remove_pruning(model: nn.Module) -> None:
    """Takes any policy off: every token computes all experts that its router chose."""
    for module in model.modules():
        if hasattr(module, _HANDLES):
            _take_off(module, getattr(module, _HANDLES))
            delattr(module, _HANDLES)


def pruning_for(model: Any, pruning: Pruning) -> Pruning:
    """The policy by the module paths of `model`, which may be a base model, without the head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == "." or hasattr(model, prefix[:-1]):
        return pruning
    layers = (
        replace(layer, path=layer.path.removeprefix(prefix), router_path=layer.router_path.removeprefix(prefix))
        for layer in pruning.layers
    )
    return replace(pruning, layers=tuple(layers))


def check_policy(model: Any, pruning: Pruning) -> None:
    """Raises ArtifactError, naming all, where a policy is unknown or says of a layer what the model has otherwise.

    Compiled rules read learned tensors by the layer's top-k and the size of its hidden states.
    """
    known = policies()
    if pruning.policy not in known:
        raise ArtifactError(
            f"The skipping policy {shown(pruning.policy)} is unknown; this version of mc-cli has {', '.join(known)}. "
            "The model is of a newer version, its policy is of a package that is not installed here, or it is damaged."
        )
    modules = dict(model.named_modules())
    problems = []
    unknown = {*pruning.kind_tokens, *pruning.points[0].by_kind} - {*MEASURED}
    if unknown:
        problems.append(f"kinds of token: {shown(sorted(unknown))}, known are {', '.join(MEASURED)}")
    for layer in pruning.layers:
        module: Any = modules.get(layer.path)
        if module is None or not is_standard_experts(module):
            problems.append(f"{layer.path}: there are no experts in {type(model).__name__}")
            continue
        top_k = top_k_of(model, layer.path)
        shapes = learned_shapes(known[pruning.policy], hidden_size_of(module), layer.top_k)
        stated = {name: tuple(shape) for name, shape in layer.tensors.items()}
        if top_k not in (None, layer.top_k):
            problems.append(f"{layer.path}: {layer.top_k} experts per token, the model has {top_k}")
        if stated != shapes:
            problems.append(f"{layer.path}: learned {shown(stated)}, the policy {pruning.policy} has {shapes}")
        if runs_halves(known[pruning.policy]) and not has_halves(module):
            problems.append(f"{layer.path}: its experts are not stored in two halves, which {pruning.policy} runs")
        if layer.dropped and layer.router_path != router_path_of(model, layer.path):
            problems.append(f"{layer.path}: its router is not {shown(layer.router_path)}")
        wrong = [expert for expert in layer.dropped if not 0 <= expert < module.num_experts]
        if wrong or module.num_experts - len(layer.dropped) < layer.top_k:
            problems.append(f"{layer.path}: drops {shown(list(layer.dropped))} of {module.num_experts} experts")
    if problems:
        raise ArtifactError(
            f"The skipping policy does not fit {type(model).__name__}, {len(problems)} differences:\n"
            f"{listed(problems)}\nPolicy and model do not belong together, or are damaged; run prune-eval on it."
        )


def add_learned_tensors(model: nn.Module, pruning: Pruning) -> list[str]:
    """Registers empty float32 parameters for what a policy learned, so that loading a checkpoint fills them.

    They stay in float32 whatever the model is cast to. Returns their full names. Raises ArtifactError where policy and
    model do not fit.
    """
    check_policy(model, pruning)
    for name, shape in pruning.tensor_names().items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        device = next(module.parameters()).device
        empty = torch.empty(shape, dtype=torch.float32, device=device)
        module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        module._mc_stored = module._mc_stored | {leaf}  # packed experts keep the dtype of what is stored
    return list(pruning.tensor_names())


def decoder_layer_of(model: nn.Module, path: str) -> nn.Module:
    """The decoder layer that holds the experts at `path`: the child of the innermost list on the way."""
    names = path.split(".")
    found = [
        ".".join(names[: depth + 1])
        for depth in range(1, len(names))
        if isinstance(model.get_submodule(".".join(names[:depth])), nn.ModuleList)
    ]
    return model.get_submodule(found[-1] if found else path)


def _put_on(model: nn.Module, path: str, pruner: Any) -> list[Any]:
    module: Any = model.get_submodule(path)
    setattr(module, PRUNER, pruner)
    watch, dropped = getattr(pruner, "watch", None), getattr(pruner, "dropped", None)
    handles = [] if watch is None else watch_attention(decoder_layer_of(model, path), watch)
    if dropped:
        router_path, names = dropped
        handles += mask_router(model.get_submodule(router_path), module.num_experts, names)
    return handles


def _take_off(module: nn.Module, handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    if hasattr(module, PRUNER):
        delattr(module, PRUNER)
