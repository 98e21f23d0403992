"""Weights are told apart by all their bytes, though no stage reads them before it begins to compute."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mc_cli import cli
from mc_cli.artifacts.files import content_digest, file_digest
from mc_cli.artifacts.store import MANIFEST, RESUME, STAGE_FOLDERS, Manifest
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError
from mc_cli.models.session import first_session, later_session
from mc_cli.models.weight_digests import RECORD, Weights
from mc_cli.settings import RunSettings
from tests.conftest import TinyModel
from tests.stage_process import StageProcess, run_whole
from tests.test_resume import digests
from tests.tiny_chain import run_allocate, run_calibrate, run_prune_eval, run_quantize, run_score, write_documents
from tests.tiny_models import shard

COMPUTE = RunSettings(device="cpu")
CHEAP = {"bits": (2, 3)}


@pytest.fixture
def place(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A folder with a model in three files, and text."""
    shard(tiny_model("mixtral", num_hidden_layers=3), tmp_path / "model", shards=3)
    write_documents(tmp_path / "text.jsonl", documents=24)
    return tmp_path


def weight_files(place: Path) -> list[Path]:
    return sorted((place / "model").glob("*.safetensors"))


def exchange(path: Path, *, keep_date: bool = True) -> bytes:
    """Other weights of the same size under the same header; what was there is handed back."""
    before, stat = path.read_bytes(), path.stat()
    begin = 8 + struct.unpack("<Q", before[:8])[0]
    path.write_bytes(
        before[:begin] + bytes(byte ^ 1 if place % 2 == 0 else byte for place, byte in enumerate(before[begin:]))
    )
    if keep_date:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return before


def manifest_of(place: Path, stage: str) -> Path:
    return place / "work" / STAGE_FOLDERS[stage] / MANIFEST


def test_calibrate_records_what_it_read(place: Path) -> None:
    run_calibrate(place / "work", place / "model", place / "text.jsonl")
    recorded = Weights.read(place / "work" / "calibration")
    assert recorded.digests == {path.name: file_digest(path) for path in weight_files(place)}
    assert RECORD in Manifest.read(place / "work" / "calibration").outputs  # type: ignore[union-attr]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_exchanged_weights_are_found_by_the_stage_that_reads_them(place: Path, which: int) -> None:
    run_calibrate(place / "work", place / "model", place / "text.jsonl")
    path = weight_files(place)[which]
    original = exchange(path)
    with pytest.raises(StaleArtifactError, match=f"not those that calibrate read:\n.*{path.name}: sha256"):
        run_score(place / "work", **CHEAP)
    assert not manifest_of(place, "score").exists()
    with pytest.raises(StaleArtifactError, match=f"made from other weights:\n.*{path.name}: sha256"):
        run_calibrate(place / "work", place / "model", place / "text.jsonl")
    path.write_bytes(original)
    assert not run_calibrate(place / "work", place / "model", place / "text.jsonl").ran
    assert run_score(place / "work", force=True, **CHEAP).ran


@pytest.mark.parametrize("stage", ["quantize", "prune-eval"])
def test_later_stages_find_them_too(place: Path, stage: str) -> None:
    run_calibrate(place / "work", place / "model", place / "text.jsonl")
    run_score(place / "work", **CHEAP)
    run_allocate(place / "work", target_stored_bits=3.2)
    if stage == "prune-eval":
        run_quantize(place / "work")
    (place / "work" / "digests.json").unlink()  # only a memory
    exchange(weight_files(place)[1], keep_date=False)
    heldout = write_documents(place / "heldout.jsonl", documents=12, offset=100)
    with pytest.raises(StaleArtifactError, match=f"not those that calibrate read:\n.*{weight_files(place)[1].name}"):
        run_quantize(place / "work") if stage == "quantize" else run_prune_eval(place / "work", heldout)
    assert not manifest_of(place, stage).exists()


def test_a_calibration_of_other_weights_makes_what_followed_stale(place: Path) -> None:
    run_calibrate(place / "work", place / "model", place / "text.jsonl")
    run_score(place / "work", **CHEAP)
    exchange(weight_files(place)[0])
    run_calibrate(place / "work", place / "model", place / "text.jsonl", force=True)
    with pytest.raises(StaleArtifactError, match="input weights: made with"):
        run_score(place / "work", **CHEAP)


def killed(place: Path, moment: str) -> None:
    """A calibration that was killed soon after that file appeared."""
    arguments = (run_calibrate, place / "work", place / "model", place / "text.jsonl")
    process = StageProcess(*arguments, pause_s=0.02)
    process.signal_after(place / "work" / "calibration" / moment, number=signal.SIGKILL, seed=1, within_s=0.01)


@pytest.mark.parametrize("moment", ["routing/layer_000.json", f"{RESUME}/gradient_before_2.safetensors"])
def test_a_resume_stops_at_other_weights_and_goes_on_with_its_own(place: Path, moment: str) -> None:
    run_whole(run_calibrate, place / "undisturbed", place / "model", place / "text.jsonl")
    killed(place, moment)
    path = weight_files(place)[0]
    original = exchange(path)
    before = digests(place / "work" / "calibration")
    with pytest.raises(StaleArtifactError, match=f"exchanged since this run began:\n.*{path.name}"):
        run_calibrate(place / "work", place / "model", place / "text.jsonl")
    assert digests(place / "work" / "calibration") == before
    path.write_bytes(original)  # with another date: told by its digest
    run_whole(run_calibrate, place / "work", place / "model", place / "text.jsonl")
    assert digests(place / "work" / "calibration") == digests(place / "undisturbed" / "calibration")


def test_weights_exchanged_under_a_running_stage_are_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_cli.stages import calibrate

    def exchanged(*arguments: object) -> None:
        forward(*arguments)
        exchange(weight_files(place)[2])

    forward = calibrate._forward
    monkeypatch.setattr(calibrate, "_forward", exchanged)
    with pytest.raises(StaleArtifactError, match=f"while this stage read them:\n.*{weight_files(place)[2].name}"):
        run_calibrate(place / "work", place / "model", place / "text.jsonl")
    assert not manifest_of(place, "calibrate").exists()


def test_a_date_alone_changes_nothing(place: Path) -> None:
    run_calibrate(place / "work", place / "model", place / "text.jsonl")
    for path in weight_files(place):
        os.utime(path, ns=(1, 1))
    assert not run_calibrate(place / "work", place / "model", place / "text.jsonl").ran
    assert run_score(place / "work", **CHEAP).ran


def test_identity_reads_headers_only(place: Path) -> None:
    """Files of a terabyte that hold nothing but holes: reading one would take an hour."""
    (place / "work").mkdir()
    session = first_session(place / "work", str(place / "model"), None, COMPUTE)
    plain = session.model_digest()
    for path in weight_files(place):
        os.truncate(path, 1 << 40)
    assert session.model_digest() != plain


@pytest.mark.parametrize(
    ("damaged", "content"), [(MANIFEST, "{"), (MANIFEST, "{}"), (RECORD, "{"), (RECORD, "{}"), (RECORD, None)]
)
def test_damage_is_told_and_force_mends_it(place: Path, damaged: str, content: str | None) -> None:
    run_calibrate(place / "work", place / "model", place / "text.jsonl")
    path = place / "work" / "calibration" / damaged
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises((ArtifactError, InputError), match="calibrat"):
        run_score(place / "work", **CHEAP)
    calibrate = ("calibrate", "--model", place / "model", "--data", place / "text.jsonl", "-w", place / "work")
    more = ("--sequences", 4, "--length", 24, "--force")
    result = CliRunner().invoke(cli.app, [str(each) for each in (*calibrate, *more)])
    assert result.exit_code == 0, result.stderr
    assert run_score(place / "work", **CHEAP).ran


def as_of_an_earlier_version(place: Path) -> None:
    """The finished calibration as it was made before weights had a record: one digest over all bytes."""
    folder = place / "work" / "calibration"
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / RECORD).unlink()
    del manifest["outputs"][RECORD]
    del manifest["record_sha256"]  # as manifests were then
    kinds = (".json", ".safetensors", ".model", ".tiktoken", ".txt", ".py")
    files = sorted(path for path in (place / "model").iterdir() if path.suffix in kinds)
    manifest["inputs"]["model"] = content_digest([[path.name, file_digest(path)] for path in files])
    named = {name: manifest[name] for name in ("stage", "schema", "settings", "inputs")}
    manifest["fingerprint"] = content_digest(named)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    shutil.rmtree(place / "work" / "digests.json", ignore_errors=True)


def test_a_calibration_of_an_earlier_version_is_read(place: Path) -> None:
    run_calibrate(place / "work", place / "model", place / "text.jsonl")
    as_of_an_earlier_version(place)
    assert not run_calibrate(place / "work", place / "model", place / "text.jsonl").ran
    assert run_score(place / "work", **CHEAP).ran
    assert "weights" not in json.loads(manifest_of(place, "score").read_text())["inputs"]
    exchange(weight_files(place)[1], keep_date=False)
    with pytest.raises(StaleArtifactError, match="are not those that calibrate read"):
        later_session(place / "work", COMPUTE).calibrated()


@pytest.mark.parametrize("stage", ["calibrate", "score"])
def test_a_model_that_was_copied_elsewhere_is_resumed(place: Path, stage: str) -> None:
    run_whole(run_calibrate, place / "undisturbed", place / "model", place / "text.jsonl")
    if stage == "score":
        run_whole(run_score, place / "undisturbed", **CHEAP)
        shutil.copytree(place / "undisturbed", place / "work", ignore=shutil.ignore_patterns("importance"))
        process = StageProcess(run_score, place / "work", pause_s=0.02, **CHEAP)
        moment = place / "work" / "importance" / RESUME / "layer_000.json"
        process.signal_after(moment, number=signal.SIGKILL, seed=1, within_s=0.01)
    else:
        killed(place, f"{RESUME}/gradient_before_2.safetensors")
    for path in weight_files(place):
        path.write_bytes(path.read_bytes())  # other dates
    if stage == "calibrate":
        run_whole(run_calibrate, place / "work", place / "model", place / "text.jsonl")
    else:
        run_whole(run_score, place / "work", **CHEAP)
    folder = STAGE_FOLDERS[stage]
    assert digests(place / "work" / folder) == digests(place / "undisturbed" / folder)
