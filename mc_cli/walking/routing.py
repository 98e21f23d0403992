"""Watching routers: which experts the tokens of a layer go to, with which weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mc_cli.artifacts.calibration import QUANTILES, KindRouting, LayerRouting
from mc_cli.artifacts.routes import Routes
from mc_cli.artifacts.scratch import InMemory
from mc_cli.data.kinds import kind_masks
from mc_cli.errors import FamilyError
from mc_cli.models.paged_experts import turns_of
from mc_cli.parts import ExpertBlock


class RoutingCapture:
    """The inputs and the routing that a layer's experts were called with, in token order, on the CPU by batch.

    inputs     [tokens, hidden] in the model's dtype, only if `keep_inputs`
    index      [tokens, k] int64, from the number of experts on: none;  weights [tokens, k] float32
    probabilities: sums per expert, see LayerRouting
    """

    def __init__(
        self,
        block: ExpertBlock,
        *,
        keep_inputs: bool,
        experts: Any = None,
        store: InMemory | None = None,
        real: torch.Tensor | None = None,
    ) -> None:
        """The capture of one layer.

        experts  the module that is watched, if its calls may take turns
        store    holds the inputs
        real     [tokens] bool, those that are kept; None: all
        """
        self._block = block
        self._keep_inputs = keep_inputs
        self._experts = experts
        self._store = store or InMemory()
        self._real = real
        self._inputs: list[torch.Tensor] = []
        self._index: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._probabilities: list[torch.Tensor] = []

    @property
    def inputs(self) -> torch.Tensor:
        if len(self._inputs) > 1:
            count = sum(map(len, self._inputs))
            whole = self._store.empty((count, *self._inputs[0].shape[1:]), self._inputs[0].dtype)
            for rows, piece in zip(whole.split([len(piece) for piece in self._inputs]), self._inputs, strict=True):
                rows.copy_(piece)
                self._store.release(rows, piece)
            self._inputs = [whole]  # the chunks are not kept beside the whole
        return self._kept(self._inputs[0])

    @property
    def index(self) -> torch.Tensor:
        return self._kept(torch.cat(self._index))

    @property
    def weights(self) -> torch.Tensor:
        return self._kept(torch.cat(self._weights))

    @property
    def _seen_before(self) -> bool:
        """Whether the batch that runs was seen, and runs again as its experts have been computed meanwhile."""
        turns = None if self._experts is None else turns_of(self._experts)
        return turns is not None and turns.answered

    def on_experts(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of the experts module: (hidden states, index, weights)."""
        if self._seen_before:
            return
        hidden, index, weights = args[:3]
        if self._keep_inputs:
            self._inputs.append(self._store.keep(hidden.detach().reshape(-1, hidden.shape[-1])))
        self._index.append(index.detach().reshape(-1, index.shape[-1]).cpu())
        self._weights.append(weights.detach().reshape(-1, weights.shape[-1]).float().cpu())

    def on_router(self, _: nn.Module, __: Any, output: Any) -> None:
        """Forward hook of the router: softmax over all experts of its raw logits, at the chosen experts."""
        if self._seen_before:
            return
        logits = output[0] if isinstance(output, (tuple, list)) else output
        probabilities = logits.detach().reshape(-1, logits.shape[-1]).float().softmax(-1).cpu()
        self._probabilities.append(probabilities)

    def routes(self) -> Routes:
        """How many tokens each expert gets, and what the choice tells of a token, in bits.

        Zaya's routers have a choice more than there are experts, none of them; it is one of those that are told apart.
        Tokens that the router does not decide on, as ERNIE's for images, are left out.
        """
        index = self.index
        decided = (index < self._probabilities[0].shape[-1]).any(-1)
        counts = torch.bincount(index[decided].reshape(-1), minlength=self._block.num_experts)
        tokens, conditional = 0, 0.0
        total = torch.zeros(1, dtype=torch.float64)
        everything = self._real is None and bool(decided.all())
        parts = self._probabilities if everything else [self._kept(torch.cat(self._probabilities))[decided]]
        for part in parts:
            tokens += len(part)
            total = total + part.double().sum(0)
            conditional += float(torch.special.entr(part.double()).sum())
        entropy = float(torch.special.entr(total / tokens).sum())
        return Routes(counts.tolist(), (entropy - conditional / tokens) / math.log(2), entropy / math.log(2))

    def probability_sums(self) -> torch.Tensor:
        """[experts] float64: over the tokens routed to an expert, the sum of its softmax probability before top-k."""
        probabilities = self._kept(torch.cat(self._probabilities))
        chosen = probabilities.gather(1, self.index.clamp(max=probabilities.shape[-1] - 1))
        return _sums(self.index, chosen, self._block.num_experts)

    def _kept(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._real is None else rows[self._checked(self._real, len(rows))]

    def _checked(self, mask: torch.Tensor, tokens: int) -> torch.Tensor:
        require_every_token(self._block.path, len(mask), tokens)
        return mask


def require_every_token(path: str, wanted: int, found: int) -> None:
    """Raises FamilyError where a module was called with other tokens than the batch's, which kinds do not fit."""
    if wanted != found:
        raise FamilyError(
            f"{path} is called with {found} tokens of a batch of {wanted}: which of them are of images cannot be told, "
            "so this family is calibrated and measured on text alone. Give text with --data."
        )


@contextmanager
def watching(
    root: nn.Module,
    block: ExpertBlock,
    *,
    keep_inputs: bool = False,
    store: InMemory | None = None,
    real: torch.Tensor | None = None,
) -> Iterator[RoutingCapture]:
    """Captures the routing of one layer while its forward runs inside the context; `root` is the whole model.

    store   holds the inputs; None: memory
    real    [tokens] bool, the tokens that are kept in order, as where the others are padding; None: all
    """
    experts = root.get_submodule(block.path)
    capture = RoutingCapture(block, keep_inputs=keep_inputs, experts=experts, store=store, real=real)
    handles = [
        experts.register_forward_pre_hook(capture.on_experts),
        root.get_submodule(block.router_path).register_forward_hook(capture.on_router),
    ]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def routing_statistics(
    capture: RoutingCapture, block: ExpertBlock, *, residual_energy: float, kinds: torch.Tensor | None = None
) -> LayerRouting:
    """Counts, sums and quantiles of one layer's routing; `kinds`: [tokens] uint8 of the captured tokens."""
    index, weights = capture.index, capture.weights
    flat_index, flat_weights = index.reshape(-1), weights.reshape(-1).double()
    routed = (index < block.num_experts).any(-1)
    ordered = weights[routed].double().sort(dim=-1, descending=True).values
    ratios = ordered[:, 1:] / ordered[:, :1]
    return LayerRouting(
        layer=block.layer,
        top_k=int(index.shape[-1]),
        token_count=int(index.shape[0]),
        routing_count=_counts(index, block.num_experts).tolist(),
        routing_weight_sum=_sums(index, weights, block.num_experts).tolist(),
        router_probability_sum=capture.probability_sums().tolist(),
        routing_weight_quantiles=[
            _quantiles(flat_weights[flat_index == expert]) for expert in range(block.num_experts)
        ],
        weight_ratio_quantiles=[_quantiles(ratios[:, rank]) for rank in range(ratios.shape[1])],
        residual_energy=residual_energy,
        by_kind={} if kinds is None else _by_kind(index, weights, kinds, block),
    )


def _by_kind(
    index: torch.Tensor, weights: torch.Tensor, kinds: torch.Tensor, block: ExpertBlock
) -> dict[str, KindRouting]:
    found = {}
    for name, mask in kind_masks(kinds).items():
        counts = _counts(index[mask], block.num_experts)
        sums = _sums(index[mask], weights[mask], block.num_experts)
        found[name] = KindRouting(int(mask.sum()), counts.tolist(), sums.tolist())
    return found


def _counts(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[experts] int64: how many slots of `index` name each expert."""
    flat = index.reshape(-1)
    return torch.bincount(flat[flat < num_experts], minlength=num_experts)


def _sums(index: torch.Tensor, values: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[experts] float64: sums of `values` over the slots of `index`, of the same shape, that name each expert."""
    flat, added = index.reshape(-1), values.reshape(-1).double()
    named = flat < num_experts
    return torch.zeros(num_experts, dtype=torch.float64).index_add_(0, flat[named], added[named])


def _quantiles(values: torch.Tensor) -> Sequence[float]:
    """QUANTILES of a 1-D tensor by nearest rank; torch.quantile refuses more than 16 million values."""
    if not len(values):
        return []
    ordered = values.sort().values
    return [float(ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]) for fraction in QUANTILES]
