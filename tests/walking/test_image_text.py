"""A real image-text model of transformers, layer by layer: its images come in with the embeddings and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MixtralConfig

from mc_cli.data.batches import Batch
from mc_cli.walking.layerwise import LayerWalk

IMAGE, PATCHES = 99, 4  # the token that stands for a patch, and how many an image has
COUNTS = (1, 0, 2, 0)  # images of each row


class Resident:
    """A model that is in memory as a whole, as a layer source."""

    layers_path = "model.language_model.layers"
    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model = model

    def load(self, part: int) -> None: ...

    def free(self, layer: int) -> None: ...


@pytest.fixture(scope="module")
def llava() -> Any:
    text = MixtralConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    sight = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=sight, text_config=text, image_token_id=IMAGE)
    ).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (4, 12), generator=generator)
    for row, count in enumerate(COUNTS):
        tokens[row, 1 : 1 + count * PATCHES] = IMAGE
    pixels = torch.randn(sum(COUNTS), 3, 8, 8, generator=generator)
    return Batch({"input_ids": tokens, "pixel_values": pixels}, {"pixel_values": COUNTS})


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_walk_gives_the_models_own_logits(llava: Any, batch: Batch, batch_size: int) -> None:
    with torch.no_grad():
        whole = llava(**batch, use_cache=False).logits
        blind = llava(**batch.text_alone(), use_cache=False).logits
    walk = LayerWalk(Resident(llava), batch, batch_size=batch_size)
    while walk.depth < walk.num_layers:
        walk.run_layer(advance=True)
    found = torch.cat([walk.logits(rows) for rows in walk.batches()])
    torch.testing.assert_close(found, whole)
    errors = (found - blind).abs().amax((1, 2))
    assert [bool(error > 1e-3) for error in errors] == [bool(count) for count in COUNTS]
