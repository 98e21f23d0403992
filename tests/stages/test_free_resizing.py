"""Images of different sizes in one batch: a processor that gives each as many tokens as it has patches, end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PaddleOCRVLProcessor,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
)

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.data.batches import read_calibration
from mc_cli.data.image_rows import padded_alike
from mc_cli.data.kinds import IMAGE, PADDING
from mc_cli.data.pictures import image_source
from mc_cli.measuring.seeing import seen_inputs
from mc_cli.models.checkpoint import read_config
from tests.families.contract import ROUNDING, relative, walked_logits
from tests.families.tiny_families import build_tiny_family
from tests.tiny_chain import run_allocate, run_calibrate, run_export, run_prune_eval, run_quantize, run_score
from tests.tiny_models import with_config
from tests.tiny_vision import SPECIAL, TEMPLATE, build_tiny_vision, turns, uri, write_rows

PATCH, MERGE = 4, 2  # pixels of a patch; patches of a token in each direction
SIZES = ((16, 16), (32, 16), (24, 40))  # width, height
TOKENS = [width * height // (PATCH * MERGE) ** 2 for width, height in SIZES]


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def asked(*sizes: tuple[int, int], seed: int, question: str) -> dict[str, Any]:
    """A question about images of these sizes."""
    images = [{"type": "image", "image": uri(noise(size, seed + place))} for place, size in enumerate(sizes)]
    return turns([*images, {"type": "text", "text": question}], "a ring")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-VL-MoE with a processor of its style that needs no torchvision, as it reads no videos."""
    folder = tmp_path_factory.mktemp("free")
    build_tiny_family("qwen3_vl_moe", folder / "model")
    letters = build_tiny_vision(folder / "letters")
    tokenizer = AutoTokenizer.from_pretrained(letters, extra_special_tokens={"image_token": "<image>"})
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": 64, "longest_edge": 64 * 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    # Qwen3-VL counts positions by runs of image tokens, so that its template parts images by marks.
    parted = TEMPLATE.replace("'<image>'", "'<|user|><image><|user|>'")
    PaddleOCRVLProcessor(images, tokenizer, chat_template=parted).save_pretrained(folder / "model")
    return with_config(folder / "model", image_token_id=SPECIAL.index("<image>"))


def test_frames_of_several_calls_are_those_of_one() -> None:
    """A processor that tells sizes beside the images, as Pixtral's, pads those of a call to the largest of them."""
    maker = PixtralImageProcessorPil(patch_size={"height": PATCH, "width": PATCH}, size={"longest_edge": 64})
    pictures = [noise(size, number) for number, size in enumerate(SIZES)]
    together = maker(pictures, return_tensors="pt")
    alone = [maker([picture], return_tensors="pt") for picture in pictures]
    assert len({tuple(each["pixel_values"].shape) for each in alone}) == len(SIZES)
    assert torch.equal(torch.cat(padded_alike([each["pixel_values"] for each in alone])), together["pixel_values"])
    assert [each["image_sizes"][0].tolist() for each in alone] == together["image_sizes"].tolist()


def test_rows_with_images_of_different_sizes_go_through_the_chain(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    rows = [asked(size, seed=number, question="what?" * (1 + number)) for number, size in enumerate(SIZES)]
    rows += [asked(*SIZES[:2], seed=7, question="which?"), turns("a ring is there. what is it?", "a ring")]
    data = write_rows(tmp_path / "data.jsonl", *rows)
    heldout = [asked(size, seed=20 + number, question="so?") for number, size in enumerate(SIZES)]
    run_calibrate(work, model, data, length=96, gradient_tokens=10_000)
    batch = read_calibration(work / "calibration", vocabulary=read_config(model).get_text_config().vocab_size)
    assert batch.kinds is not None and batch.rows == 5
    images = sorted(int(count) for count in (batch.kinds == IMAGE).sum(-1))
    assert images == sorted([0, *TOKENS, TOKENS[0] + TOKENS[1]])
    whole: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    walked = walked_logits(model, batch, batch_size=5)
    for row in range(batch.rows):  # each by itself, without padding
        one = batch.select(slice(row, row + 1))
        length = int((batch.kinds[row] != PADDING).sum())
        inputs = {
            name: held[:, :length] if held.shape[:2] == (1, batch.length) else held for name, held in one.inputs.items()
        }
        with torch.no_grad():
            off = relative(walked[row : row + 1, :length], whole(**inputs).logits)
        assert float(off.max()) < 10 * ROUNDING
    run_score(work, bits=(2, 3), loss_tokens=32)
    run_allocate(work, target_stored_bits=2.8)
    run_quantize(work)
    run_prune_eval(work, write_rows(tmp_path / "heldout.jsonl", *heldout), length=96, stride=0)
    run_export(work, tmp_path / "out", "transformers")
    packed: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    wanted = processor.tokenizer("a ring<|end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    losses = {"original": 0.0, "packed": 0.0}
    for number, row in enumerate(heldout):
        picture = image_source("row", row["messages"][0]["content"][0]["image"], None).picture()
        assert picture.size == SIZES[number]
        path = tmp_path / f"{number}.png"
        file = io.BytesIO()
        picture.save(file, "PNG")
        path.write_bytes(file.getvalue())
        inputs = dict(seen_inputs(tmp_path / "out", "so?", [path]))  # what `generate --image` feeds
        assert int((inputs["input_ids"] == SPECIAL.index("<image>")).sum()) == TOKENS[number]
        begin = inputs["input_ids"].shape[1]
        del inputs["attention_mask"]
        given = packed.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert given.shape == (1, begin + 2) or int(given[0, -1]) == processor.tokenizer.eos_token_id
        inputs["input_ids"] = torch.cat([inputs["input_ids"], wanted], 1)
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, wanted.shape[1]))
        for name, each in (("original", whole), ("packed", packed)):
            with torch.no_grad():
                logits = each(**inputs).logits[0, begin - 1 : -1]
            losses[name] += float(torch.nn.functional.cross_entropy(logits, wanted[0], reduction="sum"))
    found = Evaluation.read(work / "evaluation" / "eval.json").total
    assert found.tokens == len(SIZES) * wanted.shape[1]
    assert found.original_loss == pytest.approx(losses["original"] / found.tokens, rel=1e-4)
    assert found.packed_loss == pytest.approx(losses["packed"] / found.tokens, rel=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_id"] == SPECIAL.index("<image>")
