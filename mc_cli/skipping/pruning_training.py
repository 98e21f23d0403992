"""Training the routers of otp: first each layer against what a skipped call costs there, then all against the model.

1. Layer by layer, with one layer in memory: a router minimises the summed cost of what it skips (nats, see
   `pruning_samples`) plus a price per kept call. The price is the same in all layers: the slope of cost over calls at
   the target rate.
2. Whole model, where it fits into memory: the next-token distribution of the model that skips is distilled from that
   of the model without a policy, at one target rate after the other. Each rate has its price, the slope of cost over
   calls there, and an offset of all log-odds, which goes up while fewer than the target are kept, and down while more
   are: so one run serves several operating points. Only the routers change; weights are those of the packed model,
   dequantized.

Masks are drawn by Gumbel-Softmax with a falling temperature. Every step's batch and noise follow from the seed and the
step's number alone, so a run that was killed continues to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.pruning import TENSOR_PREFIX, PrunedLayer
from mc_cli.artifacts.states import read_state, write_state
from mc_cli.data.batches import Batch
from mc_cli.models.skeleton import compute_dtype
from mc_cli.policies import Routed, otp
from mc_cli.progress import Progress
from mc_cli.skipping.pruning import pruned
from mc_cli.skipping.pruning_samples import LayerSample

WARM_TEMPERATURE, COLD_TEMPERATURE = 1.0, 0.3
_LAYER_STEPS, _LAYER_TOKENS = 300, 4096
_OFFSET_RATE = 8.0  # change of a rate's offset per step, log-odds for a kept share that is off by one
_SAVE_EVERY = 20  # steps
_BETAS, _EPSILON = (0.9, 0.99), 1e-8

Routers = dict[str, Tensor]  # full tensor name -> float32 tensor


@dataclass(frozen=True)
class TrainingSettings:
    """steps of the whole-model part, windows per step, learning rate at the start."""

    steps: int
    batch: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Target:
    """One rate to train at.

    rate    share of calls to skip;  price  nats per token for keeping all calls
    offset  what is added to the log-odds of one more expert, to start with
    """

    rate: float
    price: float
    offset: float


class Adam:
    """Adam on a dictionary of tensors, its whole state in plain tensors. Source: Kingma, Ba 2015, arXiv:1412.6980."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.step_count = 0
        self.mean = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.square = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}

    @torch.no_grad()
    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rate: float) -> None:
        """Moves the parameters in place."""
        self.step_count += 1
        first, second = (1 - beta**self.step_count for beta in _BETAS)
        for name, gradient in gradients.items():
            self.mean[name].lerp_(gradient, 1 - _BETAS[0])
            self.square[name].lerp_(gradient.square(), 1 - _BETAS[1])
            parameters[name] -= rate * (self.mean[name] / first) / ((self.square[name] / second).sqrt() + _EPSILON)


def temperature_at(step: int, steps: int) -> float:
    """Falls geometrically from warm to cold."""
    return WARM_TEMPERATURE * (COLD_TEMPERATURE / WARM_TEMPERATURE) ** (step / max(1, steps - 1))


def learning_rate_at(step: int, steps: int, start: float) -> float:
    """Falls from `start` to zero along half a cosine."""
    return start * 0.5 * (1 + math.cos(math.pi * step / steps))


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel draws on the CPU."""
    uniform = torch.rand(tuple(shape), generator=generator).clamp(min=1e-7, max=1 - 1e-7)
    return -(-uniform.log()).log()


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A generator that depends on the seed and on where in the training it is used, and on nothing before."""
    mixed = seed
    for number in place:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


# 1. Layer by layer


def train_layer(
    sample: LayerSample, threshold: float, price: float, *, learning_rate: float, seed: int
) -> dict[str, Tensor]:
    """The router of one layer: least cost of skipped calls plus `price` for each kept one.

    threshold   of odp at the target rate, where the router starts;  price  in the unit of the sample's costs
    """
    inputs = otp.features(sample.routed)
    router = otp.starting_router(sample.routed.hidden.shape[-1], sample.top_k, threshold)
    optimiser = Adam(router)
    # The unit is the price, so that the learning rate means the same in every layer.
    costs = sample.costs / max(price, torch.finfo(torch.float32).tiny)
    for step in range(_LAYER_STEPS):
        generator = generator_for(seed, sample.block.layer, step)
        rows = torch.randint(len(inputs), (min(_LAYER_TOKENS, len(inputs)),), generator=generator)
        noise = gumbel((len(rows), sample.top_k), generator)
        for tensor in router.values():
            tensor.requires_grad_(True)
        logits = otp.count_logits(inputs[rows], router[otp.WEIGHT], router[otp.BIAS])
        counts = otp.drawn_counts(logits, noise, temperature_at(step, _LAYER_STEPS))
        loss = (counts * costs[rows]).sum(-1).mean() + sample.top_k * otp.kept_share(counts)
        gradients = dict(zip(router, torch.autograd.grad(loss, list(router.values())), strict=True))
        router = {name: tensor.detach() for name, tensor in router.items()}
        optimiser.step(router, gradients, learning_rate_at(step, _LAYER_STEPS, learning_rate))
    return router


# 2. Whole model


class _TrainingPruner:
    """Mixes the routing weights of one layer by a relaxed draw; all chosen experts are computed."""

    def __init__(
        self,
        router: Mapping[str, Tensor],
        *,
        renormalise: bool,
        temperature: float,
        offset: float = 0.0,
        dropped: tuple[str, Sequence[int]] | None = None,
    ) -> None:
        self.dropped = dropped
        self.router = router
        self.renormalise = renormalise
        self.temperature = temperature
        self.offset = offset
        self.real: Tensor | None = None  # [tokens] bool, what is no padding; None: all
        self.noise: Tensor | None = None
        self.generator: torch.Generator | None = None
        self.kept: Tensor | None = None

    def __call__(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        flat = weights.reshape(-1, weights.shape[-1])
        if self.generator is not None:
            self.noise = gumbel(flat.shape, self.generator).to(flat.device)
        assert self.noise is not None
        routed = Routed(hidden, index.reshape(flat.shape), flat)
        bias = self.router[otp.BIAS] + self.offset
        logits = otp.count_logits(otp.features(routed), self.router[otp.WEIGHT], bias)
        counts = otp.drawn_counts(logits, self.noise, self.temperature)
        called = (routed.index < module.num_experts).any(-1)
        self.kept = otp.kept_share(counts[called if self.real is None else called & self.real])
        return routed.index, otp.mixed_weights(flat, counts, renormalise=self.renormalise)


def distillation_loss(
    model: Any, batch: Batch, teacher: Tensor, pruners: Mapping[str, _TrainingPruner]
) -> tuple[Tensor, Tensor]:
    """(KL(teacher || model that skips) in nats per token, mean kept share over the layers), both with gradients.

    With answers the divergence is that of their tokens alone.
    teacher  [sequences, length, vocabulary] log-probabilities of the model without a policy
    """
    with ExitStack() as stack:
        for path, pruner in pruners.items():
            stack.enter_context(pruned(model, path, pruner))
        logits = model(**batch, use_cache=False).logits
    student = logits.to(teacher.dtype).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    divergence = divergence.mean() if batch.predicting is None else divergence[batch.predicting].mean()
    shares = [pruner.kept for pruner in pruners.values() if pruner.kept is not None]
    return divergence, torch.stack(shares).mean()


@dataclass
class _State:
    """Everything that the next step depends on."""

    routers: Routers
    optimiser: Adam
    offsets: Tensor  # [targets] float64
    step: int = 0

    def save(self, path: Path) -> None:
        scalars = {"step": torch.tensor(self.step), "offsets": self.offsets}
        named = (("router", self.routers), ("mean", self.optimiser.mean), ("square", self.optimiser.square))
        tensors = {f"{kind} {name}": tensor for kind, group in named for name, tensor in group.items()}
        write_state(path, {**tensors, **scalars})

    def restore(self, path: Path) -> None:
        found = read_state(path, path.parent)
        self.step, self.offsets = int(found["step"]), found["offsets"]
        self.optimiser.step_count = self.step
        device = next(iter(self.routers.values())).device
        for kind, group in (("router", self.routers), ("mean", self.optimiser.mean), ("square", self.optimiser.square)):
            group.update({name: found[f"{kind} {name}"].to(device) for name in group})


def distil_routers(
    model: Any,
    inputs: Batch,
    routers: Routers,
    layers: Sequence[PrunedLayer],
    *,
    targets: Sequence[Target],
    settings: TrainingSettings,
    checkpoint: Path,
    progress: Progress,
) -> Routers:
    """Routers after distillation from the model without a policy; continues at `checkpoint` where there is one.

    model        whole and dense (see `dense_tensors.load_dense`), not changed
    routers      what to start from;  layers  those that have one
    targets      rates to train at, in turn
    """
    offsets = torch.tensor([target.offset for target in targets], dtype=torch.float64)
    state = _State({name: tensor.clone() for name, tensor in routers.items()}, Adam(routers), offsets)
    if checkpoint.exists():
        state.restore(checkpoint)
    title = "prune-eval: train the routers of otp"
    with progress.step(title, total=settings.steps, unit="step", done=state.step) as step:
        while state.step < settings.steps:
            divergence, kept = _train_step(model, inputs, layers, state, targets, settings)
            state.step += 1
            if state.step % _SAVE_EVERY == 0 or state.step == settings.steps:
                state.save(checkpoint)
            step.advance(note=f"KL {divergence:.4f}, kept {100 * kept:.1f} %")
    return state.routers


def _train_step(
    model: Any,
    inputs: Batch,
    layers: Sequence[PrunedLayer],
    state: _State,
    targets: Sequence[Target],
    settings: TrainingSettings,
) -> tuple[float, float]:
    """One step on one target, in place. Returns (KL in nats per token, kept share)."""
    number = state.step % len(targets)
    target = targets[number]
    rows = _batch_rows(inputs.rows, state.step, settings)
    batch = inputs.select(rows).to(model.device, compute_dtype(model))
    with torch.no_grad():
        teacher = model(**batch, use_cache=False).logits.float().log_softmax(-1)
    names = list(state.routers)
    for name in names:
        state.routers[name].requires_grad_(True)
    generator = generator_for(settings.seed, -1, state.step)
    pruners = {}
    for layer in layers:
        pruners[layer.path] = _TrainingPruner(
            {kind: state.routers[f"{layer.path}.{TENSOR_PREFIX}{kind}"] for kind in (otp.WEIGHT, otp.BIAS)},
            renormalise=layer.renormalise,
            temperature=temperature_at(state.step, settings.steps),
            offset=float(state.offsets[number]),
            dropped=(layer.router_path, layer.dropped) if layer.dropped else None,
        )
        pruners[layer.path].generator = generator
        pruners[layer.path].real = None if batch.real is None else batch.real.to(model.device)
    divergence, kept = distillation_loss(model, batch, teacher, pruners)
    gradients = torch.autograd.grad(divergence + target.price * kept, [state.routers[name] for name in names])
    state.routers = {name: state.routers[name].detach() for name in names}
    rate = learning_rate_at(state.step, settings.steps, settings.learning_rate)
    state.optimiser.step(state.routers, dict(zip(names, gradients, strict=True)), rate)
    state.offsets[number] += _OFFSET_RATE * ((1 - target.rate) - float(kept.detach()))
    return float(divergence.detach()), float(kept.detach())


def _batch_rows(count: int, step: int, settings: TrainingSettings) -> Tensor:
    """Rows of the windows of one step: all windows in a new order, again and again."""
    size = min(settings.batch, count)
    per_round = count // size
    order = torch.randperm(count, generator=generator_for(settings.seed, -2, step // per_round))
    begin = (step % per_round) * size
    return order[begin : begin + size]
