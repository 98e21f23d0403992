"""Quantizing one resident decoder layer in place, in the order that lets every matrix see already quantized inputs.

Linears come first, in the order the layer calls them; those that share an input share one Hessian. Then two waves of
coding jobs: the experts' up projections, and once all of them are decoded, the down projections on the activations that
the quantized up projections give. The module's weights are replaced by what the stored codes stand for, so the layer's
output is the packed layer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.packed import KEPT, ExpertLayout, StoredBlock
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.quantization import MatrixReport
from mc_cli.artifacts.streamed import Pieces
from mc_cli.coding.channel_blocks import Division, Span
from mc_cli.coding.channel_order import deal_channels
from mc_cli.coding.correction import Shortfall, add_experts, reach_of, rest_of_layer
from mc_cli.coding.expert_inputs import ExpertInputs, expert_chunks
from mc_cli.coding.expert_view import ExpertView
from mc_cli.coding.layer_result import LayerResult, measured, planned_encoding
from mc_cli.coding.linears import LinearCoder, run_up_to
from mc_cli.coding.merging import fits_merged, merge_experts
from mc_cli.encodings import deals_channels, family_of
from mc_cli.models import experts
from mc_cli.models.memory import release_freed_memory
from mc_cli.numerics.hessian import trace_error
from mc_cli.parts import DROPPED, KEPT_BITS, ExpertBlock, Projection, Role, TensorPart
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
        routing_counts: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Makes the worker.

        covariance_of   layer -> gradient covariance at its MoE output, or None; read when the layer is reached
        routing_counts  layer -> calibration tokens of every expert, of layers whose experts are merged
        """
        self._walk = walk
        self._plan = plan
        self._quantizer = quantizer
        self._executor = executor
        self._shrinkage = shrinkage
        self._sensitivities = sensitivities or {}
        self._covariance_of = covariance_of
        self._routing_counts = routing_counts or {}
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
            stored = next(part.dtype for part in tensors if part.role is Role.EXPERT)
            self._quantize_experts(block, original, result, getattr(torch, stored))
        return result

    def _quantize_experts(
        self, block: ExpertBlock, original: torch.Tensor | None, result: LayerResult, stored: torch.dtype
    ) -> None:
        """`stored`: the dtype that the checkpoint has experts in."""
        model = self._walk.source.model
        module = model.get_submodule(block.path)
        reach = None if original is None else reach_of(self._walk, module)
        store = self._walk.store
        with watching(model, block, keep_inputs=True, store=store) as capture:
            if original is None or reach is None:
                run_up_to(self._walk, module)
            else:
                rest = rest_of_layer(self._walk, experts.experts_at(model, block.path))
        sensitivity = self._sensitivities.get(block.layer)
        walk = self._walk
        inputs = ExpertInputs(
            capture,
            block,
            walk.source.device,
            sensitivity=sensitivity,
            module=module,
            store=store,
            batch=walk.inputs,
        )
        covariance = None if sensitivity is None else self._covariance_of(block.layer)
        counts = self._routing_counts.get(block.layer, ())
        merged = merge_experts(module, inputs, self._plan, counts, stored)
        division = Division(self._plan, block)
        division.cut(module, inputs)
        view = ExpertView(module, inputs, self._quantizer, self._shrinkage, covariance)
        notes = self._deal_channels(view, division)
        _Wave(view, view.up, self._plan, division, None, notes, stored).run(self._executor, result)
        if original is None or reach is None:
            shortfall = None
        else:
            shortfall = Shortfall(module, inputs, original=original, rest=rest, reach=reach)
        wave = _Wave(view, view.down, self._plan, division, shortfall, notes, stored)
        wave.run(self._executor, result, refitted=merged if fits_merged(self._plan) else frozenset())
        if reach is not None:
            result.output = add_experts(rest, module, inputs, reach=reach)
        result.layout = ExpertLayout(
            path=block.path,
            num_experts=block.num_experts,
            projections={part.name: (part.out_features, part.in_features) for part in block.projections},
            experts=tuple(
                tuple(_stored(span, expert, result) for span in division.spans[expert])
                for expert in range(block.num_experts)
            ),
            slots=self._plan.slots_of(block.layer),
        )

    def _deal_channels(self, view: ExpertView, division: Division) -> tuple[str, ...]:
        """Orders the channels of the blocks whose encodings all ask for it; a note where that cannot be."""
        block = view.inputs.block

        def coded(span: Span, part: Projection) -> bool:
            bits = span.bits.bits_of(part.name)
            if bits == KEPT_BITS:
                return False
            shape = block.shape_of(part.name, span.bits.channels)
            return deals_channels(family_of(planned_encoding(self._plan, bits, *shape)))

        runs = {
            expert: [range(span.begin, span.end) for span in spans if all(coded(span, p) for p in block.projections)]
            for expert, spans in division.spans.items()
        }
        runs = {expert: found for expert, found in runs.items() if found}
        return () if not runs or deal_channels(view.module, view.inputs, runs) else (_ORDER_NOTE,)


def _stored(span: Span, expert: int, result: LayerResult) -> StoredBlock:
    keys = {name: packed[expert, span.number][0] for name, packed in result.experts.items()}
    return StoredBlock(span.bits.channels, keys)


class _Wave:
    """One projection of all experts of a layer: none of its jobs depends on what another one gives.

    Experts that are whole are coded together, as many of one width as memory allows; one that is divided by itself,
    block after block, so that its moments are summed up once.
    """

    def __init__(
        self,
        view: ExpertView,
        part: Projection,
        plan: Plan,
        division: Division,
        shortfall: Shortfall | None,
        notes: tuple[str, ...],
        stored: torch.dtype,
    ) -> None:
        """The things that the wave works with.

        shortfall  what down projections are corrected by;  notes: for the report row of every matrix
        stored     dtype of weights in the checkpoint
        """
        self._view = view
        self._part = part
        self._plan = plan
        self._division = division
        self._shortfall = shortfall
        self._notes = notes
        self._stored = stored
        self._moved: dict[int, float] = {}  # expert -> size of its correction, relative to its weights

    def run(self, executor: Executor, result: LayerResult, *, refitted: frozenset[int] = frozenset()) -> None:
        """Packs the projection of every block by its width; those of `refitted` experts are corrected if kept."""
        name = self._part.name
        result.experts[name] = {}
        by_bits: dict[float, list[int]] = {}
        for expert, spans in self._division.spans.items():
            if expert not in self._division.divided:
                by_bits.setdefault(spans[0].bits.bits_of(name) if spans else DROPPED, []).append(expert)
        dropped, kept = by_bits.pop(DROPPED, []), by_bits.pop(KEPT_BITS, [])
        for expert in dropped:
            self._leave_out(expert, result)
        for coded in executor.map(self._jobs(by_bits)):
            self._take(coded, result)
            del coded  # before the next job is drawn: it may be as large
        for expert in self._division.divided:
            for span in self._division.spans[expert]:
                if span.bits.bits_of(name) == KEPT_BITS:
                    self._keep(expert, span, result)
            self._report_cut(expert, result)
        for expert in kept:
            span = self._division.spans[expert][0]
            if expert in refitted and self._shortfall is not None:
                self._put(expert, span, self._prepared([expert])[0][0].to(self._stored))
            self._keep(expert, span, result)

    def _jobs(self, by_bits: Mapping[float, list[int]]) -> Iterator[CodingJob]:
        for bits, members in sorted(by_bits.items()):
            for chunk in _pieces(members, self._view.inputs.block):
                release_freed_memory()
                weights, moments = self._prepared(chunk)
                encoding = planned_encoding(self._plan, bits, *weights.shape[1:])
                yield self._view.job(self._part, chunk, moments, encoding, weights=weights)
        for expert in self._division.divided:
            release_freed_memory()
            yield from self._jobs_of_blocks(expert)

    def _jobs_of_blocks(self, expert: int) -> Iterator[CodingJob]:
        """A job for each block of one expert that is coded. Errors of one block are not fed into another.

        Blocks that are kept are corrected as coded ones are: they make good for channels that are cut, too.
        """
        view, part = self._view, self._part
        every = self._division.spans[expert]
        spans = [span for span in every if span.bits.bits_of(part.name) != KEPT_BITS]
        corrected = every if self._shortfall is not None else spans
        if not corrected:
            return
        left = self._division.kept(expert)
        weights, moments = self._prepared([expert], channels=left)
        for span in corrected:
            if span not in spans:
                self._put(expert, span, weights[0, :, span.begin : span.end].to(self._stored))
        for span in spans:
            shape = view.inputs.block.shape_of(part.name, span.bits.channels)
            encoding = planned_encoding(self._plan, span.bits.bits_of(part.name), *shape)
            if part is view.up:
                rows = self._division.rows_of(span)
                yield view.job(
                    part, [expert], moments, encoding, weights=weights[:, rows], rows=rows, block=span.number
                )
            else:
                columns = slice(span.begin, span.end)
                hessian = None if moments.hessian is None else moments.hessian[:, columns, columns].contiguous()
                block = weights[:, :, columns].contiguous()
                yield view.job(part, [expert], InputMoments(hessian), encoding, weights=block, block=span.number)

    def _prepared(self, members: list[int], channels: int | None = None) -> tuple[torch.Tensor, InputMoments]:
        """(weights, moments of inputs) of this projection; of the first `channels` where experts lack others."""
        view, part = self._view, self._part
        weights = view.weights(part, members)
        if part is view.up:
            return weights, view.up_moments(members)
        watch = None if self._shortfall is None else self._shortfall.watch
        moments = view.down_moments(members, watch=watch)
        if channels is not None and channels < part.in_features:
            weights = weights[:, :, :channels].contiguous()
            if moments.hessian is not None:
                moments = InputMoments(moments.hessian[:, :channels, :channels].contiguous())
        self._correct(weights, members, moments)
        return weights, moments

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
            expert, span = unit.expert, self._division.spans[unit.expert][unit.block]
            self._put(expert, span, coded.decoded[slot])
            keep = view.inputs.store.keep
            tensors = {stored: keep(tensor[slot].clone()) for stored, tensor in coded.tensors.items()}
            result.experts[name][expert, unit.block] = (coded.encoding.key, tensors)
            row = MatrixReport(
                self._row_name(expert, span),
                Role.EXPERT.value,
                "quantized",
                coded.decoded[slot].numel(),
                span.bits.bits_of(name),
                coded.encoding.key,
                view.inputs.count(expert),
                pooled_share=view.pooled_share(self._part, expert),
                correction=self._moved.get(expert),
            )
            row = measured(row, coded.proxy_loss[slot], coded.weight_energy[slot], coded.notes_of(slot))
            result.report.append(replace(row, notes=row.notes + self._notes))

    def _put(self, expert: int, span: Span, decoded: torch.Tensor) -> None:
        """Writes the decoded weights of a block where the module has them."""
        module, name = self._view.module, self._part.name
        if expert in self._division.divided:
            weight = experts.expert_weight(module, name, expert)
            if self._part is self._view.up:
                weight[self._division.rows_of(span)] = decoded.to(weight.dtype)
            else:
                weight[:, span.begin : span.end] = decoded.to(weight.dtype)
            decoded = weight
        experts.put_expert_weight(module, name, expert, decoded)

    def _row_name(self, expert: int, span: Span) -> str:
        """The name of a report row; blocks of a divided expert have their number behind the projection."""
        name = f"{self._view.inputs.block.path}.{expert}.{self._part.name}"
        return f"{name}.{span.number}" if expert in self._division.divided else name

    def _keep(self, expert: int, span: Span, result: LayerResult) -> None:
        """Keeps a block of one expert as it is in the checkpoint: its weights are taken once they are written."""
        module, name, division = self._view.module, self._part.name, self._division
        up = self._part is self._view.up
        shape = self._view.inputs.block.shape_of(name, span.bits.channels)

        def weight() -> Iterator[torch.Tensor]:
            whole = experts.expert_weight(module, name, expert)
            if expert not in division.divided:
                yield whole
            else:
                yield whole[division.rows_of(span)] if up else whole[:, span.begin : span.end]

        moved = self._moved.get(expert)
        row_name = self._row_name(expert, span)
        row = MatrixReport(row_name, Role.EXPERT.value, "kept", math.prod(shape), KEPT_BITS, correction=moved)
        result.report.append(row)
        kept = Pieces(shape, getattr(module, name).dtype, weight)
        result.experts[name][expert, span.number] = (KEPT, {"weight": kept})

    def _report_cut(self, expert: int, result: LayerResult) -> None:
        """A row for the channels of one expert that are cut away."""
        block = self._view.inputs.block
        rows, columns = block.shape_of(self._part.name, block.channels - self._division.kept(expert))
        if rows * columns:
            name = f"{block.path}.{expert}.{self._part.name}.cut"
            result.report.append(MatrixReport(name, Role.EXPERT.value, "pruned", rows * columns, DROPPED))

    def _leave_out(self, expert: int, result: LayerResult) -> None:
        """Drops one expert, which no router slot runs: the routers that the walk runs do not choose it, or run another.

        Biases are stored for all experts; those of what is gone should say nothing.
        """
        view, name = self._view, self._part.name
        slot = self._plan.slots_of(view.inputs.block.layer)[expert]
        count = self._part.weight_count
        outcome, notes = ("pruned", ()) if slot is None else ("shared", (f"its slot runs expert {slot}",))
        row_name = f"{view.inputs.block.path}.{expert}.{name}"
        result.report.append(MatrixReport(row_name, Role.EXPERT.value, outcome, count, DROPPED, notes=notes))
        shape = (self._part.out_features, self._part.in_features)
        experts.put_expert_weight(view.module, name, expert, torch.zeros(shape, device=view.inputs.device))
        bias = experts.expert_bias(view.module, name, expert)
        if bias is not None:
            bias.zero_()


def _pieces(members: list[int], block: ExpertBlock) -> Iterable[list[int]]:
    """`members` in runs as long as expert_chunks allows for this block."""
    size = len(next(expert_chunks(block)))
    for begin in range(0, len(members), size):
        yield members[begin : begin + size]
