"""Quantizing one resident decoder layer in place, in the order that lets every matrix see already quantized inputs.

Linears come first, in the order the layer calls them; those that share an input share one Hessian. Then two waves of
coding jobs: the experts' up projections, and once all of them are decoded, the down projections on the activations that
the quantized up projections give. The module's weights are replaced by what the stored codes stand for, so the layer's
output is the packed layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.packed import KEPT, ExpertLayout
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.quantization import MatrixReport
from mc_cli.coding.channel_order import deal_channels
from mc_cli.coding.correction import Shortfall, add_experts, reach_of, rest_of_layer
from mc_cli.coding.expert_inputs import ExpertInputs, expert_chunks
from mc_cli.coding.expert_view import ExpertView
from mc_cli.coding.layer_result import LayerResult, measured, planned_encoding
from mc_cli.coding.linears import LinearCoder, run_up_to
from mc_cli.encodings import deals_channels, family_of
from mc_cli.models import experts
from mc_cli.models.memory import release_freed_memory
from mc_cli.numerics.hessian import trace_error
from mc_cli.parts import KEPT_BITS, ExpertBlock, Projection, Role, TensorPart
from mc_cli.quantizers import Quantizer
from mc_cli.quantizers.job import Coded, CodingJob, Executor, InputMoments
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.routing import watching

_ORDER_NOTE = "its activation mixes channels, so they stay in the checkpoint's order"


class LayerQuantizer:
    """Quantizes layer after layer of a walk by one plan."""

    def __init__(
        self,
        walk: LayerWalk,
        plan: Plan,
        quantizer: Quantizer,
        executor: Executor,
        *,
        shrinkage: float,
        sensitivities: Mapping[int, LayerSensitivity] | None = None,
        covariance_of: Callable[[int], torch.Tensor | None] = lambda layer: None,
    ) -> None:
        """`covariance_of`: layer -> gradient covariance at its MoE output, or None; read when the layer is reached."""
        self._walk = walk
        self._plan = plan
        self._quantizer = quantizer
        self._executor = executor
        self._shrinkage = shrinkage
        self._sensitivities = sensitivities or {}
        self._covariance_of = covariance_of
        self.linears = LinearCoder(walk, plan, quantizer, executor)

    def quantize(
        self, tensors: Sequence[TensorPart], block: ExpertBlock | None, original: torch.Tensor | None = None
    ) -> LayerResult:
        """Quantizes the resident layer `walk.depth`, whose parameters are `tensors` and whose experts are `block`.

        original  [sequences, length, hidden], the layer's output in the model that is not quantized, which down
                  projections aim at; None: each matrix at its own
        """
        result = LayerResult()
        self.linears.layer(tensors, result)
        if block is not None:
            self._quantize_experts(block, original, result)
        return result

    def _quantize_experts(self, block: ExpertBlock, original: torch.Tensor | None, result: LayerResult) -> None:
        model = self._walk.source.model
        module = model.get_submodule(block.path)
        reach = None if original is None else reach_of(self._walk, module)
        with watching(model, block, keep_inputs=True) as capture:
            if original is None or reach is None:
                run_up_to(self._walk, module)
            else:
                rest = rest_of_layer(self._walk, module)
        sensitivity = self._sensitivities.get(block.layer)
        inputs = ExpertInputs(capture, block, self._walk.source.device, sensitivity=sensitivity)
        covariance = None if sensitivity is None else self._covariance_of(block.layer)
        view = ExpertView(module, inputs, self._quantizer, self._shrinkage, covariance)
        notes = self._deal_channels(view)
        keys = {view.up.name: _Wave(view, view.up, self._plan, None, notes).run(self._executor, result)}
        if original is None or reach is None:
            shortfall = None
        else:
            shortfall = Shortfall(module, inputs, original=original, rest=rest, reach=reach)
        keys[view.down.name] = _Wave(view, view.down, self._plan, shortfall, notes).run(self._executor, result)
        if reach is not None:
            result.output = add_experts(rest, module, inputs, reach=reach)
        result.layout = ExpertLayout(
            path=block.path,
            num_experts=block.num_experts,
            projections={part.name: (part.out_features, part.in_features) for part in block.projections},
            encodings=keys,
        )

    def _deal_channels(self, view: ExpertView) -> tuple[str, ...]:
        """Orders the channels of the experts whose encodings all ask for it; a note where that cannot be."""
        block = view.inputs.block

        def coded(expert: int, part: Projection) -> bool:
            bits = self._plan.bits_of(block.layer, expert, part.name)
            if bits in (0, KEPT_BITS):
                return False
            return deals_channels(family_of(planned_encoding(self._plan, bits, part.out_features, part.in_features)))

        whole = [e for e in range(block.num_experts) if all(coded(e, part) for part in block.projections)]
        return () if not whole or deal_channels(view.module, view.inputs, whole) else (_ORDER_NOTE,)


class _Wave:
    """One projection of all experts of a layer: none of its jobs depends on what another one gives."""

    def __init__(
        self, view: ExpertView, part: Projection, plan: Plan, shortfall: Shortfall | None, notes: tuple[str, ...]
    ) -> None:
        """`shortfall`: what down projections are corrected by;  notes: for the report row of every matrix."""
        self._view = view
        self._part = part
        self._plan = plan
        self._shortfall = shortfall
        self._notes = notes
        self._moved: dict[int, float] = {}  # expert -> size of its correction, relative to its weights

    def run(self, executor: Executor, result: LayerResult) -> tuple[str | None, ...]:
        """Packs the projection of every expert by its width; returns the encoding key per expert."""
        block, name = self._view.inputs.block, self._part.name
        result.experts[name] = {}
        by_bits: dict[float, list[int]] = {}
        for expert in range(block.num_experts):
            by_bits.setdefault(self._plan.bits_of(block.layer, expert, name), []).append(expert)
        dropped, kept = by_bits.pop(0, []), by_bits.pop(KEPT_BITS, [])
        for expert in dropped:
            self._leave(expert, 0, result)
        for coded in executor.map(self._jobs(by_bits)):
            self._take(coded, result)
            del coded  # before the next job is drawn: it may be as large
        for expert in kept:
            self._leave(expert, KEPT_BITS, result)
        packed = result.experts[name]
        return tuple(packed[expert][0] if expert in packed else None for expert in range(block.num_experts))

    def _jobs(self, by_bits: Mapping[float, list[int]]) -> Iterator[CodingJob]:
        for bits, members in sorted(by_bits.items()):
            for chunk in _pieces(members, self._view.inputs.block):
                release_freed_memory()
                yield self._job(bits, chunk)

    def _job(self, bits: float, members: list[int]) -> CodingJob:
        view, part = self._view, self._part
        weights = view.weights(part, members)
        if part is view.up:
            moments = view.up_moments(members)
        else:
            watch = None if self._shortfall is None else self._shortfall.watch
            moments = view.down_moments(members, watch=watch)
            self._correct(weights, members, moments)
        encoding = planned_encoding(self._plan, bits, *weights.shape[1:])
        return view.job(part, members, moments, encoding, weights=weights)

    def _correct(self, weights: torch.Tensor, members: list[int], moments: InputMoments) -> None:
        """Moves down projections, in place, towards what makes good for errors made before them."""
        if self._shortfall is None or moments.hessian is None:
            return
        pooled = [self._view.pooled_share(self._part, expert) for expert in members]
        steps = torch.stack(list(map(self._shortfall.step, members, moments.hessian, pooled)))
        size = trace_error(steps, moments.hessian) / trace_error(weights, moments.hessian).clamp_min(1e-300)
        self._moved |= dict(zip(members, size.tolist(), strict=True))
        weights += steps

    def _take(self, coded: Coded, result: LayerResult) -> None:
        """Puts what a job became into the module, the result and the report."""
        view, name = self._view, self._part.name
        for slot, unit in enumerate(coded.units):
            assert not isinstance(unit, str)
            expert = unit.expert
            experts.expert_weight(view.module, name, expert).copy_(coded.decoded[slot])
            tensors = {stored: tensor[slot].clone() for stored, tensor in coded.tensors.items()}
            result.experts[name][expert] = (coded.encoding.key, tensors)
            row = MatrixReport(
                f"{view.inputs.block.path}.{expert}.{name}",
                Role.EXPERT.value,
                "quantized",
                coded.decoded[slot].numel(),
                self._plan.bits_of(unit.layer, expert, name),
                coded.encoding.key,
                view.inputs.count(expert),
                pooled_share=view.pooled_share(self._part, expert),
                correction=self._moved.get(expert),
            )
            row = measured(row, coded.proxy_loss[slot], coded.weight_energy[slot], coded.notes_of(slot))
            result.report.append(replace(row, notes=row.notes + self._notes))

    def _leave(self, expert: int, bits: float, result: LayerResult) -> None:
        """Keeps (16) or drops (0) the projection of one expert; the routers that the walk runs do not choose those."""
        view, name = self._view, self._part.name
        weight = experts.expert_weight(view.module, name, expert)
        outcome = "kept" if bits == KEPT_BITS else "pruned"
        row = MatrixReport(
            f"{view.inputs.block.path}.{expert}.{name}", Role.EXPERT.value, outcome, weight.numel(), bits
        )
        result.report.append(row)
        if bits == KEPT_BITS:
            result.experts[name][expert] = (KEPT, {"weight": weight.clone()})
            return
        weight.zero_()
        bias = experts.expert_bias(view.module, name, expert)
        if bias is not None:
            bias.zero_()  # biases are stored for all experts; what no router chooses should say nothing


def _pieces(members: list[int], block: ExpertBlock) -> Iterable[list[int]]:
    """`members` in runs as long as expert_chunks allows for this block."""
    size = len(next(expert_chunks(block)))
    for begin in range(0, len(members), size):
        yield members[begin : begin + size]
