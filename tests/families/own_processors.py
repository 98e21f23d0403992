"""Families whose own processor runs without torchvision: it is written beside their tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AriaImageProcessorPil,
    AriaProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    DeepseekOcr2ImageProcessorPil,
    DeepseekOcr2Processor,
    LlavaProcessor,
)

from tests.families.tiny_families import IMAGE
from tests.families.tiny_processors import PLACE
from tests.tiny_vision import noise

_GREY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _aria(tokenizer: Any) -> Any:
    images = AriaImageProcessorPil(min_image_size=336, **_GREY)
    return AriaProcessor(images, tokenizer, size_conversion={980: 4})


def _deepseek_ocr2(tokenizer: Any) -> Any:
    images = DeepseekOcr2ImageProcessorPil(size={"height": 48, "width": 48}, tile_size=48, **_GREY)
    return DeepseekOcr2Processor(images, tokenizer, patch_size=4, downsample_ratio=1)


def _llava(tokenizer: Any) -> Any:
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False, **_GREY)
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


OWN: dict[str, Callable[[Any], Any]] = {"aria": _aria, "deepseek_ocr2": _deepseek_ocr2, "llava@mixtral": _llava}


def give_processor(family: str, folder: Path) -> None:
    """Writes the family's own processor into a checkpoint's folder; its tokenizer then knows the image token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(len(tokenizer), IMAGE)])
    tokenizer.add_tokens([PLACE], special_tokens=True)
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": PLACE})
    assert tokenizer.convert_tokens_to_ids(PLACE) == IMAGE
    OWN[family](tokenizer).save_pretrained(folder)


def same_processor(before: Path, after: Path) -> bool:
    """Whether the processors of two folders make the same of two images and a text."""
    images = [noise(1, 48, 48), noise(2, 96, 48)]
    made = [
        AutoProcessor.from_pretrained(folder)(images=images, text=[f"a {PLACE} b {PLACE}"], return_tensors="pt")
        for folder in (before, after)
    ]
    return made[0].keys() == made[1].keys() and all(torch.equal(made[0][name], made[1][name]) for name in made[0])
