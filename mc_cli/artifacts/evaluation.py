"""`evaluation/eval.json`: what was measured on the original and on the packed model, on which text, with units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from mc_cli.artifacts.calibration import ImageReport, TextReport
from mc_cli.artifacts.fields import FieldError, Within, read_as, reading, take_schema
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.errors import shown

SCHEMA = 1
_MOST_LOSS = 700.0  # nats; the exponent of more is beyond a float

UNITS = {
    "loss": "nats per token, mean over predicted tokens",
    "perplexity": "exp(loss)",
    "kl_divergence": "nats per token, KL(original || packed) of the next-token distributions",
    "same_top_token": "share of predictions where both models rank the same token first",
    "router_changes": "share of (token, slot) expert choices that differ from the original's, per MoE layer",
}


@dataclass(frozen=True)
class TextResult:
    """One domain of the text, or all of it."""

    tokens: Annotated[int, Within(1)]
    original_loss: Annotated[float, Within(0, _MOST_LOSS)]
    packed_loss: Annotated[float, Within(0, _MOST_LOSS)]
    kl_divergence: float
    same_top_token: Annotated[float, Within(0, 1)]


@dataclass(frozen=True)
class AnswersResult:
    """Answers given the image and the question: how many, and how many each model gives exactly by greedy decoding."""

    answers: Annotated[int, Within(1)]
    original_right: Annotated[int, Within(0)]
    packed_right: Annotated[int, Within(0)]


@dataclass(frozen=True)
class PruningPoint:
    """One operating point of a policy, or the model without one, on held-out text; see `units` of the file."""

    rate: Annotated[float, Within(0, 1)]
    tokens: int
    loss: float
    loss_error: float
    perplexity: float
    perplexity_rise: float
    kl_packed: float
    kl_original: float
    experts_per_token: float
    experts_by_layer: Mapping[str, float]
    experts_by_class: Mapping[str, float]
    activated_bytes: float
    activated_parameters: float
    policy: str = ""
    chosen: bool = False
    fitted_rate: float = 0.0
    predicted_loss: float | None = None
    thresholds: Sequence[float] = ()
    on_front: bool = False
    answers: int = 0
    answers_right: int = 0
    rate_by_kind: Mapping[str, float] = field(default_factory=dict)  # kind of token -> share of its calls skipped
    thresholds_by_kind: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PruningFigures:
    """Findings of prune-eval about the policies."""

    policy: str
    fit: str
    units: Mapping[str, str]
    unpruned: PruningPoint
    points: Sequence[PruningPoint]
    token_classes: Mapping[str, int]
    experts_dropped: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation measured.

    context     length, stride, number and source of windows, bits of inputs of packed products; bytes of the original's
                files where they are codes
    stored      role -> bytes {codes, side, kept}, of the packed model; original: role -> bytes
    tasks       lm-eval's own results per model, empty without tasks
    pruning     every operating point of the policies that were measured, empty without a policy
    answers     whole answers given exactly; kinds: predictions by the kind of the predicted token, questions' too;
                router_changes_by_kind: kind of token -> layer -> share. With images alone: `total` is then of answers
    """

    total: TextResult
    domains: Mapping[str, TextResult]
    router_changes: Mapping[int, float]
    context: Mapping[str, Any]
    stored_bytes: Mapping[str, Mapping[str, Annotated[int, Within(0)]]]
    original_bytes: Mapping[str, Annotated[int, Within(0)]]
    expert_stored_bits: float
    expert_code_bits: float
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=lambda: dict(UNITS))
    pruning: Mapping[str, Any] = field(default_factory=dict)
    answers: AnswersResult | None = None
    kinds: Mapping[str, TextResult] = field(default_factory=dict)
    router_changes_by_kind: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def write(self, path: str | PathLike[str]) -> None:
        """Writes the JSON file in one atomic replace."""
        content = {"schema": SCHEMA, **asdict(self)}
        for name in ("pruning", "answers", "kinds", "router_changes_by_kind"):
            if not getattr(self, name):
                del content[name]
        write_json(Path(path), content)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Evaluation:
        """Reads the file back. Raises ArtifactError where it is damaged."""
        path = Path(path)
        content = read_json(path)
        with reading(path, "an evaluation of this version", "Run prune-eval --force."):
            take_schema(content, SCHEMA)
            found: Evaluation = read_as(cls, content)
            found._check()
        return found

    def _check(self) -> None:
        """Raises FieldError for what no evaluation finds, and the tables of results are made of."""
        if not self.domains or not self.router_changes:
            raise FieldError(f"it has {len(self.domains)} domains and {len(self.router_changes)} layers")
        if sum(self.original_bytes.values()) <= 0 or sum(map(_total, self.stored_bytes.values())) <= 0:
            raise FieldError("stored_bytes or original_bytes add up to nothing")
        context = {"length": int, "stride": int, "windows": int, "data": str, "activation_bits": int}
        context["original_file_bytes"] = int
        for name, kind in context.items():
            if name in self.context or name in ("length", "stride"):
                read_as(kind, self.context.get(name), f"context.{name}")
        if "text" in self.context:
            read_as(TextReport, self.context["text"], "context.text")
        if "images" in self.context:
            read_as(ImageReport, self.context["images"], "context.images")
        if self.pruning:
            pruning: PruningFigures = read_as(PruningFigures, dict(self.pruning), "pruning")
            if not any(point.chosen and point.policy == pruning.policy for point in pruning.points):
                raise FieldError(f"pruning.points has no chosen point of the policy {shown(pruning.policy)}")
        self._check_tasks()

    def _check_tasks(self) -> None:
        """Raises FieldError where models were not measured on the same tasks by the same metrics."""
        results = {
            name: read_as(Mapping[str, Mapping[str, Any]], dict(found).get("results"), f"tasks.{name}.results")
            for name, found in self.tasks.items()
        }
        for first in list(results.values())[:1]:
            for name, other in results.items():
                if {task: set(found) for task, found in other.items()} != {
                    task: set(found) for task, found in first.items()
                }:
                    raise FieldError(f"tasks.{shown(name)} has other tasks or metrics than the first model")
                for task, metric in ((task, metric) for task, found in other.items() for metric in found):
                    if "," in metric:
                        read_as(float | str, other[task][metric], f"tasks.{name}.results.{task}.{metric}")


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())
