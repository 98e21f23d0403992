"""The bundled model that sees: what widths leave of its answers; its export answers as the packed model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mc_cli.artifacts.evaluation import AnswersResult, Evaluation
from mc_cli.bundled import bundled_path
from mc_cli.data.pictures import image_source
from mc_cli.settings import QuantizerSettings
from tests.tiny_chain import run_allocate, run_calibrate, run_export, run_prune_eval, run_quantize, run_score

QUESTIONS = 64
NEAREST: dict[str, Any] = {"quantizer": QuantizerSettings(quantizer="rtn")}  # the plainest rounding
KEPT = dict.fromkeys(("attention_bits", "shared_bits", "head_bits", "embedding_bits"), 16)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first held-out questions."""
    lines = bundled_path("scenes-heldout").read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    path.write_text("".join(lines[:QUESTIONS]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated and scored."""
    folder = tmp_path_factory.mktemp("demo-vision") / "work"
    model, scenes = bundled_path("demo-vision"), bundled_path("scenes")
    run_calibrate(folder, model, scenes, sequences=16, length=64, gradient_tokens=64)
    run_score(folder, bits=(2, 4), loss_tokens=64, **NEAREST)
    return folder


def rounded(work: Path, heldout: Path, bits: int) -> tuple[AnswersResult, float]:
    """(answers, KL divergence of their tokens in nats) with all experts rounded to nearest."""
    run_allocate(work, method="uniform", target_stored_bits=None, target_bits=bits, bits=(bits,), force=True, **KEPT)
    run_quantize(work, force=True, **NEAREST)
    run_prune_eval(work, heldout, length=64, stride=0, force=True)
    found = Evaluation.read(work / "evaluation" / "eval.json")
    assert found.answers is not None and found.answers.answers == QUESTIONS
    return found.answers, found.total.kl_divergence


def test_two_bits_hurt_its_answers_and_four_do_not(work: Path, heldout: Path) -> None:
    (two, far), (four, near) = (rounded(work, heldout, bits) for bits in (2, 4))
    assert two.original_right == four.original_right >= 0.85 * QUESTIONS
    assert four.packed_right >= four.original_right - 1 and near < 0.005
    assert two.packed_right < two.original_right and far > 0.01


def test_an_export_with_its_processor_answers_as_the_packed_model(work: Path, heldout: Path, tmp_path: Path) -> None:
    found, _ = rounded(work, heldout, 4)
    run_export(work, tmp_path / "out", "transformers")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    right = 0
    for line in heldout.read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        image = image_source("row", question["content"][0]["image"], None).picture()
        text = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
        inputs = processor(images=[image], text=text, return_tensors="pt")
        given = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(given, skip_special_tokens=True).strip() == answer["content"]
    assert right == found.packed_right
