"""The table of families, and of some that stand for others that they stream, pack and load whole.

`make test-families` takes every family through all stages; here packed models are made by plain rounding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig
from typer.testing import CliRunner

from mc_cli.cli import app
from mc_cli.data.batches import Batch
from mc_cli.errors import FamilyError
from mc_cli.exporters.reading import open_with_transformers
from mc_cli.families import OUT_OF_SCOPE, facts_for, read_outcomes
from mc_cli.measuring.logit_source import Reading, Walked
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.inventory import take_inventory
from mc_cli.models.model_class import model_class
from mc_cli.packed.packed_model import PackedSource
from mc_cli.parts import Role
from mc_cli.reports.families import families_table
from tests.families.contract import (
    ROUNDING,
    TOKENS,
    relative,
    shapes,
    through_all_stages,
    walked_logits,
    whole_logits,
)
from tests.families.tiny_families import IMAGE_TEXT, TEXT, build_tiny_family
from tests.packed_folders import packed_work_dir
from tests.tiny_chain import run_export

# One of each kind of difference: a tower with experts, experts of images, own experts, hybrids, hyper-connections.
REPRESENTATIVE = ("bailing_hybrid", "deepseek_v4", "dots3_note", "ernie4_5_vl_moe", "llama4", "qwen3_5_moe", "step3p7")
CPU = torch.device("cpu")


def test_every_family_with_experts_in_transformers_has_a_tiny_checkpoint() -> None:
    named = " ".join((*TEXT, *IMAGE_TEXT))
    for folder in sorted((Path(transformers.__file__).parent / "models").iterdir()):
        code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))
        if re.search(r"use_experts_implementation|^class \w*(Experts|SparseMLP)\w*\(", code, re.MULTILINE):
            found = re.search(rf"\b{folder.name}(_text|_thinker|_mm_model)?\b", named)
            assert found or folder.name in OUT_OF_SCOPE, folder.name


def test_families_of_the_table_work_or_say_why_not() -> None:
    release, outcomes = read_outcomes()
    assert release == transformers.__version__
    assert [each.family for each in outcomes] == [
        family for family in (*TEXT, *IMAGE_TEXT) if family in {each.family for each in outcomes}
    ]
    for each in outcomes:
        assert each.works == (not each.reason) == (not facts_for(each.family).refused), each
        assert each.images == (each.kind == "image-text"), each
        if each.works:
            assert each.packed_error is not None and each.packed_error <= 1e-4
            assert each.dense_error is not None and each.dense_error <= 0.2


def test_the_command_prints_the_table() -> None:
    found = CliRunner().invoke(app, ["families"])
    assert found.exit_code == 0
    assert all(f" {each.family} " in found.stdout for each in read_outcomes()[1])
    assert all(f" {family} " in found.stdout for family in OUT_OF_SCOPE)
    rows = json.loads(CliRunner().invoke(app, ["families", "--json"]).stdout)["families"]
    told = {(row["inputs"], row["works"]): row["checked_with"] for row in rows}
    assert told == {("text", True): "text", ("text", False): "", ("image-text", True): "images, text", ("-", False): ""}


def test_older_and_newer_tables_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"family": "old", "kind": "image-text", "works": True}
    entries = [entry, {**entry, "family": "new", "images": True, "sound": True}]
    (tmp_path / "table.json").write_text(json.dumps({"transformers": "5.23.0", "families": entries}))
    monkeypatch.setattr("mc_cli.families.TABLE", tmp_path / "table.json")
    assert [each["checked_with"] for each in families_table()["families"][:2]] == ["text", "images, text"]


@pytest.mark.parametrize("family", OUT_OF_SCOPE)
def test_a_family_that_does_not_continue_text_is_refused_by_its_config(family: str) -> None:
    config = AutoConfig.for_model("nllb-moe" if family == "nllb_moe" else family)
    with pytest.raises(FamilyError, match="encoder-decoders, classifiers and diffusion"):
        model_class(config)


@pytest.mark.parametrize("family", [each.family for each in read_outcomes()[1] if not each.works])
def test_a_family_that_does_not_work_is_refused_before_any_work(family: str, tmp_path: Path) -> None:
    folder = build_tiny_family(family, tmp_path / "model")
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=CPU)
    with pytest.raises(FamilyError, match=family):
        take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_a_family_streams_packs_and_loads_whole(family: str, tmp_path: Path) -> None:
    folder = build_tiny_family(family, tmp_path / "model")
    batch = Batch.of_text(TOKENS)
    assert float(relative(walked_logits(folder, batch), whole_logits(folder, batch)).median()) < ROUNDING
    source = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=CPU)
    roles = take_inventory(source.model, stored_dtypes=source.stored_dtypes).bytes_by_role()
    assert Role.EXPERT in roles and not source.unused
    assert (family in IMAGE_TEXT) == (Role.PROJECTOR in roles or Role.VISION in roles)
    work = packed_work_dir(folder, tmp_path / "work")
    assert run_export(work, tmp_path / "packed", "transformers").summary["read_back"]["logit_error_median"] < 1e-4
    run_export(work, tmp_path / "dense", "dense")
    assert shapes(tmp_path / "dense") == shapes(folder)
    exact = Walked(PackedSource(work / "packed", dtype=torch.float32, device=CPU)).logits(batch)
    written = open_with_transformers(tmp_path / "dense", Reading(torch.float32, CPU)).logits(batch)
    assert float(relative(written, exact).median()) < 0.2


# A router with a choice that is no expert; images whose tokens text experts do not see; a processor that gives lists;
# several streams of hidden states; a processor of the family's own, which the export has too.
@pytest.mark.parametrize("family", ["zaya", "ernie4_5_vl_moe", "unlimited_ocr", "glm5_next", "llava@mixtral"])
def test_a_family_goes_through_all_stages(family: str, tmp_path: Path) -> None:
    outcome = through_all_stages(family, tmp_path)
    assert outcome.works and outcome.images == (family in IMAGE_TEXT), outcome.reason
