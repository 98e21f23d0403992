"""The results of a work directory as they lie there: scores, and of every variant its plan and what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mc_cli.allocators.beside import experts_loss_of
from mc_cli.allocators.pairs_measured import NO_PAIRS, MeasuredPairs, read_pairs
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.followed_plan import followed_plan, follows_own_plan
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.names import EVALUATION, IMPORTANCE
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.store import require_done
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import InputError
from mc_cli.overview.expectation import Seen, noise_of
from mc_cli.parts import ModelInventory
from mc_cli.settings import QuantizerSettings
from mc_cli.stages.allocate import Cuts, read_cuts, scoring_quantizer, with_directory

OTHERS = "the evaluation is of another packed model, or the packed model of another plan"


@dataclass(frozen=True)
class Scores:
    """All that allocate reads.

    engine   that the scores were made for
    """

    importance: Importance
    inventory: ModelInventory
    quantizer: QuantizerSettings
    cuts: Cuts = field(default_factory=dict)
    pairs: MeasuredPairs = NO_PAIRS
    engine: str | None = None


@dataclass(frozen=True)
class Measured:
    """One variant that was evaluated: its plan, where the packed model was made from it, and the figures.

    A plan that quantize was given is here without budget, objective and solver.
    """

    work: WorkDir
    evaluation: Evaluation
    plan: Plan | None

    @property
    def gap(self) -> float:
        """Loss of the packed model minus loss of the original, nats per token."""
        return self.evaluation.total.packed_loss - self.evaluation.total.original_loss

    @property
    def noise(self) -> float:
        """Standard deviation of the gap, as the text has so many tokens."""
        return noise_of(self.evaluation.total.kl_divergence, self.evaluation.total.tokens)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(sum(parts.values()) for parts in self.evaluation.stored_bytes.values())

    @property
    def predicted_loss(self) -> float | None:
        """The loss that allocate predicted, nats per token; None where it could not tell, or the plan is another."""
        return predicted_loss_of(self.plan) if self.plan is not None and covers_model(self.plan) else None


def seen_of(measured: Iterable[Measured]) -> list[Seen]:
    """The variants of which predicted and measured loss are known."""
    return [
        Seen(entry.work.path.name, entry.predicted_loss, entry.gap, entry.noise)
        for entry in measured
        if entry.predicted_loss is not None
    ]


def predicted_loss_of(plan: Plan) -> float | None:
    """Nats per token that a plan is predicted to cost, see `covers_model`; None: its scores do not tell."""
    whole = plan.objective.get("predicted_loss_of_model")
    return whole if isinstance(whole, float) else experts_loss_of(plan)


def covers_model(plan: Plan) -> bool:
    """Whether a plan's predicted loss is of the whole model, and not of the experts alone."""
    return plan.objective.get("predicted_loss_of_model") is not None


def require_work_dir(path: Path) -> None:
    """Raises InputError unless a calibrate or run has begun there."""
    if not path.is_dir():
        raise InputError(f"{path} is no directory. Give the work directory that calibrate or run was given with -w.")


def read_scores(work: WorkDir) -> Scores:
    """Reads the results of calibrate and score. Raises ArtifactError where they are not done.

    Tensors that calibrate keeps for other stages may be left out of a copy.
    """
    require_work_dir(work.path)
    require_done(work, "calibrate", only=(calibration_artifact.INVENTORY,))
    require_done(work, "score")
    inventory = calibration_artifact.read_inventory(work.folder("calibrate") / calibration_artifact.INVENTORY)
    importance = Importance.read(work.folder("score") / IMPORTANCE)
    measured = read_cuts(work, inventory), read_pairs(work, importance)
    return Scores(importance, with_directory(inventory, work), scoring_quantizer(work), *measured, engine=work.engine)


def read_measured(path: Path) -> tuple[list[Measured], list[str]]:
    """(every variant that was evaluated, in the order of `status`; a sentence for each whose parts do not belong
    together, which are left out)."""
    found, left_out = [], []
    for name in WorkDir(path).variants():
        work = WorkDir(path, name)
        evaluated, packed = (Manifest.read(work.folder(stage)) for stage in ("prune-eval", "quantize"))
        if evaluated is None:
            continue
        if packed is None or evaluated.inputs.get("quantize") != packed.fingerprint:
            left_out.append(f"Variant {name} is left out: {OTHERS}. Run `{work.command('prune-eval')}` again.")
            continue
        followed = followed_plan(work)
        plan = None if followed is None else Plan.read(followed)
        if plan is not None and follows_own_plan(packed):  # its figures may be those of before it was edited
            plan = replace(plan, budget={}, objective={}, solver={}, warnings=())
        found.append(Measured(work, Evaluation.read(work.folder("prune-eval") / EVALUATION), plan))
    return found, left_out
