"""Dequantized weights under the original names: for tools that know nothing of the packed format, at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import write_json, write_text
from mc_cli.artifacts.packed import PackedLayout
from mc_cli.exporters import ExportJob
from mc_cli.exporters.model_card import model_card
from mc_cli.exporters.reading import open_with_transformers
from mc_cli.exporters.shards import ShardWriter
from mc_cli.measuring.logit_source import LogitSource, Reading
from mc_cli.packed.dense_tensors import plain_shapes

NAME = "dense"
CARRIES_POLICY = False
DEQUANTIZES = True
KEEPS_UNUSED = True
ENGINES = ("transformers", "vLLM", "any that reads the original")
KEEPS = "the values, at 16 bits a weight; dropped experts and cuts where config.json can say them"
DESCRIPTION = (
    "dequantized weights in the original checkpoint's layout, for any tool; as large as the original, less what is cut"
)

_OPENING = (
    "The weights of a Mixture-of-Experts language model after quantization by mc-cli, written out as plain numbers in "
    "the original checkpoint's layout. It behaves as the packed model does, up to the rounding of this dtype. Only "
    "what was cut or dropped saves space."
)
_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
_SIZE_NOTE = (
    "These figures are of the packed model that this one was written from. This one has the original's size, less what "
    "was cut or dropped."
)


def check_packed(layout: PackedLayout, config: Any) -> None:
    """Raises InputError for dropped and cut experts that config.json cannot say."""
    plain_shapes(config, layout)


def export(job: ExportJob) -> None:
    """Writes the native config.json, sharded plain tensors as `save_pretrained` names them, and a card."""
    write_json(job.target / "config.json", job.original_config())
    writer = ShardWriter(job.target, shard_bytes=job.shard_bytes)
    for part in job.parts:
        for name, tensor in job.original_tensors(part).items():
            writer.add(name, tensor)
        job.advance("outside the layers" if part < 0 else f"layer {part}")
    for name, tensor in job.unused():
        writer.add(name, tensor)
    writer.finish()
    title = f"{job.card.base_model or job.card.model_type}, quantized by mc-cli and written out dense"
    card = model_card(
        job.card, title=title, opening=_OPENING, loading=job.in_words_of_the_class(_LOADING), size_note=_SIZE_NOTE
    )
    write_text(job.target / "README.md", card)


def open(directory: Path, reading: Reading) -> LogitSource:
    """The directory as `from_pretrained` loads it, or layer by layer where memory is short."""
    return open_with_transformers(directory, reading)
