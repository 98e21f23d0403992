"""Images through models made of real classes of transformers: streamed, packed and exported, they see the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mc_cli.data.batches import Batch
from mc_cli.measuring.logit_source import Walked
from mc_cli.models.model_class import model_class
from mc_cli.models.model_folder import read_config
from mc_cli.packed.packed_model import PackedSource
from tests.families.contract import ROUNDING, relative, walked_logits, whole_logits
from tests.families.tiny_families import IMAGE, build_tiny_family
from tests.packed_folders import packed_work_dir
from tests.tiny_chain import run_export
from tests.tiny_models import read_tensors

LENGTH = 14
IMAGES = (1, 0, 2)  # of each row
# family -> (tokens of an image, whether images come as rows of patches with a grid)
FAMILIES = {
    "llava@mixtral": (16, False),
    "internvl@qwen3_moe": (4, False),
    "qwen3_vl_moe": (4, True),  # adds features of finer levels behind its first layers
    "qwen3_5_moe": (4, True),
    "glm4v_moe": (4, True),
    "ernie4_5_vl_moe": (4, True),  # sends image tokens to experts of their own
}


def seeing(family: str) -> Batch:
    """Three rows with one image, none and two; random pixels of 16 x 16, in patches of 4 x 4."""
    size, patched = FAMILIES[family]
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 290, (len(IMAGES), LENGTH + 2 * size), generator=generator)
    for row, count in enumerate(IMAGES):
        for number in range(count):
            begin = 2 + number * (size + 2)
            tokens[row, begin - 1], tokens[row, begin + size] = 313, 314
            tokens[row, begin : begin + size] = IMAGE
    inputs = {"input_ids": tokens}
    if not patched:
        inputs["pixel_values"] = torch.randn(sum(IMAGES), 3, 16, 16, generator=generator)
        return Batch(inputs, {"pixel_values": IMAGES})
    depth = 1 if family == "ernie4_5_vl_moe" else 2  # frames of a patch
    inputs["pixel_values"] = torch.randn(16 * sum(IMAGES), 3 * depth * 16, generator=generator)
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * sum(IMAGES))
    inputs["mm_token_type_ids"] = (tokens == IMAGE).long()
    if family == "ernie4_5_vl_moe":
        inputs["moe_mm_token_type_ids"] = ((tokens == IMAGE) | (tokens == 313) | (tokens == 314)).long()
    return Batch(inputs, {"pixel_values": tuple(16 * count for count in IMAGES), "image_grid_thw": IMAGES})


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_a_model_sees_survives_streaming_packing_and_export(family: str, tmp_path: Path) -> None:
    folder = build_tiny_family(family, tmp_path / "model")
    batch = seeing(family)
    whole = whole_logits(folder, batch)
    blind = relative(walked_logits(folder, batch.text_alone()), whole)
    for batch_size in (1, 3):
        off = relative(walked_logits(folder, batch, batch_size=batch_size), whole)
        assert float(off.median()) < ROUNDING
    assert [bool(row.max() > 0.01) for row in blind] == [count > 0 for count in IMAGES]
    work = packed_work_dir(folder, tmp_path / "work")
    packed = PackedSource(work / "packed", dtype=torch.float32, device=torch.device("cpu"))
    exact = Walked(packed).logits(batch)
    for format, tolerance in (("transformers", 1e-4), ("dense", 0.2)):
        run_export(work, tmp_path / format, format)
        assert model_class(read_config(tmp_path / format)).auto_name == "AutoModelForImageTextToText"
        off = relative(whole_logits(tmp_path / format, batch), exact)
        assert float(off.median()) < tolerance, format
    source, dense = read_tensors(folder), read_tensors(tmp_path / "dense")
    towers = [key for key in source if "vis" in key and "vision_moe" not in key]
    assert towers and all(torch.equal(source[key], dense[key]) for key in towers)
