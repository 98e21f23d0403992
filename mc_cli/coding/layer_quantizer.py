"""Quantizing one resident decoder layer in place, in the order that lets every matrix see already quantized inputs.

Linears come first, in the order the layer calls them; those that share an input share one Hessian. Then the experts'
up projections, then their down projections on the activations that the quantized up projections give. The module's
weights are replaced by what the stored codes stand for, so the layer's output is the packed layer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.packed import KEPT, ExpertLayout
from mc_cli.artifacts.plan import KEPT_BITS, Plan
from mc_cli.artifacts.quantization import MatrixReport
from mc_cli.coding.channel_order import deal_channels
from mc_cli.coding.correction import Shortfall, add_experts, reach_of, rest_of_layer
from mc_cli.coding.expert_inputs import ExpertInputs, down_hessians, expert_chunks, pooled_share, up_hessians
from mc_cli.coding.row_importance import down_importance, down_row_hessian, up_importance, up_row_hessian
from mc_cli.encodings import Encoding, encoding_for
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.models import experts
from mc_cli.models.memory import release_freed_memory
from mc_cli.numerics.hessian import accumulate, trace_error
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.parts import ExpertBlock, Projection, Role, TensorPart, family_of_role
from mc_cli.quantizers import Prepared, Quantizer
from mc_cli.quantizers.rtn import RoundToNearest
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.routing import watching

_ORDER_NOTE = "its activation mixes channels, so they stay in the checkpoint's order"
_PIECE_WEIGHTS = 2**25  # of a head or embedding at a time, in float32: 128 MiB, and some times that while it is rounded
PackedTensors = dict[str, torch.Tensor]  # stored part -> tensor of one matrix


@dataclass
class LayerResult:
    """What one layer became."""

    linears: dict[str, tuple[str, PackedTensors]] = field(default_factory=dict)  # module path -> encoding key, tensors
    experts: dict[str, dict[int, tuple[str, PackedTensors]]] = field(
        default_factory=dict
    )  # projection -> expert -> same
    layout: ExpertLayout | None = None
    output: torch.Tensor | None = None  # of the layer as it is now, [sequences, length, hidden], where it is known
    report: list[MatrixReport] = field(default_factory=list)


class _InputSeen(Exception):
    """Ends a forward once the wanted inputs have been captured."""


class LayerQuantizer:
    """Quantizes layer after layer of a walk by one plan."""

    def __init__(
        self,
        walk: LayerWalk,
        plan: Plan,
        quantizer: Quantizer,
        *,
        shrinkage: float,
        sensitivities: Mapping[int, LayerSensitivity] | None = None,
        covariance_of: Callable[[int], torch.Tensor | None] = lambda layer: None,
    ) -> None:
        """`covariance_of`: layer -> gradient covariance at its MoE output, or None; read when the layer is reached."""
        self._walk = walk
        self._model = walk.source.model
        self._device = walk.source.device
        self._plan = plan
        self._quantizer = quantizer
        self._shrinkage = shrinkage
        self._sensitivities = sensitivities or {}
        self._covariance_of = covariance_of
        # Of the layer that is being quantized:
        self._covariance: torch.Tensor | None = None
        self._order_note: tuple[str, ...] = ()

    def quantize(
        self, tensors: Sequence[TensorPart], block: ExpertBlock | None, original: torch.Tensor | None = None
    ) -> LayerResult:
        """Quantizes the resident layer `walk.depth`, whose parameters are `tensors` and whose experts are `block`.

        original  [sequences, length, hidden], the layer's output in the model that is not quantized, which down
                  projections aim at; None: each matrix at its own
        """
        result = LayerResult()
        wanted = {path: part for part in tensors if (path := self._packable(part)) is not None}
        for group in self._input_groups(list(wanted)):
            hessian, tokens = self._input_hessian(group[0])
            self.quantize_linears([(path, wanted[path]) for path in group], hessian, tokens, result)
        for path in sorted(wanted.keys() - result.linears.keys()):
            self._report_kept(path, wanted[path], "its module is never called, so it has no calibration inputs", result)
        if block is not None:
            self._quantize_experts(block, original, result)
        return result

    def _report_kept(self, path: str, part: TensorPart, reason: str, result: LayerResult) -> None:
        note = f"{reason}; kept as in the checkpoint"
        count = math.prod(part.shape)
        result.report.append(MatrixReport(path, part.role.value, "kept", count, KEPT_BITS, notes=(note,)))

    def quantize_linears(
        self, linears: Sequence[tuple[str, TensorPart]], hessian: torch.Tensor, tokens: int, result: LayerResult
    ) -> None:
        """Quantizes modules that share an input, whose second moments are `hessian`; their weights are replaced."""
        prepared: dict[str, Prepared] = {}
        for path, part in linears:
            encoding = self._encoding_of(self._plan.role_bits[part.role], *part.shape)
            if encoding.basis not in prepared:
                prepared[encoding.basis] = self._quantizer.prepare(hessian[None], basis=encoding.basis)
            self._pack_matrix(path, part, self._quantizer, prepared[encoding.basis], encoding, tokens, result)

    def quantize_embedding(self, tensors: Sequence[TensorPart]) -> LayerResult:
        """Rounds the token embedding among `tensors` to its plan's width, if it has one; its weight is replaced.

        Its inputs are single rows, all of whose weights count alike: there is no Hessian to feed errors back by, and a
        tied head's would help neither at 6 bits nor at 8.
        """
        result = LayerResult()
        bits = self._plan.role_bits.get(Role.EMBEDDING, KEPT_BITS)
        for part in tensors:
            path, _, leaf = part.name.rpartition(".")
            if part.role is not Role.EMBEDDING or leaf != "weight" or bits == KEPT_BITS:
                continue
            if not part.packable:
                self._report_kept(path, part, "its family's own code reads its weight", result)
                continue
            quantizer = RoundToNearest(clip_search=True)
            encoding = self._encoding_of(bits, *part.shape, role=part.role)
            alike = torch.eye(part.shape[1], device=self._device)[None]
            prepared = quantizer.prepare(alike, basis=encoding.basis)
            self._pack_matrix(path, part, quantizer, prepared, encoding, None, result)
        return result

    def _pack_matrix(
        self,
        path: str,
        part: TensorPart,
        quantizer: Quantizer,
        prepared: Prepared,
        encoding: Encoding,
        tokens: int | None,
        result: LayerResult,
    ) -> None:
        """Packs one module's weight, where rows stand apart some at a time: a head may have 10^9 weights."""
        module: Any = self._model.get_submodule(path)
        weight: torch.Tensor = module.weight.data
        row = MatrixReport(path, part.role.value, "quantized", weight.numel(), encoding.bits, encoding.key, tokens)
        pieces: list[PackedTensors] = []
        loss = scale = 0.0
        notes: dict[str, None] = {}
        for rows in weight.split(max(1, _PIECE_WEIGHTS // weight.shape[1]) if encoding.rows_apart else len(weight)):
            exact = rows.float()[None]
            quantized = quantizer.quantize(exact, prepared, encoding)
            # before the rows are replaced: in float32 `exact` is a view of them
            scale += 0.0 if prepared.hessian is None else float(trace_error(exact, prepared.hessian))
            rows.copy_(encoding.dequantize(quantized.tensors, exact.shape[-1])[0])
            pieces.append({name: tensor[0] for name, tensor in quantized.tensors.items()})
            loss += float(quantized.proxy_loss[0])
            notes |= dict.fromkeys(quantized.notes)
        result.report.append(_measured(row, loss, scale, notes, 0))
        result.linears[path] = (
            encoding.key,
            {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]},
        )

    def _packable(self, part: TensorPart) -> str | None:
        """The module path of a matrix that the plan packs, None for what is kept."""
        bits = self._plan.role_bits.get(part.role, KEPT_BITS)
        return part.name.rpartition(".")[0] if part.packable and bits != KEPT_BITS else None

    def _encoding_of(self, bits: float, out_features: int, in_features: int, *, role: Role = Role.EXPERT) -> Encoding:
        family, limit = family_of_role(role, self._plan.family), self._plan.group_size_limit
        return encoding_for(family, bits, out_features, in_features, group_size_limit=limit)

    # Linears

    def _input_groups(self, paths: list[str]) -> list[list[str]]:
        """The modules in the order they are first called, those called with one and the same input together."""
        if not paths:
            return []
        seen: list[tuple[torch.Tensor, str]] = []  # the tensors are kept, so that no address is used twice
        awaited = set(paths)

        def hook(path: str) -> Any:
            def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                seen.append((args[0], path))
                awaited.discard(path)
                if not awaited:
                    raise _InputSeen  # what follows, the experts in most families, tells nothing more

            return see

        with ExitStack() as stack:
            for path in paths:
                module = self._model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(hook(path)).remove)
            rows = next(self._walk.batches())
            with torch.no_grad(), suppress(_InputSeen):
                self._walk.call_layer(self._walk.hidden[rows].to(self._device), rows)
        groups: dict[tuple[int, int], list[str]] = {}
        for tensor, path in seen:
            key = (tensor.data_ptr(), tensor.shape[-1])
            if not any(path in group for group in groups.values()):
                groups.setdefault(key, []).append(path)
        return list(groups.values())

    def _input_hessian(self, path: str) -> tuple[torch.Tensor, int]:
        """(Hessian [in, in] float32, tokens) of one module's inputs; the forward stops where they are seen."""
        module: Any = self._model.get_submodule(path)
        width = int(module.weight.shape[-1])
        hessian = torch.zeros((width, width), device=self._device)
        count = 0

        def add(inputs: torch.Tensor) -> None:
            nonlocal count
            rows = inputs.detach().reshape(-1, width)
            accumulate(hessian, rows)
            count += len(rows)

        self._run_up_to(module, add)
        return hessian, count

    def _run_up_to(self, module: nn.Module, on_input: Callable[[torch.Tensor], None] | None = None) -> None:
        """Runs all batches through the resident layer, each up to the point where it calls `module`."""

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if on_input is not None:
                on_input(args[0])
            raise _InputSeen

        with ExitStack() as stack:
            stack.callback(module.register_forward_pre_hook(stop).remove)
            for rows in self._walk.batches():
                with torch.no_grad(), suppress(_InputSeen):
                    self._walk.call_layer(self._walk.hidden[rows].to(self._device), rows)

    # Experts

    def _quantize_experts(self, block: ExpertBlock, original: torch.Tensor | None, result: LayerResult) -> None:
        module = self._model.get_submodule(block.path)
        reach = None if original is None else reach_of(self._walk, module)
        with watching(self._model, block, keep_inputs=True) as capture:
            if original is None or reach is None:
                self._run_up_to(module)
            else:
                rest = rest_of_layer(self._walk, module)
        inputs = ExpertInputs(capture, block, self._device, sensitivity=self._sensitivities.get(block.layer))
        self._covariance = None if inputs.sensitivity is None else self._covariance_of(block.layer)
        up, down = block.projections
        self._deal_channels(module, inputs)

        def for_up(members: list[int]) -> torch.Tensor:
            return up_hessians(inputs, members, strength=self._shrinkage)

        def for_down(members: list[int]) -> torch.Tensor:
            weights = experts.stacked_weights(module, up.name, members)
            watch = None if shortfall is None else shortfall.watch
            return down_hessians(module, inputs, members, weights, strength=self._shrinkage, watch=watch)

        keys = {up.name: self._quantize_projection(module, inputs, up.name, for_up, None, result)}
        if original is None or reach is None:
            shortfall = None
        else:
            shortfall = Shortfall(module, inputs, original=original, rest=rest, reach=reach)
        keys[down.name] = self._quantize_projection(module, inputs, down.name, for_down, shortfall, result)
        if reach is not None:
            result.output = add_experts(rest, module, inputs, reach=reach)
        result.layout = ExpertLayout(
            path=block.path,
            num_experts=block.num_experts,
            projections={part.name: (part.out_features, part.in_features) for part in block.projections},
            encodings=keys,
        )

    def _deal_channels(self, module: nn.Module, inputs: ExpertInputs) -> None:
        """Orders the channels of the experts that are coded on a trellis as a whole; others stay as they are stored."""
        block = inputs.block

        def coded(expert: int, part: Projection) -> bool:
            bits = self._plan.bits_of(block.layer, expert, part.name)
            encoding = None if bits in (0, KEPT_BITS) else self._encoding_of(bits, part.out_features, part.in_features)
            return isinstance(encoding, TrellisEncoding)

        whole = [e for e in range(block.num_experts) if all(coded(e, part) for part in block.projections)]
        self._order_note = () if not whole or deal_channels(module, inputs, whole) else (_ORDER_NOTE,)

    def _quantize_projection(
        self,
        module: nn.Module,
        inputs: ExpertInputs,
        projection: str,
        hessians_of: Callable[[list[int]], torch.Tensor],
        shortfall: Shortfall | None,
        result: LayerResult,
    ) -> tuple[str | None, ...]:
        """Packs one projection of every expert by its width; returns the encoding key per expert."""
        block = inputs.block
        keys: list[str | None] = [None] * block.num_experts
        packed = result.experts.setdefault(projection, {})
        by_bits: dict[float, list[int]] = {}
        for expert in range(block.num_experts):
            by_bits.setdefault(self._plan.bits_of(block.layer, expert, projection), []).append(expert)
        for bits, members in sorted(by_bits.items()):
            if bits in (0, KEPT_BITS):
                for expert in members:
                    keys[expert] = self._leave(module, block, projection, expert, bits, packed, result)
                continue
            for chunk in _pieces(members, block):
                release_freed_memory()
                self._pack_chunk(module, inputs, projection, bits, chunk, hessians_of(chunk), shortfall, result)
                for expert in chunk:
                    keys[expert] = packed[expert][0]
        return tuple(keys)

    def _leave(
        self,
        module: nn.Module,
        block: ExpertBlock,
        projection: str,
        expert: int,
        bits: float,
        packed: dict[int, tuple[str, PackedTensors]],
        result: LayerResult,
    ) -> str | None:
        """Keeps (16) or drops (0) one projection of one expert; the routers that the walk runs do not choose those."""
        view = experts.expert_weight(module, projection, expert)
        outcome = "kept" if bits == KEPT_BITS else "pruned"
        name = f"{block.path}.{expert}.{projection}"
        result.report.append(MatrixReport(name, Role.EXPERT.value, outcome, view.numel(), bits))
        if bits == KEPT_BITS:
            packed[expert] = (KEPT, {"weight": view.clone()})
            return KEPT
        view.zero_()
        bias = experts.expert_bias(module, projection, expert)
        if bias is not None:
            bias.zero_()  # biases are stored for all experts; what no router chooses should say nothing
        return None

    def _pack_chunk(
        self,
        module: nn.Module,
        inputs: ExpertInputs,
        projection: str,
        bits: float,
        members: list[int],
        hessians: torch.Tensor,
        shortfall: Shortfall | None,
        result: LayerResult,
    ) -> None:
        weights = experts.stacked_weights(module, projection, members)
        in_features = weights.shape[-1]
        pooled = [pooled_share(inputs.count(expert), in_features, strength=self._shrinkage) for expert in members]
        moved: list[float | None] = [None] * len(members)
        if shortfall is not None:
            steps = torch.stack(list(map(shortfall.step, members, hessians, pooled)))
            moved = (trace_error(steps, hessians) / trace_error(weights, hessians).clamp_min(1e-300)).tolist()
            weights += steps
        encoding = self._encoding_of(bits, *weights.shape[1:])
        prepared = self._quantizer.prepare(hessians, basis=encoding.basis)
        importance = self._row_importance(module, inputs, projection, members, encoding)
        quantized = self._quantizer.quantize(weights, prepared, encoding, row_importance=importance)
        replaced = encoding.dequantize(quantized.tensors, in_features)
        for slot, expert in enumerate(members):
            experts.expert_weight(module, projection, expert).copy_(replaced[slot])
            tensors = {name: tensor[slot].clone() for name, tensor in quantized.tensors.items()}
            result.experts[projection][expert] = (encoding.key, tensors)
            row = MatrixReport(
                f"{inputs.block.path}.{expert}.{projection}",
                Role.EXPERT.value,
                "quantized",
                weights[slot].numel(),
                bits,
                encoding.key,
                inputs.count(expert),
                pooled_share=pooled[slot],
                correction=moved[slot],
            )
            loss = float(quantized.proxy_loss[slot])
            scale = float(trace_error(weights[slot : slot + 1], hessians[slot : slot + 1]))
            row = _measured(row, loss, scale, quantized.notes, slot)
            result.report.append(replace(row, notes=row.notes + self._order_note))

    def _row_importance(
        self, module: nn.Module, inputs: ExpertInputs, projection: str, members: list[int], encoding: Encoding
    ) -> torch.Tensor | RowHessian | None:
        """What errors of the rows matter: together, each row by itself where that is all that can be used, or None.

        None where no backward pass was run.
        """
        up, down = inputs.block.projections
        if inputs.sensitivity is None:
            return None
        covariance, part = self._covariance, down if projection == down.name else up
        groups = None if covariance is None else self._quantizer.row_groups(encoding, part.out_features)
        together = None if covariance is None or groups is None else (covariance, groups.to(self._device))
        if part is down:
            return (
                down_importance(inputs, members) if together is None else down_row_hessian(inputs, members, *together)
            )
        up_weights, down_weights = (experts.stacked_weights(module, each.name, members) for each in (up, down))
        if together is None:
            return up_importance(module, inputs, members, up_weights, down_weights)
        return up_row_hessian(module, inputs, members, up_weights, down_weights, *together)


def _measured(row: MatrixReport, loss: float, scale: float, notes: Iterable[str], slot: int) -> MatrixReport:
    """The row with its losses, and the notes that speak of its batch item."""
    prefix = f"item {slot}: "
    mine = tuple(note.removeprefix(prefix) for note in notes if note.startswith(prefix))
    return replace(row, proxy_loss=loss, relative_error=loss / scale if scale > 0 else 0.0, notes=mine)


def _pieces(members: list[int], block: ExpertBlock) -> Iterable[list[int]]:
    """`members` in runs as long as expert_chunks allows for this block."""
    size = len(next(expert_chunks(block)))
    for begin in range(0, len(members), size):
        yield members[begin : begin + size]
