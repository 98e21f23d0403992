"""Quantizing what is no expert: linears that share an input share one Hessian; the embedding is rounded by itself.

Towers and projectors are packed before the layers, on images that pass them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from mc_cli.artifacts.quantization import MatrixReport
from mc_cli.coding.layer_result import LayerResult, PackedTensors, Widths, measured, planned_encoding
from mc_cli.encodings import Encoding, has_grids
from mc_cli.numerics.hessian import accumulate
from mc_cli.parts import BESIDE_TEXT, KEPT_BITS, Role, TensorPart
from mc_cli.quantizers import Quantizer
from mc_cli.quantizers.job import CodingJob, Executor, InputMoments
from mc_cli.quantizers.rtn import RoundToNearest
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.routing import require_every_token

# Weights of a head or embedding that are rounded at a time: 128 MiB in float32, and some times that meanwhile.
_PIECE_WEIGHTS = 2**25


_MOMENT_BYTES = 2**29  # second moments of towers' inputs that are taken in one pass


class _InputSeen(Exception):
    """Ends a forward once the wanted inputs have been captured."""


class LinearCoder:
    """Packs the linears of one resident layer after another, and what lies outside of the layers."""

    def __init__(
        self, walk: LayerWalk, plan: Widths, quantizer: Quantizer, executor: Executor, *, forecast: bool = False
    ) -> None:
        """`forecast`: weights get errors as large as coding makes them (`CodingJob.forecast`); nothing is packed."""
        self._forecast = forecast
        self._walk = walk
        self._model = walk.source.model
        self._device = walk.source.device
        self._plan = plan
        self._quantizer = quantizer
        self._executor = executor

    def layer(self, tensors: Sequence[TensorPart], result: LayerResult) -> None:
        """Packs the planned linears of the resident layer in calling order, each on inputs that are quantized already.

        A linear that is never called is kept, and reported so.
        """
        wanted = {path: part for part in tensors if (path := self._packable(part)) is not None}
        for group in self._input_groups(list(wanted)):
            hessian, tokens = self._input_hessian(group[0])
            self.sharing_input([(path, wanted[path]) for path in group], hessian, tokens, result)
        for path in sorted(wanted.keys() - result.linears.keys()):
            result.report_kept(wanted[path], "its module is never called, so it has no calibration inputs")

    def sharing_input(
        self, linears: Sequence[tuple[str, TensorPart]], hessian: torch.Tensor, tokens: int, result: LayerResult
    ) -> None:
        """Packs modules that share an input, whose second moments are `hessian`; their weights are replaced."""
        moments = InputMoments(hessian[None])
        for path, part in linears:
            encoding = planned_encoding(self._plan, self._plan.role_bits[part.role], *part.shape)
            self._pack(path, part, self._quantizer, moments, encoding, tokens, result)

    def towers(self, tensors: Sequence[TensorPart], result: LayerResult) -> None:
        """Packs the planned linears of towers and projectors, in the order of their names.

        They run before the decoder's layers, all of them for every image. So second moments of many are taken in one
        pass over the images, as many as fit `_MOMENT_BYTES`; the next ones are taken on what is quantized by then.
        """
        wanted = {path: part for part in tensors if part.role in BESIDE_TEXT and (path := self._packable(part))}
        for paths in _fitting(wanted):
            found = self._passing_moments({path: wanted[path].shape[1] for path in paths})
            for path in paths:
                hessian, tokens = found[path]
                if tokens:
                    self.sharing_input([(path, wanted[path])], hessian, tokens, result)
                else:
                    result.report_kept(wanted[path], "its module is never called, so it has no calibration inputs")

    def _passing_moments(self, features: Mapping[str, int]) -> dict[str, tuple[torch.Tensor, int]]:
        """Path -> (Hessian [in, in] float32, tokens) of modules that run before the layers; features: of each, `in`."""
        found = {path: (torch.zeros((size, size), device=self._device), 0) for path, size in features.items()}

        def hook(path: str) -> Any:
            def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                hessian, tokens = found[path]
                flat = args[0].detach().reshape(-1, args[0].shape[-1])
                accumulate(hessian, flat)
                found[path] = (hessian, tokens + len(flat))

            return add

        with ExitStack() as stack:
            for path in features:
                module = self._model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(hook(path)).remove)
            self._walk.embed_again()
        return found

    def embedding(self, tensors: Sequence[TensorPart], result: LayerResult) -> None:
        """Rounds the token embedding among `tensors` to its plan's width, if it has one; its weight is replaced.

        Its inputs are single rows, all of whose weights count alike: there is no Hessian to feed errors back by, and a
        tied head's would help neither at 6 bits nor at 8. Only encodings that are no grids go to the quantizer.
        """
        bits = self._plan.role_bits.get(Role.EMBEDDING, KEPT_BITS)
        for part in tensors:
            path, _, leaf = part.name.rpartition(".")
            if part.role is not Role.EMBEDDING or leaf != "weight" or bits == KEPT_BITS:
                continue
            if not part.packable:
                result.report_kept(part, "its family's own code reads its weight")
                continue
            encoding = planned_encoding(self._plan, bits, *part.shape, role=part.role)
            alike = InputMoments(torch.eye(part.shape[1], device=self._device)[None])
            nearest = RoundToNearest(clip_search=True) if has_grids(encoding) else self._quantizer
            self._pack(path, part, nearest, alike, encoding, None, result)

    def head(self, tensors: Sequence[TensorPart], result: LayerResult) -> None:
        """Packs the head among `tensors`, if the plan says so, on what the walk's last layer gives; it is replaced."""
        heads = [(path, part) for part in tensors if part.role is Role.HEAD and (path := self._packable(part))]
        if not heads:
            return
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        hessian = torch.zeros((head.weight.shape[-1],) * 2, device=self._device)
        moments, here = TokenMoments(self._walk, "the head", hessian), slice(0)

        def capture(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            moments.add(here, args[0])

        handle = head.register_forward_pre_hook(capture)
        for rows in self._walk.batches():
            here = rows
            self._walk.logits(rows)
        handle.remove()
        self.sharing_input(heads, hessian, self._walk.inputs.real_tokens, result)

    def _pack(
        self,
        path: str,
        part: TensorPart,
        quantizer: Quantizer,
        moments: InputMoments,
        encoding: Encoding,
        tokens: int | None,
        result: LayerResult,
    ) -> None:
        """Packs one module's weight, where rows stand apart some at a time: a head may have 10^9 weights."""
        module: Any = self._model.get_submodule(path)
        weight: torch.Tensor = module.weight.data
        row = MatrixReport(path, part.role.value, "quantized", weight.numel(), encoding.bits, encoding.key, tokens)
        size = max(1, _PIECE_WEIGHTS // weight.shape[1]) if encoding.rows_apart else len(weight)
        pieces_of_rows = weight.split(size)
        jobs = (
            CodingJob((path,), rows.float()[None], moments, encoding, quantizer, forecast=self._forecast)
            for rows in pieces_of_rows
        )
        if self._forecast:
            for rows, told in zip(pieces_of_rows, self._executor.map(jobs), strict=True):
                rows.copy_(told.decoded[0])
            result.linears[path] = (encoding.key, {})
            return
        pieces: list[PackedTensors] = []
        loss = energy = 0.0
        notes: dict[str, None] = {}
        for rows, coded in zip(pieces_of_rows, self._executor.map(jobs), strict=True):
            rows.copy_(coded.decoded[0])
            pieces.append({name: tensor[0] for name, tensor in coded.tensors.items()})
            loss += coded.proxy_loss[0]
            energy += coded.weight_energy[0]
            notes |= dict.fromkeys(coded.notes_of(0))
            del coded  # before the next piece is coded
        result.report.append(measured(row, loss, energy, tuple(notes)))
        result.linears[path] = (
            encoding.key,
            {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]},
        )

    def _packable(self, part: TensorPart) -> str | None:
        """The module path of a matrix that the plan packs, None for what is kept."""
        bits = self._plan.role_bits.get(part.role, KEPT_BITS)
        return part.name.rpartition(".")[0] if part.packable and bits != KEPT_BITS else None

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
                    raise _InputSeen  # modules behind it, the experts in most families, tell nothing more

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
        in_features = int(module.weight.shape[-1])
        hessian = torch.zeros((in_features, in_features), device=self._device)
        count = 0
        moments = TokenMoments(self._walk, path, hessian)

        def add(rows: slice, inputs: torch.Tensor) -> None:
            nonlocal count
            count += moments.add(rows, inputs)

        run_up_to(self._walk, module, add)
        return hessian, count


class TokenMoments:
    """Second moments of a module's inputs, every token by its kind's weight where the walk's inputs have kinds."""

    def __init__(self, walk: LayerWalk, path: str, hessian: torch.Tensor) -> None:
        """`hessian`: [in, in] float32, which is added to;  `path`: the module's, for messages."""
        self._batch, self._weights = walk.inputs, walk.inputs.weights()
        self._path, self._hessian = path, hessian

    def add(self, rows: slice, inputs: torch.Tensor) -> int:
        """Adds inputs [..., in] of the batch `rows`; returns the number of tokens, without padding."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        if self._weights is None:
            accumulate(self._hessian, flat)
            return len(flat)
        weights = self._weights[rows].reshape(-1)
        require_every_token(self._path, len(weights), len(flat))
        accumulate(self._hessian, flat * weights.sqrt().to(flat)[:, None])
        real = self._batch.real_of(rows)
        return len(flat) if real is None else int(real.sum())


def run_up_to(
    walk: LayerWalk, module: nn.Module, on_input: Callable[[slice, torch.Tensor], None] | None = None
) -> None:
    """Runs all batches through the resident layer, each up to the point where it calls `module`."""
    here = slice(0)

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if on_input is not None:
            on_input(here, args[0])
        raise _InputSeen

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(stop).remove)

        def run(rows: slice) -> None:
            nonlocal here
            here = rows
            with torch.no_grad(), suppress(_InputSeen):
                walk.call_layer(walk.hidden[rows].to(walk.source.device), rows)
            walk.store.release(walk.hidden[rows])

        walk.each_batch(run)


def _fitting(parts: Mapping[str, TensorPart]) -> Iterator[list[str]]:
    """The paths in order, those together whose second moments fit `_MOMENT_BYTES`; always one at least."""
    paths: list[str] = []
    room = _MOMENT_BYTES
    for path, part in parts.items():
        size = 4 * part.shape[1] ** 2
        if paths and size > room:
            yield paths
            paths, room = [], _MOMENT_BYTES
        paths.append(path)
        room -= size
    if paths:
        yield paths
