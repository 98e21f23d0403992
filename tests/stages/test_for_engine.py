"""`--for llama.cpp` through all stages: its widths are scored beside others, planned by stack, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_cli import chain
from mc_cli.allocators.stacks import check_alike
from mc_cli.artifacts.calibration import INVENTORY, read_inventory
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.names import IMPORTANCE, PLAN
from mc_cli.artifacts.plan import BlockBits, Plan
from mc_cli.artifacts.store import as_planned, require_done
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import InputError, McError, PlanError, StaleArtifactError
from mc_cli.flags import build
from mc_cli.measuring.policy_checks import dropped_experts
from mc_cli.overview.sources import read_scores
from mc_cli.parts import Role
from mc_cli.progress import SilentProgress
from mc_cli.recipe import Recipe, plan_run
from mc_cli.settings import ENGINES, AllocateSettings, ExportSettings, PruneSettings, RunSettings, ScoreSettings
from mc_cli.stages import allocate, export, quantize, score
from mc_cli.status import work_dir_status
from mc_cli.verify import verified
from tests.conftest import TinyModel
from tests.tiny_chain import COMPUTE, run_calibrate, run_export, write_documents

ENGINE = {"engine": "llama.cpp"}
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 3, "num_hidden_layers": 2}
SILENT = {"force": False, "progress": SilentProgress()}


def test_the_whole_way(tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    work = tmp_path / "work"
    run_calibrate(work, tiny_model("mixtral", **SMALL), write_documents(tmp_path / "text.jsonl", documents=30))
    scored = score.run(build("score", {**ENGINE, "bits": (2, 4), "sweeps": 0}), COMPUTE, work, **SILENT)
    assert scored.folder == work / "importance.llama.cpp" and not (work / "importance").exists()
    assert Importance.read(scored.folder / IMPORTANCE).quantizer == "gguf"
    with pytest.raises(McError, match=r"mc-cli score"):
        allocate.run(build("allocate", {"target_stored_bits": 3.5}), COMPUTE, work, **SILENT)
    allocate.run(build("allocate", {**ENGINE, "target_stored_bits": 3.5}), COMPUTE, work, **SILENT)
    plan = Plan.read(work / "plan" / PLAN)
    assert plan.family == "gguf" and plan.objective["predicted_loss"] >= plan.objective["predicted_loss_of_free_plan"]
    assert all(entry == row[0] for row in plan.expert_bits.values() for entry in row)
    followed = chain.followed_settings("quantize", WorkDir(work))
    assert followed["quantizer"] == "gguf" and followed["sweeps"] == 0
    quantize.run(build("quantize", followed), COMPUTE, work, **SILENT)
    found = run_export(work, tmp_path / "out", "gguf").summary["read_back"]
    assert found["same_top_token"] == 1 and (tmp_path / "out" / "model.gguf").is_file()
    whole = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    sized = build("allocate", {**ENGINE, "target_size_bytes": whole + 4096})
    allocate.run(sized, COMPUTE, work, variant="sized", **SILENT)
    quantize.run(build("quantize", followed), COMPUTE, work, variant="sized", **SILENT)
    warnings = run_export(work, tmp_path / "sized", "gguf", variant="sized").warnings
    assert not any("--target-size" in text for text in warnings)
    assert sum(path.stat().st_size for path in (tmp_path / "sized").iterdir()) <= whole + 4096
    inventory = read_inventory(work / "calibration" / INVENTORY)  # there are no scores but those for llama.cpp
    dropping = PruneSettings(policy=("all",), drop_experts=0.34)
    assert any(dropped_experts(dropping, WorkDir(work), inventory).values())


@pytest.fixture(scope="module")
def calibrated(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with scores for no engine, of a model of which all rows are multiples of 64."""
    work = tmp_path_factory.mktemp("calibrated") / "work"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 3, "num_hidden_layers": 2}
    run_calibrate(work, tiny_model("mixtral", **sizes), write_documents(work.parent / "text.jsonl", documents=30))
    score.run(build("score", {"bits": (2, 4), "sweeps": 0}), COMPUTE, work, **SILENT)
    return work


@pytest.mark.parametrize(
    ("engine", "bits", "target", "widths"),
    [("mlx", (2, 4), 3.5, {2, 4}), ("gptq", (2, 3, 4), 3.3, {2, 3, 4}), ("compressed-tensors", (4, 8), 4.3, {4})],
)
def test_the_whole_way_to_other_formats(
    engine: str, bits: tuple[int, ...], target: float, widths: set[int], calibrated: Path, tmp_path: Path
) -> None:
    asked = {"engine": engine}
    score.run(build("score", {**asked, "bits": bits, "sweeps": 0}), COMPUTE, calibrated, **SILENT)
    settings = build("allocate", {**asked, "target_stored_bits": target})
    allocate.run(settings, COMPUTE, calibrated, variant=engine, **SILENT)
    work = WorkDir(calibrated, engine)
    plan = Plan.read(work.folder("allocate") / PLAN)
    each = [entry if isinstance(entry, dict) else {"": entry} for row in plan.expert_bits.values() for entry in row]
    assert {bits for entry in each for bits in entry.values()} == widths
    check_alike(plan, engine)
    followed = chain.followed_settings("quantize", work)
    quantize.run(build("quantize", followed), COMPUTE, calibrated, variant=engine, **SILENT)
    given = ExportSettings(format=ENGINES[engine].format, out=str(tmp_path / "out"))
    found = export.run(given, RunSettings(dtype="float32"), calibrated, variant=engine, **SILENT).summary["read_back"]
    assert found["same_top_token"] == 1 and found["logit_error_max"] < 1e-3
    asked_size = 2 * sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    sized = build("allocate", {**asked, "target_size_bytes": asked_size})
    allocate.run(sized, COMPUTE, calibrated, variant=f"{engine}-sized", **SILENT)
    quantize.run(build("quantize", followed), COMPUTE, calibrated, variant=f"{engine}-sized", **SILENT)
    run_export(calibrated, tmp_path / "sized", ENGINES[engine].format, variant=f"{engine}-sized")
    assert sum(path.stat().st_size for path in (tmp_path / "sized").iterdir()) <= asked_size
    there = [entry for entry in work_dir_status(calibrated, variant=engine) if entry.state == "done"]
    assert {f"score --for {engine}", "score", "allocate", "quantize"} <= {entry.name for entry in there}
    assert f"score --for {engine}" in {entry.what for entry in verified(calibrated)}
    scores = read_scores(as_planned(work))
    assert scores.engine == engine and scores.importance.quantizer == ENGINES[engine].quantizer


def test_scores_for_an_engine_that_were_made_anew_make_its_plan_stale(calibrated: Path) -> None:
    score.run(build("score", {"engine": "mlx", "bits": (2, 4), "sweeps": 0}), COMPUTE, calibrated, **SILENT)
    settings = build("allocate", {"engine": "mlx", "target_stored_bits": 3.5})
    allocate.run(settings, COMPUTE, calibrated, variant="anew", **SILENT)
    again = {"force": True, "progress": SilentProgress()}
    score.run(build("score", {"engine": "mlx", "bits": (2, 3, 4), "sweeps": 0}), COMPUTE, calibrated, **again)
    [entry] = [entry for entry in work_dir_status(calibrated, variant="anew") if entry.stage == "allocate"]
    assert (entry.state, entry.detail) == ("stale", "score was made anew since")
    with pytest.raises(StaleArtifactError, match=r"mc-cli allocate -w .* --variant anew --for mlx --force"):
        require_done(WorkDir(calibrated, "anew"), "allocate")


def test_what_the_engine_cannot_hold_is_told_before_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    text = write_documents(tmp_path / "text.jsonl", documents=30)
    sections = {
        "calibrate": {"model": str(tiny_model("phimoe")), "data": str(text)},
        **{name: dict(ENGINE) for name in ("score", "allocate", "quantize")},
        "export": {"out": str(tmp_path / "out")},
    }
    sections["allocate"]["target_stored_bits"] = 4.5
    plan = plan_run(Recipe(sections, str(tmp_path / "work")))
    with pytest.raises(McError) as caught:
        chain.look_ahead(plan.stages, plan.compute, plan.work, todo=tuple(plan.stages))
    assert "'phimoe' cannot be exported as GGUF" in str(caught.value)
    assert "layers.0.mlp.experts.down_proj: rows of 48 weights" in str(caught.value)


def test_quantize_for_another_engine_is_refused() -> None:
    with pytest.raises(PlanError, match=r"--for llama\.cpp: the plan in .* was made for no engine"):
        quantize._check_engine("llama.cpp", None, WorkDir(Path("w")))


@pytest.mark.parametrize(
    ("engine", "rows", "words"),
    [
        ("mlx", {0: (2, 2), 1: (3, 4)}, "layer 1: 3, 4 bits"),
        ("llama.cpp", {0: ({"up": 2, "down": 3}, {"up": 2, "down": 4})}, "layer 0 down: 3, 4 bits"),
        ("compressed-tensors", {0: (4, 4), 1: (8, 8)}, "experts: 4, 8 bits"),
        ("gptq", {0: (0, 4)}, "layer 0: experts are dropped, shared or in blocks"),
        ("mlx", {0: (4, (BlockBits(8, 4), BlockBits(8, 2)))}, "in blocks of channels"),
    ],
)
def test_a_plan_that_the_engine_cannot_hold_is_refused(engine: str, rows: dict[int, tuple], words: str) -> None:
    plan = Plan("mixtral", "by hand", rows, {})
    with pytest.raises(PlanError, match=rf"(?s)that {engine} cannot hold.*{words}"):
        check_alike(plan, engine)
    check_alike(plan, None)
    for fine in ({0: (2, 4)}, {0: ({"up": 2, "down": 3}, 4)}):
        check_alike(Plan("mixtral", "by hand", fine, {}), "gptq")
    check_alike(Plan("mixtral", "by hand", {0: ({"up": 2, "down": 3},) * 2, 1: (4, 4)}, {}), "mlx")


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(InputError, match=r"--quantizer gptq: llama\.cpp reads what --quantizer gguf makes"):
        build("score", {**ENGINE, "quantizer": "gptq"})
    with pytest.raises(InputError, match=r"--bits 0: llama\.cpp"):
        build("score", {**ENGINE, "bits": (0, 2, 4)})
    with pytest.raises(InputError, match="neither dropped, cut nor merged"):
        build("allocate", {**ENGINE, "cut_ratio": 0.2})
    for blocks, flag in (({"halves": True}, "--halves"), ({"method": "camera-q"}, "--method camera-q")):
        with pytest.raises(InputError, match=rf"{flag}: llama\.cpp has one width for all channels"):
            build("allocate", {**ENGINE, **blocks, "target_stored_bits": 3.0})


def test_formats_have_widths_of_their_own() -> None:
    assert build("score", {"engine": "mlx"}).bits == (2, 3, 4)
    assert build("score", {"engine": "compressed-tensors"}).bits == (4, 8)
    for engine, bits in (("mlx", 7), ("gptq", 5), ("compressed-tensors", 3), ("gptq", 2.5)):
        with pytest.raises(InputError, match=rf"--bits {bits}"):
            build("score", {"engine": engine, "bits": (bits,)})
    budget = {"target_stored_bits": 2.6}
    roles = {engine: build("allocate", {**budget, "engine": engine}).role_bits(2.6) for engine in sorted(ENGINES)}
    assert roles["mlx"] == {**roles["llama.cpp"], Role.ATTENTION: 6, Role.SHARED: 6, Role.DENSE: 6}
    kept = {Role.ROUTER: 16, Role.HEAD: 16, Role.EMBEDDING: 16}
    for engine in ("gptq", "compressed-tensors"):
        assert roles[engine] == {Role.ATTENTION: 8, Role.SHARED: 8, Role.DENSE: 8, **kept}
    alike = build("allocate", {**budget, "engine": "compressed-tensors", "attention_bits": 4}).role_bits(2.6)
    assert alike == {Role.ATTENTION: 4, Role.SHARED: 4, Role.DENSE: 4, **kept}
    for engine, given, words in (
        ("gptq", {"embedding_bits": 8}, "--embedding-bits 8: gptq keeps that at 16 bits"),
        ("mlx", {"attention_bits": 7}, "--attention-bits 7: mlx has 2, 3, 4, 5, 6, 8 and 16"),
        ("mlx", {"router_bits": 8}, "--router-bits 8: mlx keeps that"),
        ("compressed-tensors", {"attention_bits": 4, "shared_bits": 8}, "has one width for all of that"),
        ("compressed-tensors", {"bits": (3, 4)}, "--bits 3: compressed-tensors has experts of 4 or 8 bits"),
    ):
        with pytest.raises(InputError, match=words):
            build("allocate", {**budget, "engine": engine, **given})


def test_whole_widths_are_ints_whoever_gives_them() -> None:
    for settings in (ScoreSettings(bits=(1.5, 2.0)), AllocateSettings(target_bits=2.0, bits=(1.5, 2.0))):
        assert [repr(width) for width in settings.bits or ()] == ["1.5", "2"]


def test_without_an_engine_nothing_of_it_is_in_fingerprints() -> None:
    assert "engine" not in ScoreSettings().resolved()
    assert "engine" not in build("allocate", {"target_bits": 2.0}).resolved()
    assert "engine" not in build("quantize", ENGINE).resolved()


def test_run_gives_every_stage_what_the_engine_needs() -> None:
    sections = {name: dict(ENGINE) for name in ("score", "allocate", "quantize")}
    sections["calibrate"] = {"model": "m", "data": "d"}
    sections["allocate"]["target_stored_bits"] = 2.5
    sections["export"] = {"out": "o"}
    plan = plan_run(Recipe(sections, "w"))
    assert plan.stages["score"].quantizer.quantizer == plan.stages["quantize"].quantizer.quantizer == "gguf"
    assert plan.stages["export"].format == "gguf" and plan.work.engine == "llama.cpp"
    assert plan.stages["score"].bits == (2.0625, 2.3125, 2.5625, 3.0625, 3.4375, 4.25)


def test_a_budget_below_what_rows_allow_names_them(calibrated: Path) -> None:
    """Rows of 64 weights have no type of llama.cpp below 4.5 bits, whatever width is asked for."""
    pytest.importorskip("gguf")
    score.run(build("score", {**ENGINE, "bits": (2.0625, 4.25), "sweeps": 0}), COMPUTE, calibrated, **SILENT)
    with pytest.raises(McError) as caught:
        settings = build("allocate", {**ENGINE, "target_stored_bits": 3.0})
        allocate.run(settings, COMPUTE, calibrated, variant="narrow", **SILENT)
    said = str(caught.value)
    assert "gate_up_proj: 4.5 bits at width 2.0625" in said and "narrower candidate" not in said
