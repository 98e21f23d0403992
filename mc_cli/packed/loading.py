"""A packed folder as a whole model in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from mc_cli.models.memory import read_ahead
from mc_cli.packed.packed_model import PackedSource
from mc_cli.packed.packed_modules import ask_for_huge_weights
from mc_cli.packed.plugin import mark_quantized
from mc_cli.skipping.pruning import apply_pruning


def load_packed(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The whole packed model in memory, ready for `generate`. Raises ArtifactError on a damaged folder.

    It cannot be saved by `save_pretrained`: the folder it was read from is the model, `mc-cli export` writes others.
    """
    source = PackedSource(folder, dtype=dtype, device=torch.device(device), trust_remote_code=trust_remote_code)
    read_ahead({tensor.path for tensor in source.files.tensors.values()})
    for part in source.parts:
        source.load(part)
    model = source.model
    if (source.files.config_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.files.config_folder)
    model.config.use_cache = getattr(source.config, "use_cache", True)
    if source.layout.pruning is not None:
        apply_pruning(model, source.layout.pruning)
    mark_quantized(model, source.layout)
    ask_for_huge_weights(model)
    return model
