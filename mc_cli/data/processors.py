"""The processor that comes with an image-text model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mc_cli.data.pictures import NEEDS
from mc_cli.errors import CheckpointError, InputError, MissingDependencyError, first_line
from mc_cli.models.model_class import has_towers, model_class


def sees(config: Any) -> bool:
    """Whether the model of a config is loaded with its vision tower, so that it can be fed images."""
    return getattr(config, "vision_config", None) is not None and has_towers(config) and model_class(config).whole


def load_processor(folder: Path, *, trust_remote_code: bool, remedy: str) -> Any:
    """The processor of a model folder.

    remedy  what to do where the model has none, for the message
    Raises MissingDependencyError where a library is missing, CheckpointError for damaged files, InputError without one.
    """
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise MissingDependencyError(f"{NEEDS.format('torchvision')} It says: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The processor in {folder} cannot be loaded: {first_line(error)} Copy preprocessor_config.json, "
            "processor_config.json and the tokenizer's files of the model again."
        ) from error
    if not hasattr(processor, "image_processor"):
        raise InputError(f"The model in {folder} comes with no processor for images: {remedy}")
    return processor
