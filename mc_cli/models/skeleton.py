"""The model without weights: on the meta device, with the buffers that no checkpoint holds."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from mc_cli.errors import CheckpointError, FamilyError, first_line, listed
from mc_cli.models.model_folder import SUPPORTED, config_file

_LARGEST_BUFFER = 1 << 32  # bytes


def require_causal(config: PretrainedConfig) -> bool:
    """Whether the model brings its own code. Raises FamilyError if there is no causal language model for the config."""
    custom = type(config).__module__.startswith("transformers_modules")  # its code was trusted when it was read
    if custom or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return custom
    kind = "is an image-text model, and " if is_beside_text(config) else ""
    raise FamilyError(
        f"model_type {config.model_type!r} {kind}has no causal language model in transformers "
        f"{transformers.__version__}. {SUPPORTED}"
    )


def is_beside_text(config: PretrainedConfig) -> bool:
    """Whether the config is of a model for images or sound beside text."""
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return any(type(config) in mapping for mapping in mappings)


def build_skeleton(config: PretrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: shapes, modules and code, no weights.

    Raises FamilyError if there is no causal language model for this config, CheckpointError if its entries do not fit.
    """
    custom = require_causal(config)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=custom)
        except Exception as error:  # a model's constructor may raise anything at entries that do not fit each other
            raise CheckpointError(
                f"{config_file(config)} (model_type {config.model_type!r}) describes a model that cannot be built: "
                f"{first_line(error)}"
            ) from error
    _refuse_towers(model)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return model


def _refuse_towers(model: Any) -> None:
    """Raises FamilyError for a model with parts for images or sound, which text alone cannot calibrate."""
    towers = [name for name in ("vision_config", "audio_config") if getattr(model.config, name, None) is not None]
    if towers:
        raise FamilyError(
            f"model_type {model.config.model_type!r} ({type(model).__name__}) is an image-text model: config.json has "
            f"{' and '.join(towers)}, and mc-cli compresses models of text alone. {SUPPORTED}"
        )


def rebuild_buffers(model: Any, device: torch.device) -> None:
    """Fills the non-persistent buffers (rotary frequencies and the like) that no checkpoint holds.

    Raises CheckpointError where config.json makes them larger than any model's.
    """
    large = [
        f"{path}.{name}: {list(buffer.shape)}"
        for path, module in model.named_modules()
        for name, buffer in non_persistent_buffers(module).items()
        if buffer.numel() * buffer.itemsize > _LARGEST_BUFFER
    ]
    if large:
        raise CheckpointError(
            f"{config_file(model.config)} makes {len(large)} tables of more than {_LARGEST_BUFFER:,} bytes:\n"
            f"{listed(large)}\nAn entry for a width, a share or a length is of another model or damaged: download it "
            "again."
        )
    for module in model.modules():
        buffers = non_persistent_buffers(module)
        initialise(model, module, [name for name, buffer in buffers.items() if buffer.is_meta])
        for name, buffer in non_persistent_buffers(module).items():
            module._buffers[name] = buffer.to(device)


def non_persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own buffers that no checkpoint holds, by name."""
    names = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if name in names and buffer is not None}


def initialise(model: Any, module: nn.Module, names: list[str]) -> None:
    """Lets the model's own initialisation compute these buffers of a module, on the CPU."""
    if not names:
        return
    for name in names:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.no_grad():
        model._init_weights(module)
