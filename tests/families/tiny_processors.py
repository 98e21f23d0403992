"""Processors of tiny image-text families: what a family's own makes of 16 x 16 pixels, by hand.

The processors of most families need torchvision, and few of them take images of 16 pixels. A stand-in makes the same
inputs, by name and shape, of a text with images, so that the chain reads rows with images as it does for a user.
Families whose own processor runs without torchvision have that one (own_processors.py).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from mc_cli.data.batches import Batch
from mc_cli.data.inputs import Feeder
from mc_cli.data.text import TextSource, fit_length, load_tokenizer
from mc_cli.models.model_folder import read_config
from tests.families.tiny_families import IMAGE
from tests.tiny_vision import noise, uri, write_rows

SIDE, PATCH = 16, 4  # pixels
SHOWN = 48  # pixels of a row's image, in height
GRID = SIDE // PATCH  # patches of an image in each direction
START, END = 313, 314  # tokens round an image
PLACE = "<image>"
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Seeing:
    """The inputs that a family makes of an image.

    tokens       that stand for an image
    inputs       pixels [3, height, width] -> inputs of one image by name, with one entry or several
    types        names of inputs that tell tokens of images from others, [rows, length]
    wide_tokens  more tokens that stand for a wide image, where that is cut into tiles beside the whole
    """

    tokens: int
    inputs: Callable[[Tensor], Inputs]
    types: tuple[str, ...] = ()
    wide_tokens: int = 0


def _patches(pixels: Tensor, size: int = PATCH) -> Tensor:
    """[patches, 3, size, size] of one image, row after row."""
    rows = pixels.shape[-1] // size
    cut = pixels.reshape(3, rows, size, rows, size)
    return cut.permute(1, 3, 0, 2, 4).reshape(rows * rows, 3, size, size)


def _frame(pixels: Tensor) -> Inputs:
    return {"pixel_values": pixels[None]}


def _coarse_frame(pixels: Tensor) -> Inputs:
    """Llama 4's: values in bfloat16."""
    return {"pixel_values": pixels[None].bfloat16()}


def _sized_frame(pixels: Tensor) -> Inputs:
    return {**_frame(pixels), "image_sizes": torch.tensor([[SIDE, SIDE]])}


def _square_patches(pixels: Tensor) -> Inputs:
    return {"pixel_values": _patches(pixels), "image_grid_thw": torch.tensor([[1, GRID, GRID]])}


def _flat_patches(pixels: Tensor, frames: int = 1) -> Inputs:
    """Patches as rows; `frames`: how often a still image is repeated to be a film."""
    cut = _patches(pixels)[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)
    return {"pixel_values": cut, "image_grid_thw": torch.tensor([[1, GRID, GRID]])}


def _film_patches(pixels: Tensor) -> Inputs:
    return _flat_patches(pixels, frames=2)


def _grid_hw(pixels: Tensor) -> Inputs:
    return {"pixel_values": _patches(pixels).flatten(1), "image_grid_hw": torch.tensor([[GRID, GRID]])}


def _placed_patches(pixels: Tensor) -> Inputs:
    """Gemma's: patches with values from 0 to 1, and their places (x, y)."""
    places = torch.tensor([[x, y] for y in range(GRID) for x in range(GRID)])
    return {"pixel_values": (_patches(pixels).flatten(1)[None] + 1) / 2, "image_position_ids": places[None]}


def _masked_patches(pixels: Tensor) -> Inputs:
    """LFM2's: patches with a mask, and how many lie side by side."""
    return {
        "pixel_values": _patches(pixels).flatten(1)[None],
        "spatial_shapes": torch.tensor([[GRID, GRID]]),
        "pixel_attention_mask": torch.ones(1, GRID * GRID, dtype=torch.int32),
    }


def _folded_patches(pixels: Tensor) -> Inputs:
    """Inkling's: patches of two frames, colours last."""
    return {"pixel_values": _patches(pixels).permute(0, 2, 3, 1)[:, None].repeat(1, 2, 1, 1, 1)}


def _merged_patches(pixels: Tensor) -> Inputs:
    """Inkling 2's: blocks of 2 x 2 patches, colours last."""
    cut = _patches(pixels, 2 * PATCH).permute(0, 2, 3, 1)
    return {"pixel_values": cut, "image_grid_thw": torch.tensor([[1, GRID // 2, GRID // 2]])}


def _tiled_frame(pixels: Tensor) -> Inputs:
    """The whole image, and two tiles of a wide one."""
    tiles = list(pixels.split(SIDE, -1)) if pixels.shape[-1] > SIDE else []
    whole = torch.nn.functional.interpolate(pixels[None], (SIDE, SIDE))
    found: Inputs = {"pixel_values": whole, "num_local_patches": torch.tensor([len(tiles)])}
    return {**found, "pixel_values_local": torch.stack(tiles)} if tiles else found


def _listed_tiles(pixels: Tensor) -> Inputs:
    """The same with lists of numbers, and how many tiles are side by side and on top of each other."""
    found = _tiled_frame(pixels)
    count = int(found["num_local_patches"])
    return {**found, "num_local_patches": [count], "patches_grid": [[count, 1] if count else [1, 1]]}


_TYPES = ("mm_token_type_ids",)
SEEING: dict[str, Seeing] = {
    "dots3_note": Seeing(4, _flat_patches),
    "ernie4_5_vl_moe": Seeing(4, _flat_patches, (*_TYPES, "moe_mm_token_type_ids")),
    "gemma4": Seeing(4, _placed_patches, _TYPES),
    "glm4v_moe": Seeing(4, _film_patches, _TYPES),
    "glm5_next": Seeing(4, _film_patches, _TYPES),
    "inkling2": Seeing(4, _merged_patches),
    "inkling_mm_model": Seeing(16, _folded_patches),
    "internvl@gpt_oss": Seeing(4, _frame),
    "internvl@qwen3_moe": Seeing(4, _frame),
    "kimi_k25": Seeing(4, _square_patches),
    "lfm2_vl@lfm2_moe": Seeing(4, _masked_patches),
    "llama4": Seeing(4, _coarse_frame),
    "minimax_m3_vl": Seeing(4, _film_patches),
    "mistral3@mistral4": Seeing(4, _sized_frame),
    "mistral_large4": Seeing(4, _sized_frame),
    "muse_spark": Seeing(4, _film_patches),
    "nemotron_h_omni": Seeing(4, _grid_hw),
    "qwen3_5_moe": Seeing(4, _film_patches, _TYPES),
    "qwen3_omni_moe_thinker": Seeing(4, _film_patches),
    "qwen3_vl_moe": Seeing(4, _film_patches, _TYPES),
    "qwen4_exp": Seeing(4, _film_patches, _TYPES),
    "step3p7": Seeing(1, _tiled_frame, wide_tokens=2),
    "unlimited_ocr": Seeing(3, _listed_tiles, wide_tokens=3),
}


class TinyProcessor:
    """In the place of a family's own processor."""

    image_token = PLACE
    image_token_ids = (IMAGE,)

    def __init__(self, tokenizer: Any, seeing: Seeing) -> None:
        self.tokenizer, self._seeing = tokenizer, seeing
        self.image_processor = self

    def __call__(self, images: Sequence[Image.Image], text: Sequence[str], **options: Any) -> Mapping[str, Any]:
        """Inputs of one text and its images."""
        made: dict[str, list[Any]] = {}
        ids = self._ids(text[0].split(PLACE)[0])
        for image, words in zip(images, text[0].split(PLACE)[1:], strict=True):
            inputs = self._seeing.inputs(self._pixels(image))
            for name, held in inputs.items():
                made.setdefault(name, []).append(held)
            more = self._seeing.wide_tokens if "pixel_values_local" in inputs else 0
            ids += [START, *[IMAGE] * (self._seeing.tokens + more), END, *self._ids(words)]
        tokens = torch.tensor([ids])
        types = {name: (tokens == IMAGE).long() for name in self._seeing.types}
        found = {
            name: torch.cat(held) if isinstance(held[0], Tensor) else list(itertools.chain(*held))
            for name, held in made.items()
        }
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **types, **found}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pixels(self, image: Image.Image) -> Tensor:
        """[3, height, width] from -1 to 1; an image's width matters where it may have tiles."""
        width = 2 * SIDE if self._seeing.wide_tokens and image.width > image.height else SIDE
        resized = image.convert("RGB").resize((width, SIDE))
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(SIDE, width, 3)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


def write_image_rows(path: Path, *, rows: int, offset: int = 0) -> Path:
    """JSON lines with one image, none, two and a wide one by turns; `offset` gives others."""
    lines: list[dict[str, Any]] = []
    for number in range(offset, offset + rows):
        words = " the rain fell on hills where a cat sat"[: 20 + number % 12]
        if number % 4 == 1:
            lines.append({"text": f"{number}:{words}"})
            continue
        widths = ((SHOWN,), (), (SHOWN, SHOWN), (2 * SHOWN,))[number % 4]
        images = [uri(noise(10 * number + place, width, SHOWN)) for place, width in enumerate(widths)]
        lines.append({"images": images, "text": f"{number}:" + f" {PLACE}{words}" * len(images)})
    return write_rows(path, *lines)


@contextlib.contextmanager
def standing_in(family: str) -> Iterator[None]:
    """Context in which the stages are given the family's stand-in, if it has one, for the processor of any folder."""
    if family not in SEEING:
        yield
        return

    def load(folder: Path, **_: Any) -> TinyProcessor:
        return TinyProcessor(load_tokenizer(folder, trust_remote_code=False), SEEING[family])

    with mock.patch("mc_cli.data.inputs.load_processor", load):
        yield


def image_batch(folder: Path, data: Path, *, rows: int) -> Batch:
    """The rows as calibrate draws them, within `standing_in`."""
    config = read_config(folder)
    source = TextSource(str(data), "train", "text", images=True)
    feeder = Feeder(folder, config, config.get_text_config().vocab_size, source, trust_remote_code=False)
    return feeder.calibration(sequences=rows, length=fit_length(0, config), seed=0).made


def other_pixels(batch: Batch) -> Batch:
    """The batch with other values in its images, of the same sizes."""
    changed = {name: held.flip(-1) for name, held in batch.inputs.items() if name.startswith("pixel_values")}
    return replace(batch, inputs={**batch.inputs, **changed})


def rows_with_images(batch: Batch) -> list[bool]:
    """Whether each row has an image."""
    return [bool(row.any()) for row in batch.token_ids == IMAGE]
