"""Several results in one work directory: variants over one calibration and one set of scores."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.export_record import ExportRecord
from mc_cli.artifacts.store import BEGUN, MANIFEST, RESUME, Manifest
from mc_cli.artifacts.work_dir import MAIN, WorkDir
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, QuantizerSettings
from mc_cli.stages import export
from mc_cli.status import work_dir_status
from tests.conftest import TinyModel
from tests.stage_process import StageProcess, run_whole
from tests.tiny_chain import (
    COMPUTE,
    run_allocate,
    run_calibrate,
    run_prune_eval,
    run_quantize,
    run_score,
    write_documents,
)

CHEAP = QuantizerSettings(quantizer="rtn")
SMALL = "2.5-bits"
Place = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """(a work directory with a finished `main` and a finished, smaller variant, held-out text)."""
    folder = tmp_path_factory.mktemp("variants")
    work_dir, held = folder / "work", write_documents(folder / "held.jsonl", documents=24, offset=500)
    run_calibrate(work_dir, tiny_model("mixtral"), write_documents(folder / "text.jsonl", documents=24))
    run_score(work_dir, bits=(2, 3, 4), quantizer=CHEAP)
    for variant, target in ((MAIN, 3.6), (SMALL, 2.8)):
        run_allocate(work_dir, variant=variant, target_stored_bits=target)
        run_quantize(work_dir, variant=variant, quantizer=CHEAP)
        run_prune_eval(work_dir, held, variant=variant)
    return work_dir, held


@pytest.fixture
def copied(made: Place, tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "work")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def do_export(work_dir: Path, out: Path, variant: str, *, force: bool = False) -> Any:
    settings = ExportSettings(out=str(out))
    return export.run(settings, COMPUTE, work_dir, variant=variant, force=force, progress=SilentProgress())


def test_two_results_lie_side_by_side(made: Place) -> None:
    work_dir, _ = made
    main, small = WorkDir(work_dir), WorkDir(work_dir, SMALL)
    assert main.folder("quantize") == work_dir / "packed"
    assert small.folder("quantize") == work_dir / "variants" / SMALL / "packed"
    assert small.folder("calibrate") == main.folder("calibrate") and small.folder("score") == main.folder("score")
    sizes = {}
    for work in (main, small):
        found = Evaluation.read(work.folder("prune-eval") / "eval.json")
        sizes[work.variant] = found.expert_stored_bits
        packed, plan = (Manifest.read(work.folder(stage)) for stage in ("quantize", "allocate"))
        assert packed is not None and plan is not None and packed.inputs["allocate"] == plan.fingerprint
    assert sizes[SMALL] < 2.9 < sizes[MAIN]


def test_a_name_changes_no_byte(copied: Path) -> None:
    run_allocate(copied, variant="same", target_stored_bits=3.6)
    run_quantize(copied, variant="same", quantizer=CHEAP)
    for name in ("plan", "packed"):
        assert digests(copied / "variants" / "same" / name) == digests(copied / name)
    plan = copied / "variants" / SMALL / "plan" / "plan.yaml"
    run_quantize(copied, variant="by-plan", quantizer=CHEAP, plan=str(plan))  # without one of its own
    packed = copied / "variants" / "by-plan" / "packed"
    tensors = {path.name for path in packed.glob("*.safetensors")}
    assert tensors and all(digests(packed)[n] == digests(copied / "variants" / SMALL / "packed")[n] for n in tensors)


def test_a_variant_that_is_made_anew_leaves_the_others(copied: Path, made: Place) -> None:
    before = digests(copied)
    with pytest.raises(StaleArtifactError, match="target_stored_bits"):
        run_allocate(copied, variant=SMALL, target_stored_bits=3.0)
    run_allocate(copied, variant=SMALL, target_stored_bits=3.0, force=True)
    with pytest.raises(StaleArtifactError, match=f"mc-cli quantize -w {copied} --variant {SMALL} --force"):
        run_prune_eval(copied, made[1], variant=SMALL)
    after = digests(copied)
    own = f"variants/{SMALL}/"
    assert {name: after.get(name) for name in before if not name.startswith(own)} == {
        name: digest for name, digest in before.items() if not name.startswith(own)
    }
    assert not run_prune_eval(copied, made[1]).ran, "main is as it was"


def test_a_variant_reads_no_plan_but_its_own(copied: Path, made: Place) -> None:
    shutil.rmtree(copied / "plan")
    shutil.rmtree(copied / "packed")
    shutil.rmtree(copied / "evaluation")
    assert not run_quantize(copied, variant=SMALL, quantizer=CHEAP).ran
    run_prune_eval(copied, made[1], variant=SMALL, force=True)
    with pytest.raises(InputError, match=rf"plan does not exist.*name another variant with --variant: {SMALL}\."):
        run_quantize(copied, quantizer=CHEAP)
    (copied / "variants" / SMALL / "plan" / "plan.yaml").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match=f"mc-cli allocate -w {copied} --variant {SMALL} --force"):
        run_quantize(copied, variant=SMALL, quantizer=CHEAP, force=True)


def test_an_unknown_variant_is_told_with_those_that_there_are(copied: Path, made: Place, tmp_path: Path) -> None:
    before = digests(copied)
    known = f"has no variant 'smal' yet, it has main, {SMALL}\\."
    for call in (
        lambda: run_quantize(copied, variant="smal"),
        lambda: run_prune_eval(copied, made[1], variant="smal"),
        lambda: do_export(copied, tmp_path / "out", "smal"),
    ):
        with pytest.raises(InputError, match=known) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=rf"no variant 'smal'; it has main, {SMALL}"):
        work_dir_status(copied, variant="smal")
    assert digests(copied) == before and not (copied / "variants" / "smal").exists()


BAD = ["", ".", "..", "a/b", "../x", "/x", "a..b", "-a", "a.", "a b", "a\0", "ä", "a_b", "x" * 65]
TAKEN = ["packed", "Plan", "variants", "pruning", "MAIN", "x.partial", "x.removed", "x.replaced"]


@pytest.mark.parametrize("name", [*BAD, *TAKEN])
def test_names_that_no_variant_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--variant"):
        WorkDir(tmp_path, name)


@pytest.mark.parametrize("name", ["main", "a", "2.5", "Small-2.5-bits", "x" * 64])
def test_names_that_are_fine(name: str, tmp_path: Path) -> None:
    assert WorkDir(tmp_path, name).variant == name


def test_a_killed_variant_goes_on_with_the_same_bytes(made: Place, copied: Path) -> None:
    packed = copied / "variants" / "again" / "packed"
    plan = str(copied / "variants" / SMALL / "plan" / "plan.yaml")
    asked = {"variant": "again", "quantizer": CHEAP, "plan": plan}
    killed = StageProcess(run_quantize, copied, pause_s=0.05, **asked).signal_after(
        packed / "layer_000.safetensors", number=signal.SIGKILL, seed=1, within_s=0.0
    )
    assert killed.exit_code == -signal.SIGKILL and not (packed / MANIFEST).exists()
    [entry] = [e for e in work_dir_status(copied, variant="again") if e.stage == "quantize"]
    assert entry.state == "begun" and entry.variant == "again"
    assert not run_quantize(copied, quantizer=CHEAP).ran, "another variant is none of its concern"
    run_whole(run_quantize, copied, **asked)
    whole = digests(packed)
    assert not any(name.startswith((BEGUN, RESUME)) for name in whole)
    run_whole(run_quantize, copied, force=True, **asked)
    assert digests(packed) == whole


def test_leftovers_of_a_variant_are_tidied_and_foreign_ones_refused(copied: Path) -> None:
    place = copied / "variants" / SMALL
    (place / "plan" / "plan.yaml.partial").mkdir()
    removed = place / "plan.removed"
    removed.mkdir()
    (removed / BEGUN).write_text("{}", encoding="utf-8")
    assert not run_allocate(copied, variant=SMALL, target_stored_bits=2.8).ran
    assert not removed.exists() and not (place / "plan" / "plan.yaml.partial").exists()
    foreign = copied / "variants" / "mine" / "plan"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"neither manifest\.json nor begun\.json of ours"):
        run_allocate(copied, variant="mine", target_stored_bits=3.0, force=True)
    assert (foreign / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_exports_record_their_variant_and_status_lists_all(copied: Path, tmp_path: Path) -> None:
    do_export(copied, tmp_path / "large", MAIN)
    do_export(copied, tmp_path / "small", SMALL)
    records = {name: ExportRecord.read(tmp_path / name) for name in ("large", "small")}
    assert [record.variant for record in records.values() if record is not None] == [MAIN, SMALL]
    assert "variant" not in json.loads((tmp_path / "large" / "mc_cli.json").read_text(encoding="utf-8"))
    rows = [(entry.variant, entry.stage, entry.state) for entry in work_dir_status(copied)]
    stages = ("allocate", "quantize", "prune-eval", "export")
    assert rows == [
        *((None, stage, "done") for stage in ("calibrate", "score")),
        *((variant, stage, "done") for variant in (MAIN, SMALL) for stage in stages),
    ]
    assert {entry.variant for entry in work_dir_status(copied, variant=SMALL)} == {None, SMALL}
    details = {entry.variant: entry.detail for entry in work_dir_status(copied) if entry.stage == "export"}
    assert details == {MAIN: str(tmp_path / "large"), SMALL: str(tmp_path / "small")}
    with pytest.raises(InputError, match="which is read"):
        do_export(copied, copied / "variants" / "mine", MAIN)
    with pytest.raises(StaleArtifactError, match="input quantize"):
        do_export(copied, tmp_path / "large", SMALL)
    do_export(copied, tmp_path / "large", SMALL, force=True)
    shutil.rmtree(copied / "variants" / SMALL)
    gone = {entry.stage: entry.state for entry in work_dir_status(copied, variant=SMALL)}
    assert gone["quantize"] == "to do" and gone["export"] == "stale"
