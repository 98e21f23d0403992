"""The loss over the size, from scores alone: allocate's programme at several sizes, and other methods beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mc_cli.allocators import Budget, feasible_problem, strategy_named
from mc_cli.allocators.feasibility import size_range
from mc_cli.allocators.problem import BUDGET_FLAGS
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import BudgetError, InputError, McError, Problems, first_line
from mc_cli.overview.sources import Scores, predicted_loss_of
from mc_cli.progress import Progress
from mc_cli.settings import AllocateSettings
from mc_cli.stages.allocate import plan_of

POINTS = 12  # sizes where none are asked for
OURS = "global"
BESIDE = ("uniform", "pmq", "layerwise")  # what a plan is compared with
EXPERTS_ALONE = (
    "These scores do not tell what attention, shared experts, embedding and head cost: predicted losses are of the "
    "experts alone, and expected gaps too low. Run score --force, with a calibration that has --gradient-tokens."
)
_INSIDE = 1e-6  # part of the range by which its ends are kept away from, where rounding may leave no plan


@dataclass(frozen=True)
class Point:
    """One plan: its size, and the rise of the loss that its experts' widths are predicted to cost.

    stored_bits    stored bits per expert weight;  stored_bytes  of the whole model, headers of its files included
    role_bits      widths of what is not a routed expert
    predicted_loss  nats per token; of the experts alone where score has not measured what the rest costs
    """

    method: str
    stored_bits: float
    code_bits: float
    stored_bytes: int
    expert_bytes: int
    role_bits: tuple[tuple[str, float], ...]
    predicted_loss: float
    solver_status: str

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "role_bits": dict(self.role_bits)}


@dataclass(frozen=True)
class Curve:
    """Points by method in the order of their size, and why a method has none at a size.

    sizes   for every size that was asked for, the smallest first: method -> the largest plan that it makes of it
    """

    points: tuple[Point, ...]
    sizes: tuple[Mapping[str, Point], ...]
    left_out: tuple[str, ...] = ()  # and what predictions do not cover

    def of(self, method: str) -> list[Point]:
        """One method's points, the smallest first."""
        return sorted((point for point in self.points if point.method == method), key=lambda point: point.stored_bytes)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(point.method for point in self.points))


def curve_of(scores: Scores, sizes: Sequence[int] | None, progress: Progress) -> Curve:
    """Plans of `global` at every size, and of other methods where they have one.

    sizes   bytes of the whole model; None: POINTS sizes from the smallest to the largest that can be reached
    Raises a McError naming every asked size that cannot be reached, and scores that hold no predicted losses.
    """
    asked = _asked(scores, sizes)
    problems, left_out = Problems(), []
    sizes_of: list[dict[str, Point]] = [{} for _ in asked]
    with progress.step("curve", total=len(asked) * (1 + len(BESIDE)), unit="plan") as step:
        for settings, made in zip(asked, sizes_of, strict=True):
            with problems.catching():
                made[OURS] = _point(scores, settings, OURS)
            step.advance(note=OURS)
        problems.tell()
        for method in BESIDE:
            if lacking := _lacking(scores, method):
                left_out.append(lacking)
                step.advance(len(asked))
                continue
            refused = []
            for settings, made in zip(asked, sizes_of, strict=True):
                try:
                    made[method] = _point(scores, settings, method)
                except (BudgetError, InputError) as error:
                    refused.append(error)
                step.advance(note=method)
            if refused:
                left_out.append(_refused(method, len(asked), refused))
    if not scores.importance.role_costs:
        left_out.append(EXPERTS_ALONE)
    points = [made[method] for method in (OURS, *BESIDE) for made in sizes_of if method in made]
    # Where widths end, several sizes give one plan.
    distinct = {tuple(made.values()): made for made in sizes_of}
    return Curve(tuple(dict.fromkeys(points)), tuple(distinct.values()), tuple(left_out))


def _lacking(scores: Scores, method: str) -> str:
    """The reason why a method with widths of its own has no place beside scores for an engine; empty for others."""
    own = strategy_named(method).candidate_bits
    if scores.engine is None or own is None or set(own) <= set(scores.importance.candidate_bits):
        return ""
    return f"{method} is left out: it is for {', '.join(map(str, own))} bits, which scores for {scores.engine} lack."


def largest_within(scores: Scores, size: int) -> Point:
    """The plan of `global` whose tensors fit into `size` bytes. Raises BudgetError, naming --fit, where none does."""
    scores = replace(scores, inventory=replace(scores.inventory, directory_bytes=0))  # nobody loads these files
    return _point(scores, AllocateSettings(target_size_bytes=size), OURS, flag="--fit")


def _refused(method: str, asked: int, errors: Sequence[McError]) -> str:
    return f"{method} has no plan at {len(errors)} of {asked} sizes: {first_line(errors[0])}"


def _told_of(flag: str, size: int | None, error: BudgetError) -> BudgetError:
    """The error of a target in the words of the curve, which names sizes by `flag`; `size` None: nobody named it."""
    told = error.told.replace(BUDGET_FLAGS["expert_bytes"], flag)
    if size is None:
        return BudgetError(told)
    named = told if told.startswith(flag) else f"{flag} {size:,} bytes: {told}"
    return BudgetError(named, "Name a size that is large enough.")


def _asked(scores: Scores, sizes: Iterable[int] | None) -> list[AllocateSettings]:
    if sizes is not None:
        return [AllocateSettings(target_size_bytes=size) for size in sorted(set(sizes))]
    least, most = reachable_bits(scores)
    step = (most - least) / (POINTS - 1)
    targets = [least + place * step for place in range(POINTS)]
    targets[0] += _INSIDE * (most - least)
    return [AllocateSettings(target_stored_bits=round(target, 9)) for target in targets]


def reachable_bits(scores: Scores) -> tuple[float, float]:
    """(fewest, most) stored bits per expert weight of the widths that were scored."""
    problem = feasible_problem(scores.importance, method=OURS, budget=Budget("stored_bits", 16.0))
    least, most = size_range(problem)
    return 8 * least / problem.weight_count, 8 * most / problem.weight_count


def _point(scores: Scores, settings: AllocateSettings, method: str, *, flag: str = "--sizes") -> Point:
    asked = AllocateSettings(
        target_stored_bits=settings.target_stored_bits,
        target_size_bytes=settings.target_size_bytes,
        method=method,
        engine=scores.engine,
    )
    try:
        plan, _ = plan_of(asked, scores.importance, scores.inventory, scores.quantizer, scores.cuts, scores.pairs)
    except BudgetError as error:
        raise _told_of(flag, settings.target_size_bytes, error) from error
    return point_of(plan)


def point_of(plan: Plan) -> Point:
    """The point that a plan is. Raises InputError where its scores hold no predicted losses."""
    loss = predicted_loss_of(plan)
    if loss is None:
        raise InputError(
            "The scores hold no predicted losses for these widths, so there is no curve. Run calibrate with "
            "--gradient-tokens above 0, and score, both with --force."
        )
    return Point(
        method=plan.method,
        stored_bits=plan.budget["reached_stored_bits"],
        code_bits=plan.budget["reached_code_bits"],
        stored_bytes=plan.budget["expert_bytes"] + plan.budget["other_bytes"],
        expert_bytes=plan.budget["expert_bytes"],
        role_bits=tuple((role.value, bits) for role, bits in sorted(plan.role_bits.items())),
        predicted_loss=loss,
        solver_status=str(plan.solver.get("status", "")),
    )
