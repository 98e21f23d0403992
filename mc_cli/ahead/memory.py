"""The most memory that each stage takes, from shapes: what is held throughout, and what its largest step adds.

Each stage runs its steps one after another, so its peak is what it holds all the time plus the largest of them. The
terms are the tensors that the stage's code holds at that moment; what Python and the allocator add is `SPARE`.
`recipes/benchmarks/estimates.py` compares them with measured peaks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mc_cli.ahead.workload import Workload
from mc_cli.coding.expert_inputs import expert_chunks
from mc_cli.errors import InputError, listed
from mc_cli.models.memory import available_bytes, resident_bytes
from mc_cli.models.pieces import Pieces
from mc_cli.numerics.hessian import FLOAT64_LIMIT
from mc_cli.parts import ExpertBlock
from mc_cli.stages.calibrate import GRADIENT_BATCH_TOKENS

SPARE = 1.08  # what small tensors and holes in the heap add: 0 to 9 % of what a stage holds, on two shapes
_COMPUTING = 60 << 20  # what libraries take once they compute: buffers, threads, a model's code; 8 to 99 MiB
_FLOAT, _DOUBLE = 4, 8
_LOGIT_COPIES = 5  # of one sequence, while labels are drawn: logits, their log, probabilities, gradients of two
_COPIES_TO_FACTORIZE = 2  # the factor, and its inverse
_RING_ROWS = 512  # rows whose errors are weighed together by the trellis quantizer, at most


@dataclass(frozen=True)
class MemoryNeed:
    """The peak of one stage, in bytes, with what it is made of.

    step     which of its steps takes most
    pieces   in words -> bytes; libraries included
    """

    stage: str
    step: str
    pieces: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.pieces.values())

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "stage": self.stage,
            "step": self.step,
            "peak_bytes": self.peak_bytes,
            "pieces": dict(self.pieces),
        }


def check_memory(needs: Sequence[MemoryNeed], limit: int, work: Workload) -> None:
    """Raises InputError where a stage would go beyond the limit, naming what would keep it."""
    over = [need for need in needs if need.peak_bytes > limit]
    if over:
        raise InputError(
            f"--max-memory {limit:,} bytes is less than is needed even in pieces:\n{_lines(over)}\n"
            f"{_remedy(limit, work, needs)}"
        )


def short_of_memory(needs: Sequence[MemoryNeed], free: int, work: Workload) -> list[str]:
    """A warning where a stage would go beyond what is free now."""
    over = [need for need in needs if need.peak_bytes > free]
    if not over:
        return []
    return [
        f"{free:,} bytes of memory are free now, less than is needed:\n{_lines(over)}\n{_remedy(free, work, needs)}"
    ]


def _lines(needs: Sequence[MemoryNeed]) -> str:
    lines = []
    for need in needs:
        largest = sorted(need.pieces.items(), key=lambda entry: -entry[1])[:3]
        pieces = ", ".join(f"{name} {size:,}" for name, size in largest)
        lines.append(f"{need.stage}: about {need.peak_bytes:,} bytes, when {need.step} ({pieces})")
    return listed(lines)


def _remedy(limit: int, work: Workload, needs: Sequence[MemoryNeed]) -> str:
    """The settings that would keep all stages within the limit: the first of some that do, from the mildest on.

    needs   of the stages to do, with the settings as they are
    """
    base, stages = resident_bytes(), {need.stage for need in needs}
    least = max(need.peak_bytes for need in needs)
    for words, changed in _lighter(work):
        most = _most(changed, base, stages)
        if most <= limit:
            return f"{words} would fit."
        least = min(least, most)
    return f"No setting makes it fit: with the lightest ones about {least:,} bytes are needed."


def _most(work: Workload, base: int, stages: Collection[str]) -> int:
    return max(need.peak_bytes for need in memory_needs(work, base_bytes=base) if need.stage in stages)


def _lighter(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Settings in words, and the work with them; each on top of those before."""
    given: dict[str, int | str | None] = {}  # None: the flag is to be left out
    batch = max(work.length, 2048)
    if not work.pieces.scratch:
        limit = Pieces(available_bytes() or 0)
        given, work = {"--max-memory": limit.limit}, replace(work, pieces=limit)
        yield _words(given), work
    fewer = [work.workers >> halvings for halvings in range(1, work.workers.bit_length())]
    for flag, value, changes in (
        ("--batch-tokens", batch, {"batch_tokens": min(work.batch_tokens, batch)}),
        *(("--workers", count, {"workers": count}) for count in fewer),
        ("--workers", None, {"workers": 0}),
        ("--gradient-samples", 1, {"samples": 1}),
        ("--gradient-tokens", work.backward_tokens // 4, {"backward_tokens": work.backward_tokens // 4}),
        ("--sequences", max(1, work.tokens // 4 // work.length), {"tokens": max(work.length, work.tokens // 4)}),
        ("--gradient-tokens", 0, {"backward_tokens": 0}),
        ("--dtype", "bfloat16", {"itemsize": 2}),
    ):
        if any(getattr(work, name) > less for name, less in changes.items()):
            given[flag] = value
            work = replace(work, **changes)  # type: ignore[arg-type]
            yield _words(given), work


def _words(given: Mapping[str, int | str | None]) -> str:
    """Flags with their values, and those that are to be left out last."""
    without = [f"without {flag}" for flag, value in given.items() if value is None]
    return " ".join([*(f"{flag} {value}" for flag, value in given.items() if value is not None), *without])


_Steps = Iterator[tuple[str, dict[str, int]]]


def memory_needs(work: Workload, *, base_bytes: int) -> list[MemoryNeed]:
    """The needs of the stages that compute on a model, in the order of a run.

    base_bytes   of the process once all libraries are imported
    """
    steps = {
        "calibrate": _calibrate,
        "score": _score,
        "quantize": _quantize,
        "prune-eval": _prune_eval,
    }
    needs = [_need(stage, found(work), base_bytes) for stage, found in steps.items()]
    handed_out = {"score", "quantize"} if work.workers else set()
    return [_with_workers(need, work, base_bytes) if need.stage in handed_out else need for need in needs]


def _with_workers(need: MemoryNeed, work: Workload, base_bytes: int) -> MemoryNeed:
    """The need of all processes together: each has libraries, one job, and the moments of two."""
    members, block = _chunk(work)
    weights = max(part.weight_count for part in block.projections)
    squares = sum(part.in_features**2 for part in block.projections)
    each = base_bytes + _FLOAT * members * (6 * weights + 3 * squares) + _factorized(block)
    return replace(need, pieces={**need.pieces, f"{work.workers} workers": work.workers * each})


def _need(stage: str, steps: _Steps, base_bytes: int) -> MemoryNeed:
    step, pieces = max(steps, key=lambda entry: sum(entry[1].values()))
    whole = {name: round(SPARE * size) for name, size in pieces.items() if size}
    return MemoryNeed(stage, step, {"libraries": base_bytes + _COMPUTING, **whole})


def _of_all_tokens(work: Workload, size: int) -> int:
    """Counts what there is of every token: in memory, or in scratch files, of which a batch at a time is in memory."""
    return size * work.batch // max(1, work.tokens) if work.pieces.scratch else size


def _expert_apart(work: Workload) -> dict[str, int]:
    """One expert that is read by itself, and its tokens' inputs and sums; nothing where experts are in memory."""
    apart = max(range(work.inventory.num_layers), key=work.apart_bytes)
    block = work.block(apart)
    if block is None or not work.apart_bytes(apart):
        return {}
    weights = block.weights_per_expert * work.itemsize
    slots = 2 * work.batch * block.top_k // block.num_experts  # twice the mean: routers are not even
    return {"an expert, with its files": 2 * weights, "its tokens": slots * work.hidden * (_FLOAT + work.itemsize)}


def _loading(work: Workload, held: dict[str, int]) -> tuple[str, dict[str, int]]:
    layer = work.largest_layer
    files = {"its files, mapped": work.stored_bytes(layer)}
    return "a layer is read", held | {"the layer": work.layer_bytes(layer)} | files


def _calibrate(work: Workload) -> _Steps:
    held = {"embedding and head": work.rest_bytes, "hidden states": _of_all_tokens(work, work.hidden_bytes)}
    layer, apart = work.layer_bytes(work.largest_layer), _expert_apart(work)
    yield _loading(work, held)
    yield "forward", held | apart | {"the layer": layer, "activations": _activations(work, work.batch)}
    if not work.backward_tokens:
        return
    scratch = work.pieces.scratch
    batch = min(work.batch, max(1, GRADIENT_BATCH_TOKENS // work.length) * work.length)
    part = batch if scratch else work.backward_tokens  # tokens whose states and gradients are in memory
    states = part * work.hidden * work.itemsize
    beside = {"hidden states of the backward pass": states}
    logits = _LOGIT_COPIES * work.length * work.vocabulary * _FLOAT
    yield (
        "gradients at the head",
        held | beside | {"gradients": work.samples * states, "logits of a sequence": logits},
    )
    inputs = work.backward_tokens * work.hidden * work.itemsize
    gradients = {"gradients": 2 * work.samples * states, "inputs of the layer": inputs}
    name, loaded = _loading(work, held | beside | {"gradients": work.samples * states})
    yield f"{name} on the way back", loaded
    activations = _kept_activations(work, batch, of_experts=not apart)
    yield "backward", held | beside | gradients | apart | {"the layer": layer, "activations": activations}


def _score(work: Workload) -> _Steps:
    hidden = _of_all_tokens(work, work.hidden_bytes)
    held = {"embedding and head": work.rest_bytes, "hidden states": hidden}
    if work.roles and not work.pieces.scratch:
        yield "the embedding is coded on trial", held | {"the embedding as it was, and coded": 2 * work.rest_bytes}
        held["hidden states of roles"] = work.trial_bytes
    layer = {"the layer": work.layer_bytes(work.largest_layer)}
    yield _loading(work, held)
    kept = {"inputs of experts": 2 * hidden, "routing": _routing(work)} | _expert_apart(work)
    yield "the layer's inputs are kept", held | layer | kept
    members, block = _chunk(work)
    up, down = (part.weight_count * _FLOAT * members for part in block.projections)
    squares = [part.in_features**2 * _FLOAT * members for part in block.projections]
    measured = (
        held
        | layer
        | {
            "inputs of experts": hidden,
            "routing": _routing(work),
            "weights of some experts": up + down,
            "second moments and their factors": 3 * sum(squares),
            "activations": work.loss_tokens * members * (block.channels + work.hidden) * _FLOAT,
        }
    )
    yield "second moments are factorized", measured | {"codes on trial": up, "copies": _factorized(block)}
    yield "experts are measured", measured | {"codes on trial": max(5 * up, 2 * up + 5 * down)}


def _quantize(work: Workload) -> _Steps:
    walks = 2 if work.corrects else 1
    hidden = _of_all_tokens(work, work.hidden_bytes)
    held = {"embedding and head": work.rest_bytes, "hidden states": walks * hidden}
    layer = {"the layer": work.layer_bytes(work.largest_layer)}
    yield _loading(work, held)
    apart = _expert_apart(work)
    shares = {"inputs of experts": hidden, "routing": _routing(work)}
    rest = (1 if work.corrects else 0) * hidden
    yield (
        "the layer's inputs are kept",
        held | layer | apart | {"inputs of experts": 2 * hidden, "output of the rest": rest},
    )
    members, block = _chunk(work)
    up, down = block.projections
    packed = sum(part.weight_count for part in block.projections) * block.num_experts // 2  # some 4 bits a weight
    packed = 0 if work.pieces.scratch else packed
    for part, missing in ((up, 0), (down, rest)):
        weights = part.weight_count * _FLOAT * members
        rows = part.out_features * min(_RING_ROWS, part.out_features) * _FLOAT * members
        coded = (
            held
            | layer
            | shares
            | {
                "output of the rest": rest,
                "what is missing": missing,
                "second moments and their factors": 3 * part.in_features**2 * _FLOAT * members,
                "second moments of rows": rows if work.corrects else 0,
                "the packed layer": packed if part is down else packed // 2,
            }
        )
        factor = _factor_bytes(part.in_features)
        yield f"second moments of {part.name} are factorized", coded | {"weights": 2 * weights, "copies": factor}
        more = {"weights and codes": 6 * weights, "feedback between rows": 2 * rows if work.corrects else 0}
        yield f"{part.name} is coded", coded | more


def _prune_eval(work: Workload) -> _Steps:
    batch = work.batch
    held = {"embedding and head": 2 * work.rest_bytes, "the layer": work.layer_bytes(work.largest_layer)}
    yield "logits", held | {"logits": 4 * work.length * work.vocabulary * _FLOAT}
    yield "forward", held | _expert_apart(work) | {"activations": _activations(work, batch)}


def _routing(work: Workload) -> int:
    """Counts what a capture keeps of routing: index, weights and probabilities of every token."""
    block = work.largest_block
    return work.tokens * (block.top_k * (_DOUBLE + _FLOAT) * 2 + block.num_experts * _FLOAT)


def _factorized(block: ExpertBlock) -> int:
    """Counts what the largest factor of a block takes beside its matrix."""
    return _factor_bytes(max(part.in_features for part in block.projections))


def _factor_bytes(in_features: int) -> int:
    """Counts the copies that one factor takes beside its matrix, in float64 where that is computed in."""
    return _COPIES_TO_FACTORIZE * in_features**2 * (_DOUBLE if in_features <= FLOAT64_LIMIT else _FLOAT)


def _chunk(work: Workload) -> tuple[int, ExpertBlock]:
    """(experts that are worked on together, their layer's block)."""
    block = work.largest_block
    return len(next(expert_chunks(block))), block


def _activations(work: Workload, batch: int) -> int:
    """Counts a forward of `batch` tokens through a layer: residual stream, attention, one expert after another."""
    block = work.largest_block
    own = min(batch, 2 * batch * block.top_k // block.num_experts + 1)  # twice the mean: routers are not even
    return (8 * batch * work.hidden + own * (2 * work.hidden + 4 * block.channels)) * work.itemsize


def _kept_activations(work: Workload, batch: int, *, of_experts: bool) -> int:
    """The same where all of it is kept for gradients; of experts that are read one by one only one's."""
    block = work.largest_block
    slots = batch * block.top_k if of_experts else 2 * batch * block.top_k // block.num_experts
    return (16 * batch * work.hidden + slots * (3 * work.hidden + 5 * block.channels)) * work.itemsize
