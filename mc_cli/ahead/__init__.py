"""Before the first forward: everything that a late stage would refuse after hours, and what a run will take.

No weight is read: shapes come from headers, sizes from shapes. All that stands against a run is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mc_cli.ahead.budget import Size, check_engine, importance_of_shapes, kinds_of, planned_size, reachable_size
from mc_cli.ahead.disk import Need, check_disk, needs_of, written_by
from mc_cli.ahead.duration import durations
from mc_cli.ahead.machine import known_machine
from mc_cli.ahead.memory import check_memory, memory_needs, short_of_memory
from mc_cli.ahead.outlook import Outlook, roles_of
from mc_cli.ahead.results import Asked, check_results
from mc_cli.ahead.tasks import check_tasks
from mc_cli.ahead.texts import Reader, check_texts, text_bytes
from mc_cli.ahead.workload import Workload
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.exported_file import export_place
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.work_dir import FOLDERS, VARIANTS, WorkDir
from mc_cli.coding.quantization import quantizer_for
from mc_cli.data import text
from mc_cli.data.processors import sees
from mc_cli.errors import InputError, Problems, reworded_text
from mc_cli.exporters import check_model
from mc_cli.kernels.compiled import check_inputs
from mc_cli.models.companions import directory_bytes
from mc_cli.models.memory import available_bytes, collector_paused, resident_bytes
from mc_cli.models.pieces import Pieces
from mc_cli.models.session import Session, first_session, later_session
from mc_cli.parts import ModelInventory
from mc_cli.reports.calibration import stored_facts
from mc_cli.settings import (
    ENGINES,
    EXPERT,
    CalibrateSettings,
    QuantizerSettings,
    QuantizeSettings,
    RunSettings,
    ScoreSettings,
)
from mc_cli.stages.allocate import with_directory
from mc_cli.stages.calibrate import opened
from mc_cli.stages.quantize import check_plan, existing_plan, plan_path
from mc_cli.stages.score import role_widths
from mc_cli.wording import COMMAND_WORDS, Words

_COMMON = "calibrate"  # whose flags are meant where a message is not of one stage alone
__all__ = ["Look", "Outlook", "look_ahead"]


def look_ahead(
    stages: Mapping[str, Any],
    compute: RunSettings,
    work: WorkDir,
    *,
    todo: Collection[str],
    words: Words = COMMAND_WORDS,
) -> Outlook:
    """The needs of running the stages `todo`.

    stages   settings by stage: all of a run, or a single stage's
    words    of who asked, for messages
    Raises one McError, or SeveralErrors naming everything that stands against it.
    """
    look = Look(stages, compute, work, todo, words=words)
    found = look.outlook()
    look.problems.tell()
    return found


class Look:
    """One look: what is wrong is collected on the way, in `problems`, and what depends on it left out."""

    def __init__(
        self,
        stages: Mapping[str, Any],
        compute: RunSettings,
        work: WorkDir,
        todo: Collection[str],
        *,
        described: tuple[Session, ModelInventory] | None = None,
        tokenizes: bool = True,
        words: Words = COMMAND_WORDS,
    ) -> None:
        """Nothing is read yet.

        described   a model of which only the description is here, not its files
        tokenizes   whether texts are looked at as the model's tokenizer reads them; others only have to be readable
        """
        self._described = described
        self._tokenizes, self._words = tokenizes, words
        self._by_expert = True  # whether the files allow that experts are read one by one; known once they are opened
        self._known: tuple[Session | None, ModelInventory | None] | None = None
        self._plan: Plan | None = None  # that quantize is given, once it is read and found to fit
        self._all = stages
        self._todo = {stage: settings for stage, settings in stages.items() if stage in todo}
        self._compute = compute
        self._work = work
        self.problems = Problems()

    def outlook(self) -> Outlook:
        """All that can be told; what stands against it is in `problems`."""
        found = self._outlook()
        names = self._words.names(_COMMON)
        found.warnings = [reworded_text(message, names) for message in found.warnings]
        self.problems.reword(names)
        return found

    @collector_paused()
    def _outlook(self) -> Outlook:
        found = Outlook()
        session, inventory = self.model()
        self._texts(session)
        self._names(session)
        self._places()
        size = self._size(inventory) if inventory is not None else None
        self._results(session, inventory)
        if inventory is not None:
            found.facts |= {
                "model type": inventory.model_type,
                "model bytes": sum(inventory.bytes_by_role().values()),
                "expert weights": inventory.expert_weight_count,
            }
            found.facts |= stored_facts(inventory)
            found.roles = roles_of(inventory)
        if size is not None:
            found.facts |= size.facts
            found.warnings += size.warnings
        if inventory is not None:
            work = self.workload(session, inventory, size)
            needs = self._needs(session, inventory, size, work)
            found.needs += needs
            for need in needs:
                with self.problems.catching():
                    check_disk(need)
            if work is not None:
                self._resources(found, inventory, work)
        return found

    def _resources(self, found: Outlook, inventory: ModelInventory, work: Workload) -> None:
        """Memory and time of the stages to do; a limit that one does not keep is among the problems."""
        needs = memory_needs(work, base_bytes=resident_bytes())
        found.memory = [need for need in needs if need.stage in self._todo]
        found.written = written_by(
            self._todo,
            inventory,
            hidden_size=work.hidden,
            hidden_bytes=work.hidden * work.itemsize,
            tokens=work.tokens,
            length=work.length,
            packed_bytes=work.packed_bytes,
            trial_bytes=work.trial_bytes,
            scratch=work.scratch_bytes,
        )
        machine = known_machine()
        if machine is not None:
            seconds = durations(work, machine, evaluated_tokens=self.evaluated_tokens(work))
            found.seconds = {stage: seconds[stage] for stage in self._todo}
        limit, free = self._compute.max_memory_bytes, available_bytes()
        if limit is not None:
            with self.problems.catching():
                check_memory(found.memory, limit, work)
        elif free is not None:
            found.warnings += short_of_memory(found.memory, free, work)

    def workload(self, session: Session | None, inventory: ModelInventory, size: Size | None) -> Workload | None:
        """The work that memory and time follow from; None where the model's configuration is not at hand."""
        if session is None:
            return None
        tokens, length = None, 1
        with self.problems.catching():
            tokens, length = self._tokens(session)
        text_config = session.config.get_text_config()
        calibrate = self._all.get("calibrate") or CalibrateSettings()
        score, quantize = self._score() or ScoreSettings(), self._all.get("quantize") or QuantizeSettings()
        tokens = tokens or calibrate.sequences * length
        return Workload(
            inventory=inventory,
            hidden=int(text_config.hidden_size),
            vocabulary=session.vocabulary,
            itemsize=session.dtype.itemsize,
            tokens=tokens,
            length=length,
            batch_tokens=self._compute.batch_tokens,
            backward_tokens=min(tokens, -(-calibrate.gradient_tokens // length) * length),
            samples=calibrate.gradient_samples,
            widths=score.bits,
            all_widths=score.measures_all,
            roles=tuple(role_widths(score, inventory)),
            loss_tokens=score.loss_tokens,
            corrects=quantize.quantizer.corrects_errors,
            quantizer=quantize.quantizer.quantizer,
            packed_bytes=0 if size is None else size.whole,
            workers=int(self._compute.workers) if self._compute.workers.isdigit() else 0,
            pieces=Pieces(self._compute.max_memory_bytes if self._by_expert else None),
            config=text_config.to_dict(),
        )

    def evaluated_tokens(self, work: Workload) -> int:
        """Tokens of held-out text at most, four bytes of text each where nothing else limits them."""
        settings = self._all.get("prune-eval")
        if settings is None:
            return 0
        asked = settings.max_sequences * (settings.length or work.length)
        session = self.model()[0]
        limit = None if session is not None and sees(session.config) else text_bytes(settings.data)
        there = None if limit is None else limit // 4
        return min(asked or there or work.tokens, there or asked or work.tokens)

    def model(self) -> tuple[Session | None, ModelInventory | None]:
        """The model's folder, and what it is made of; looked at once."""
        if self._known is None:
            self._known = self._described or self._model()
        return self._known

    def _model(self) -> tuple[Session | None, ModelInventory | None]:
        """The model's folder, and what it is made of: from its headers, or as a finished calibration noted it."""
        session: Session | None = None
        inventory: ModelInventory | None = None
        if set(self._todo) <= {"allocate", "export"} and "calibrate" not in self._all:
            inventory = self._noted_inventory()
            return None, None if inventory is None else with_directory(
                inventory, replace(self._work, engine=self._engine)
            )
        with self.problems.catching():
            if "calibrate" in self._all:
                asked = self._all["calibrate"]
                session = first_session(self._work.path, asked.model, asked.revision, self._compute)
            else:
                session = later_session(self._work.path, self._compute)
        with self.problems.catching():
            if session is not None and "calibrate" in self._todo:
                checkpoint, inventory = opened(session)
                self._by_expert = checkpoint.reads_experts
            else:
                inventory = self._noted_inventory()
        if session is not None and inventory is not None:
            size = directory_bytes(session.folder, inventory, self._engine)
            inventory = replace(inventory, directory_bytes=size)
        return session, inventory

    @property
    def _engine(self) -> str | None:
        """The engine that the plan is made for."""
        allocate = self._all.get("allocate")
        return self._work.engine if allocate is None else allocate.engine

    def _noted_inventory(self) -> ModelInventory | None:
        path = self._work.folder("calibrate") / calibration_artifact.INVENTORY
        return calibration_artifact.read_inventory(path) if path.exists() else None

    def _texts(self, session: Session | None) -> None:
        """Texts that are enough for what is drawn of them."""
        tokenizer = None
        if session is not None and self._tokenizes and not {"calibrate", "prune-eval"}.isdisjoint(self._todo):
            with self.problems.catching():
                tokenizer = text.load_tokenizer(session.folder, trust_remote_code=self._compute.trust_remote_code)
        reader = Reader(session, tokenizer, 0)
        with self.problems.catching():
            reader = Reader(session, tokenizer, self._tokens(session)[1])
        for stage in ("calibrate", "prune-eval"):
            found = Problems()
            check_texts({stage: self._todo[stage]} if stage in self._todo else {}, reader, found)
            with self.problems.catching(), self._words.told(stage):
                found.tell()

    def _names(self, session: Session | None) -> None:
        """Names that only a late stage looks up: quantizers, policies, lm-eval tasks, formats of engines."""
        for stage in ("score", "quantize"):
            if stage in self._todo:
                with self.problems.catching(), self._words.told(stage):
                    quantizer_for(self._todo[stage].quantizer)
        if "prune-eval" in self._todo:
            evaluated = self._todo["prune-eval"]
            with self.problems.catching(), self._words.told("prune-eval"):
                check_tasks(evaluated)
            if session is not None:
                with self.problems.catching(), self._words.told("prune-eval"):
                    check_inputs(evaluated.activation_bits, session.device)
        score = self._todo.get("score")
        if session is not None and score is not None and score.engine is not None:
            with self.problems.catching():
                check_model(ENGINES[score.engine].format, session.config)

    def _results(self, session: Session | None, inventory: ModelInventory | None) -> None:
        """Checks that policies and formats can have the packed model that they ask for."""
        config = None if session is None else session.config
        trusted = self._compute.trust_remote_code
        asked = Asked(self._all, self._todo, self._work, config, inventory, self._plan, trusted, self._words)
        check_results(asked, self.problems)

    def _places(self) -> None:
        """Places that can be written to."""
        with self.problems.catching():
            check_work_dir(self._work.path)
        if "export" in self._todo:
            with self.problems.catching():
                check_target(self._todo["export"].out, self._work.path)

    def _size(self, inventory: ModelInventory) -> Size | None:
        """The size of the packed model: as the budget asks, or as a plan says."""
        size: Size | None = None
        quantize = self._todo.get("quantize")
        with self.problems.catching(), self._words.told("quantize"):
            if quantize is not None and self._is_given(quantize):
                plan = Plan.read(existing_plan(quantize, self._work))
                check_plan(plan, quantize, inventory)
                self._plan = plan
                size = planned_size(plan, inventory, quantize.quantizer)
        score = self._score()
        if score is not None and "score" in self._todo:
            with self.problems.catching(), self._words.told("score"):
                kinds = replace(inventory, expert_blocks=tuple(kinds_of(inventory)))
                check_engine(kinds, score)
                importance_of_shapes(kinds, score)  # every width fits every matrix
        if score is not None and "allocate" in self._todo:
            with self.problems.catching(), self._words.told("allocate"):
                asked = reachable_size(self._todo["allocate"], score, inventory)
                size = size or asked
        return size

    def _is_given(self, quantize: QuantizeSettings) -> bool:
        """Whether the plan that quantize is to follow is there already, or should be."""
        return quantize.plan is not None or ("allocate" not in self._all and plan_path(quantize, self._work).is_file())

    def _score(self) -> ScoreSettings | None:
        """The settings that score has had, or will have."""
        if "score" in self._all:
            asked: ScoreSettings = self._all["score"]
            return asked
        engine = getattr(self._todo.get("allocate"), "engine", None)
        done = Manifest.read(replace(self._work, engine=engine).folder("score"))
        if done is None:
            return None
        quantizer = QuantizerSettings(**done.settings["quantizer"]).effective
        return ScoreSettings(
            tuple(done.settings["bits"]),
            quantizer,
            unit=done.settings.get("unit", EXPERT),
            similarity=done.settings.get("similarity", False),
        )

    def _needs(
        self, session: Session | None, inventory: ModelInventory, size: Size | None, work: Workload | None
    ) -> list[Need]:
        tokens, length = None, 1
        with self.problems.catching():
            tokens, length = self._tokens(session)
        hidden = None if session is None else session.config.get_text_config().hidden_size
        return needs_of(
            self._todo,
            self._work,
            inventory,
            hidden_size=hidden or 0,
            hidden_bytes=0 if session is None else (hidden or 0) * session.dtype.itemsize,
            tokens=tokens,
            length=length,
            packed_bytes=None if size is None else size.whole,
            trial_bytes=0 if work is None else work.trial_bytes,
            scratch={} if work is None else work.scratch_bytes,
        )

    def _tokens(self, session: Session | None) -> tuple[int | None, int]:
        """(tokens of calibration at most, tokens of one sequence); None where that is not known."""
        calibrate = self._all.get("calibrate")
        if calibrate is None or session is None:
            done = Manifest.read(self._work.folder("calibrate"))
            length = 1 if done is None else int(done.settings.get("length") or 1)
            return (None if done is None else int(done.settings.get("sequences") or 0) * length), length
        length = text.fit_length(calibrate.length, session.config)
        limit = None if sees(session.config) else text_bytes(calibrate.data)  # images are tokens beside the text
        asked = calibrate.sequences * length
        return (asked if limit is None else min(asked, limit)), length


def check_work_dir(work_dir: Path) -> None:
    """Raises InputError for a work directory that cannot be made, or written to."""
    if work_dir.exists() and not work_dir.is_dir():
        raise InputError(f"--work-dir {work_dir} is a file. Name a directory.")
    above = next(folder for folder in (work_dir, *work_dir.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise InputError(f"--work-dir {work_dir}: {above} is a file, so nothing can be made in it. Name another place.")
    if not os.access(above, os.W_OK):
        raise InputError(f"--work-dir {work_dir}: {above} cannot be written to. Name a directory elsewhere.")


def check_target(out: str, work_dir: Path) -> None:
    """Raises InputError for a directory or file that export would refuse."""
    target = Path(out).expanduser().resolve()
    whole = work_dir.resolve()
    for name in (*FOLDERS.values(), VARIANTS):
        taken = whole / name
        if target == taken or taken in target.parents or target in taken.parents:
            raise InputError(f"--out {out} holds or lies in {taken}, which is read. Name a directory elsewhere.")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"--out {out}: {above} is a file, so nothing can be made in it. Name another place.")
    export_place(target).check_place()
