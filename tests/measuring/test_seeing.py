"""generate --image: what a packed model says of an image, by the processor that came with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
)
from typer.testing import CliRunner

import mc_cli  # noqa: F401  loads packed directories
from mc_cli.cli import app
from tests.families.tiny_families import build_tiny_family
from tests.packed_folders import packed_work_dir
from tests.tiny_chain import run_export
from tests.tiny_models import with_config

_COLOURS = {"red": (220, 10, 10), "blue": (10, 10, 220)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llava over Mixtral with its processor, images of 16 x 16 in patches of 4."""
    folder = tmp_path_factory.mktemp("seeing")
    model = build_tiny_family("llava@mixtral", folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(model)
    with_config(model, image_token_id=image, image_token_index=image)
    work = packed_work_dir(model, folder / "work")
    run_export(work, folder / "out", "transformers")
    for name, colour in _COLOURS.items():
        Image.new("RGB", (20, 16), colour).save(folder / f"{name}.png")
    return folder


def said(folder: Path, *arguments: str) -> Any:
    options = ["generate", str(folder), "--prompt", "hello", "--max-new-tokens", "6", *arguments]
    return CliRunner().invoke(app, options)


def test_a_packed_model_is_shown_an_image(packed: Path) -> None:
    found = said(packed / "out", "--image", str(packed / "red.png"))
    assert found.exit_code == 0, found.output
    processor: Any = AutoProcessor.from_pretrained(packed / "out")
    model = AutoModelForImageTextToText.from_pretrained(packed / "out", dtype=torch.float32).eval()
    outputs = {}
    for name in _COLOURS:
        inputs = processor(images=[Image.open(packed / f"{name}.png")], text="<image>hello", return_tensors="pt")
        assert inputs["input_ids"].shape[1] > 16
        outputs[name] = model(**inputs).logits
        if name == "red":
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert not torch.allclose(outputs["red"], outputs["blue"], atol=1e-3)
    assert processor.decode(ids, skip_special_tokens=True).strip() in found.stdout


def test_files_that_are_no_images_are_told(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    found = said(packed / "out", "--image", str(tmp_path / "text.png"))
    assert found.exit_code == 1 and "cannot be read as an image" in found.output
    found = said(packed / "out", "--image", str(tmp_path / "gone.png"))
    assert found.exit_code == 1 and "no such file" in found.output
