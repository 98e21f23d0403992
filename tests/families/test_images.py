"""Images through models made of real classes of transformers: streamed, packed and exported, they see the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.exporters.reading import open_with_transformers
from mc_cli.measuring.logit_source import Reading, Walked
from mc_cli.packed.packed_model import PackedSource
from mc_cli.settings import PruneSettings
from tests.families.contract import COARSE, ROUNDING, auto_class, relative, walked_logits, whole_logits
from tests.families.own_processors import OWN, give_processor
from tests.families.tiny_families import build_tiny_family
from tests.families.tiny_processors import image_batch, other_pixels, rows_with_images, standing_in, write_image_rows
from tests.packed_folders import packed_work_dir
from tests.tiny_chain import run_allocate, run_calibrate, run_export, run_prune_eval, run_quantize, run_score
from tests.tiny_models import read_tensors

FAMILIES = (
    "llava@mixtral",
    "internvl@qwen3_moe",
    "qwen3_vl_moe",  # adds features of finer levels behind its first layers
    "qwen3_5_moe",
    "glm4v_moe",
    "ernie4_5_vl_moe",  # sends image tokens to experts of their own
    "gemma4",  # tokens of an image see those behind them
    "unlimited_ocr",  # takes numbers of tiles as a list
)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_sees_survives_streaming_packing_and_export(family: str, tmp_path: Path) -> None:
    folder = build_tiny_family(family, tmp_path / "model")
    if family in OWN:
        give_processor(family, folder)
    with standing_in(family):
        batch = image_batch(folder, write_image_rows(tmp_path / "rows.jsonl", rows=4), rows=4)
    whole = whole_logits(folder, batch)
    other = relative(walked_logits(folder, other_pixels(batch)), whole)
    for batch_size in (1, 3):
        off = relative(walked_logits(folder, batch, batch_size=batch_size), whole)
        assert float(off.median()) < ROUNDING
    assert [bool(row.max() > 0.01) for row in other] == rows_with_images(batch)
    work = packed_work_dir(folder, tmp_path / "work")
    packed = PackedSource(work / "packed", dtype=torch.float32, device=torch.device("cpu"))
    exact = Walked(packed).logits(batch)
    for format, tolerance in (("transformers", 1e-4), ("dense", 0.2)):
        run_export(work, tmp_path / format, format)
        assert auto_class(tmp_path / format) is AutoModelForImageTextToText
        off = relative(whole_logits(tmp_path / format, batch), exact)
        assert float(off.median()) < tolerance, format
    source, dense = read_tensors(folder), read_tensors(tmp_path / "dense")
    towers = [key for key in source if "vis" in key and "vision_moe" not in key]
    assert towers and all(torch.equal(source[key], dense[key]) for key in towers)


@pytest.mark.parametrize("family", ["kimi_k25", "qwen3_vl_moe"])
def test_a_model_in_bfloat16_is_streamed_as_it_is_whole(family: str, tmp_path: Path) -> None:
    """Towers that take pixels in their own dtype alone; features that are added to coarsely rounded hidden states."""
    folder = build_tiny_family(family, tmp_path / "model")
    with standing_in(family):
        batch = image_batch(folder, write_image_rows(tmp_path / "rows.jsonl", rows=4), rows=4)
    assert batch.inputs["pixel_values"].dtype == torch.float32
    found = walked_logits(folder, batch, dtype=torch.bfloat16)
    reader = open_with_transformers(folder, Reading(torch.bfloat16, torch.device("cpu")))
    assert float(relative(found, reader.logits(batch)).median()) < COARSE


def test_policies_skip_and_count_what_experts_see_alone(tmp_path: Path) -> None:
    """Tokens of images are no calls of ERNIE's text experts: neither fitted on, nor counted as skipped."""
    family = "ernie4_5_vl_moe"
    folder, work = build_tiny_family(family, tmp_path / "model"), tmp_path / "work"
    data = write_image_rows(tmp_path / "rows.jsonl", rows=4)
    with standing_in(family):
        run_calibrate(work, folder, data, sequences=4, length=128)
        run_score(work, bits=(2, 4))
        run_allocate(work, target_stored_bits=3.6)
        run_quantize(work)
        policies = PruneSettings(policy=("odp",), target_rate=0.2)
        run_prune_eval(work, write_image_rows(tmp_path / "more.jsonl", rows=4, offset=8), length=128, prune=policies)
    found = Evaluation.read(work / "evaluation" / "eval.json").pruning
    assert found["unpruned"]["rate"] == 0
    (point,) = found["points"]
    assert list(point["rate_by_kind"]) == ["text"] and point["rate"] == pytest.approx(point["rate_by_kind"]["text"])
    assert point["fitted_rate"] == pytest.approx(0.2, abs=0.02)
