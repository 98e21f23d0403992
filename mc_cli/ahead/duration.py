"""How long each stage takes on a machine that was measured: operations by kind, each at its measured rate.

Large products are counted as such, and bytes that functions of single numbers (norms, rotations, activations) read and
write: in models of few hidden features they take as long. `_OVERHEAD` stands for all
that is small beside both (routing, softmax).
"""

from __future__ import annotations

import math

from mc_cli.ahead.machine import Machine
from mc_cli.ahead.workload import Workload
from mc_cli.coding.interpolation import mean_widths
from mc_cli.parts import Role

_OVERHEAD = 1.25  # of products: shapes that are not square, attention, what lies between
_EVALUATED = 2  # models that prune-eval runs
_STARTING_S = 4.0  # of each stage: importing libraries, reading headers
# Numbers read or written per token: times the hidden features of every layer, for norms, rotations and sums; times the
# channels of the experts that are called, for activation, product and weighting.
_BESIDE_PRODUCTS, _OF_CHANNELS = 24, 8
_BACKWARD = 4.0  # times as many for every gradient that goes back; narrow products are slower there, too


def durations(work: Workload, machine: Machine, *, evaluated_tokens: int) -> dict[str, float]:
    """Seconds of each stage; allocate and export, which compute little, as what they read and write takes."""
    forward = _forward(work, machine)
    stored = work.inventory.file_bytes
    read = _STARTING_S + stored / machine.disk_bytes
    return {
        "calibrate": read + forward + _backward(work, machine),
        "score": read + forward + _moments(work, machine) + _forecasts(work, machine) + _roles(work, machine, forward),
        "allocate": _STARTING_S,
        "quantize": read + (3 if work.corrects else 1) * forward + _moments(work, machine) + _coding(work, machine),
        "prune-eval": read + _EVALUATED * (forward * evaluated_tokens / max(1, work.tokens) + _head(work, machine)),
        "export": 2 * _STARTING_S + 3 * work.packed_bytes / machine.disk_bytes,
    }


def _forward(work: Workload, machine: Machine) -> float:
    """All calibration tokens through all layers once; attention twice where experts are read one by one."""
    weights = work.called_weights + (2 if work.is_apart else 1) * work.other_weights
    products = 2.0 * work.tokens * weights * _OVERHEAD / machine.product_flops
    return products + work.tokens * _moved(work) / machine.moved_bytes


def _moved(work: Workload) -> float:
    """Bytes that a token moves in one forward beside products."""
    channels = sum(block.top_k * block.projections[-1].in_features for block in work.inventory.expert_blocks)
    return work.itemsize * float(_BESIDE_PRODUCTS * work.hidden * work.inventory.num_layers + _OF_CHANNELS * channels)


def _head(work: Workload, machine: Machine) -> float:
    return 2.0 * work.tokens * work.vocabulary * work.hidden / machine.product_flops


def _backward(work: Workload, machine: Machine) -> float:
    """Forward once more, then for each sample back through what is not a weight, and the gradients' covariance.

    All but routed experts is gone through once more for the costs of routers' choices, forward and back; where experts
    are read one by one, forward twice more, and the experts once.
    """
    if not work.backward_tokens:
        return 0.0
    again = int(work.is_apart)
    called = work.called_weights * (1 + again + work.samples)
    others = work.other_weights * 2 * (1 + again + work.samples)
    flops = 2.0 * work.backward_tokens * (called + others)
    flops += 2.0 * len(work.inventory.expert_blocks) * work.samples * work.backward_tokens * work.hidden**2
    head = 2.0 * work.backward_tokens * work.vocabulary * work.hidden * (1 + work.samples)
    moved = work.backward_tokens * _moved(work) * (1 + _BACKWARD * work.samples)
    return (flops + head) * _OVERHEAD / machine.product_flops + moved / machine.moved_bytes


def _moments(work: Workload, machine: Machine) -> float:
    """Hessians of both projections on each expert's tokens, activations for the second, and their factors."""
    seconds = 0.0
    for block in work.inventory.expert_blocks:
        slots = work.tokens * block.top_k
        squares = sum(part.in_features**2 for part in block.projections)
        flops = 2.0 * slots * (squares + block.projections[0].weight_count)
        seconds += flops / machine.product_flops
        cubes = sum(float(part.in_features) ** 3 for part in block.projections)
        seconds += block.num_experts * cubes / machine.factor_flops
    return seconds * _OVERHEAD


def _feedback(work: Workload, machine: Machine) -> float:
    """Products that feed errors back, of which the probe has those of its own small matrices alone."""
    flops = 0.0
    for block in work.inventory.expert_blocks:
        for part in block.projections:
            flops += float(block.num_experts) * part.weight_count * part.in_features
    return flops / machine.product_flops


def _forecasts(work: Workload, machine: Machine) -> float:
    """Every expert at its widths: drawing errors, feeding them back, and measuring outputs on some tokens."""
    coded, blocks = [width for width in work.widths if width > 0], work.inventory.expert_blocks
    each = [len(coded) if work.all_widths else mean_widths(coded, block.num_experts) for block in blocks]
    widths = sum(each) / max(1, len(each))
    weights = work.inventory.expert_weight_count
    measured = 2.0 * 3 * work.loss_tokens * weights / machine.product_flops
    return widths * (weights * machine.forecast_s(work.quantizer) + _feedback(work, machine) + measured)


def _roles(work: Workload, machine: Machine, forward: float) -> float:
    """Errors of the parts beside the experts, drawn as those of experts are, and some tokens through the model again
    for each role.
    """
    weights = sum(math.prod(part.shape) for part in work.inventory.tensors if part.role in work.roles and part.packable)
    again = len(work.roles) * work.trial_tokens / max(1, work.tokens)
    return weights * machine.forecast_s(work.quantizer) + again * forward


def _coding(work: Workload, machine: Machine) -> float:
    """Every weight through the search once, errors fed back; the corrections of down projections."""
    parts = (part for part in work.inventory.tensors if part.packable and part.role is not Role.HEAD)
    packed = sum(math.prod(part.shape) for part in parts)
    coded = work.inventory.expert_weight_count + packed
    seconds = coded * machine.coding_s(work.quantizer) + _feedback(work, machine)
    if work.corrects:
        for block in work.inventory.expert_blocks:
            channels, hidden = block.projections[-1].in_features, block.projections[-1].out_features
            seconds += block.num_experts * channels**2 * (channels + 2.0 * hidden) / machine.factor_flops
    return seconds
