"""Targets in bytes hold for the files that quantize writes, and a target out of reach says what is in reach."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mc_cli.allocators import solver
from mc_cli.allocators.beside import WIDTHS
from mc_cli.artifacts.calibration import INVENTORY, read_inventory
from mc_cli.artifacts.names import POINTER
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import BudgetError, InputError
from mc_cli.models.companions import noted_folder
from mc_cli.parts import Role
from mc_cli.settings import AllocateSettings
from mc_cli.stages.allocate import with_directory
from tests.conftest import ScoredWork, TinyModel
from tests.tiny_chain import (
    run_allocate,
    run_calibrate,
    run_export,
    run_prune_eval,
    run_quantize,
    run_score,
    write_documents,
)


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3", "gpt_oss"])
def scored(request: pytest.FixtureRequest, scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    scored_work(folder, request.param)
    return folder / "work"


def plan_of(work_dir: Path) -> Plan:
    return Plan.read(work_dir / "plan" / "plan.yaml")


def beside_tensors(work_dir: Path) -> int:
    """Bytes that allocate takes a directory to hold beside its tensors."""
    inventory = read_inventory(work_dir / "calibration" / INVENTORY)
    return with_directory(inventory, WorkDir(work_dir)).directory_bytes


def test_target_size_holds_for_the_exported_directory(scored: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    run_allocate(work_dir, target_stored_bits=3.0)
    free = plan_of(work_dir).budget
    assert "directory_bytes" not in free
    tensors = free["other_bytes"] + free["expert_bytes"]
    asked = tensors + beside_tensors(work_dir)
    options = {"target_stored_bits": None, "target_size_bytes": asked, "head_bits": 16, "router_bits": 8}
    run_allocate(work_dir, force=True, **options)
    plan = plan_of(work_dir)
    assert plan.budget["asked_file_bytes"] == asked
    run_quantize(work_dir)
    files = sum(path.stat().st_size for path in (work_dir / "packed").glob("*.safetensors"))
    assert 0.75 * tensors < files <= tensors
    expert_bytes = plan.budget["expert_bytes"]
    assert expert_bytes + plan.budget["other_bytes"] + plan.budget["directory_bytes"] <= asked
    run_prune_eval(work_dir, write_documents(tmp_path / "heldout.jsonl", documents=12, offset=50))
    assert not run_export(work_dir, tmp_path / "model", "transformers").warnings
    whole = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert files < whole <= asked


def test_an_export_that_is_larger_than_was_asked_for_says_so(scored: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    model = noted_folder(work_dir)
    assert model is not None
    copied = Path(shutil.copytree(model, tmp_path / "original"))
    (work_dir / POINTER).write_text(json.dumps({"folder": str(copied)}), encoding="utf-8")
    asked = 4 * beside_tensors(work_dir)
    run_allocate(work_dir, target_stored_bits=None, target_size_bytes=asked)
    (copied / "LICENSE").write_bytes(b"x" * asked)  # travels, and came after allocate
    run_quantize(work_dir)
    warnings = run_export(work_dir, tmp_path / "model", "transformers").warnings
    assert any(f"--target-size {asked:,}: the directory has" in text for text in warnings), warnings


def test_a_size_is_of_the_tensors_alone_where_the_model_has_gone(scored: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    (work_dir / POINTER).write_text(json.dumps({"folder": str(tmp_path / "gone")}), encoding="utf-8")
    asked = 4 * beside_tensors(scored)
    found = run_allocate(work_dir, target_stored_bits=None, target_size_bytes=asked)
    assert plan_of(work_dir).budget["directory_bytes"] == 0
    assert any("counts the tensors alone here" in text for text in found.warnings)


def test_target_out_of_reach_says_what_is_feasible(scored: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    with pytest.raises(BudgetError, match=r"cannot be met: .* the experts take 1\.\d+ to 4\.\d+ stored bits"):
        run_allocate(work_dir, target_stored_bits=1.01)
    with pytest.raises(BudgetError, match="leaves nothing for the experts") as caught:
        run_allocate(work_dir, target_stored_bits=None, target_size_bytes=1000)
    found = re.search(r"\(([0-9,]+) to [0-9,]+ with the rest of the model\)", str(caught.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    other = Path(shutil.copytree(scored, tmp_path / "other"))
    assert run_allocate(other, target_stored_bits=None, target_size_bytes=least).ran
    assert run_allocate(work_dir, target_stored_bits=3.0).ran, "the right target needs no --force afterwards"


def test_a_target_size_out_of_reach_is_told_as_the_size_of_the_files(scored: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    narrowest = dict.fromkeys(("attention_bits", "shared_bits", "head_bits", "embedding_bits"), min(WIDTHS))
    run_allocate(work_dir, target_stored_bits=2.0, **narrowest)
    asked = plan_of(work_dir).budget["other_bytes"] + beside_tensors(work_dir) + 10
    with pytest.raises(
        BudgetError, match=rf"10 bytes for all experts \({asked:,} with the rest of the model\)"
    ) as error:
        run_allocate(work_dir, target_stored_bits=None, target_size_bytes=asked, force=True)
    least = re.search(r"experts take .*\(([0-9,]+) to [0-9,]+ with the rest of the model\)", str(error.value))
    assert least is not None
    reached = int(least[1].replace(",", ""))
    assert run_allocate(work_dir, target_stored_bits=None, target_size_bytes=reached, force=True).ran
    with pytest.raises(BudgetError):
        run_allocate(work_dir, target_stored_bits=None, target_size_bytes=reached - 1, force=True)


def test_borders_belong_to_the_narrower_width() -> None:
    settings = AllocateSettings(target_stored_bits=2.0)
    for role, widths in {
        Role.ATTENTION: [5, 5, 5, 5, 6, 6, 8],
        Role.SHARED: [5, 5, 5, 5, 6, 6, 8],
        Role.HEAD: [6, 6, 6, 6, 6, 6, 8],
        Role.EMBEDDING: [6, 6, 6, 6, 8, 8, 8],
    }.items():
        assert [settings.role_bits(bits)[role] for bits in (0, 1.75, 1.751, 2.5, 2.501, 2.75, 2.751)] == widths


@pytest.mark.parametrize(("bits", "beside"), [(2.0, 5), (2.4, 5), (2.6, 6), (3.0, 8), (3.6, 8)])
def test_attention_is_as_wide_as_pays_beside_such_experts(
    scored: Path, tmp_path: Path, bits: float, beside: int
) -> None:
    """The same for stored bits and for the size in bytes that they come to, where nothing is known of other costs."""
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    run_score(work_dir, roles=False, force=True)
    run_allocate(work_dir, target_stored_bits=bits)
    plan = plan_of(work_dir)
    assert plan.role_bits[Role.ATTENTION] == plan.role_bits.get(Role.SHARED, beside) == beside
    has_shared = plan.model_type == "deepseek_v3"
    assert (Role.SHARED in plan.role_bits) == has_shared
    size = plan.budget["other_bytes"] + int(bits * plan.budget["expert_weights"] / 8) + beside_tensors(work_dir)
    for asked, expected in ((size + 8, beside), (size * 4, 8)):
        run_allocate(work_dir, target_stored_bits=None, target_size_bytes=asked, force=True)
        assert plan_of(work_dir).role_bits[Role.ATTENTION] == expected
    run_allocate(work_dir, target_stored_bits=bits, attention_bits=4, shared_bits=7, force=True)
    widths = plan_of(work_dir).role_bits
    assert widths[Role.ATTENTION] == 4 and widths.get(Role.SHARED) == (7 if has_shared else None)


def test_a_size_of_the_whole_goes_where_a_byte_saves_most(scored: Path, tmp_path: Path) -> None:
    """No plan with other widths beside the experts, of the same size, is predicted to lose less by more than a step."""
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    run_allocate(work_dir, target_stored_bits=2.4)
    asked = {"target_stored_bits": None, "target_size_bytes": _size_of(plan_of(work_dir), work_dir), "force": True}
    run_allocate(work_dir, **asked)
    ours = plan_of(work_dir).objective["predicted_loss_of_model"]
    for bits in WIDTHS:
        others = dict.fromkeys(("attention_bits", "shared_bits", "head_bits", "embedding_bits"), bits)
        with suppress(BudgetError):
            run_allocate(work_dir, **asked, **others)
            assert ours <= plan_of(work_dir).objective["predicted_loss_of_model"] * 1.02
    run_allocate(work_dir, **asked, attention_bits=7)
    assert plan_of(work_dir).role_bits[Role.ATTENTION] == 7, "a width that was given stays"
    with pytest.raises(InputError, match="Not every candidate width asked for"):
        run_allocate(work_dir, **asked, bits=(2, 2.5))


def _size_of(plan: Plan, work_dir: Path) -> int:
    return int(plan.budget["other_bytes"] + plan.budget["expert_bytes"] + beside_tensors(work_dir))


@pytest.mark.parametrize(("method", "gaps"), [("pmq", {0.0}), ("global", {1e-4})])
def test_the_gap_is_the_methods_own(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, gaps: set[float]
) -> None:
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    used: set[float] = set()

    def search(problem: Any, table: Any, ground: Any, gap: float, settings: Any, real: Any = solver._search) -> Any:
        used.add(gap)
        return real(problem, table, ground, gap, settings)

    monkeypatch.setattr(solver, "_search", search)
    run_allocate(work_dir, method=method)
    assert used == gaps
    run_allocate(work_dir, method=method, gap=0.01, force=True)
    assert used == gaps | {0.01}


def test_group_size_follows_score(tiny_model: TinyModel, tmp_path: Path) -> None:
    from mc_cli.settings import QuantizerSettings

    work_dir = tmp_path / "work"
    run_calibrate(work_dir, tiny_model("mixtral"), write_documents(tmp_path / "text.jsonl", documents=24))
    run_score(work_dir, bits=(2, 4), quantizer=QuantizerSettings(quantizer="rtn", group_size=16))
    run_allocate(work_dir, target_stored_bits=4.5)
    assert plan_of(work_dir).group_size_limit == 16
    run_quantize(work_dir, quantizer=QuantizerSettings(quantizer="rtn", group_size=16))
    layout = (work_dir / "packed" / "layout.json").read_text(encoding="utf-8")
    assert "_g16" in layout and "_g32" not in layout


def test_widths_of_parts_that_a_model_has_not_are_told(scored: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(scored, tmp_path / "work"))
    roles = {part.role for part in read_inventory(work_dir / "calibration" / INVENTORY).tensors}
    run_allocate(work_dir, target_stored_bits=2.4, shared_bits=4, dense_bits=4)
    told = [message for message in plan_of(work_dir).warnings if "bits" in message and "nothing" in message]
    assert bool(told) is not ({Role.SHARED, Role.DENSE} <= roles)
    words = "has no shared experts and no MLPs of layers without experts."
    flags = "--shared-bits and --dense-bits change nothing"
    assert not told or told == [f"{flags}: {plan_of(work_dir).model_type} {words}"]
