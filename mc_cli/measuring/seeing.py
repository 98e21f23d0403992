"""A prompt with images as the inputs of a model, by the processor that came with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc_cli.artifacts.places import require_ordinary
from mc_cli.errors import CheckpointError, InputError, MissingDependencyError, first_line

_NEEDS = (
    "Images are read by the model's own processor, which needs pillow and mostly torchvision: run `pip install {}`."
)


def seen_inputs(folder: Path, prompt: str, images: Sequence[Path], *, trust_remote_code: bool = False) -> Any:
    """The processor's output for a prompt with images before it: tensors by name, a batch of one row.

    A chat template of the processor makes a user's turn of it; without one the image tokens come before the prompt.
    Raises InputError for files that are no images and models that take none, MissingDependencyError where a library is
    missing.
    """
    pictures = [_picture(path) for path in images]
    processor = _processor(folder, trust_remote_code=trust_remote_code)
    if getattr(processor, "chat_template", None):
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    else:
        text = str(processor.image_token) * len(images) + prompt
    try:
        return processor(images=pictures, text=text, return_tensors="pt")
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise InputError(
            f"The processor in {folder} cannot make inputs of {len(images)} images and the prompt: {first_line(error)} "
            "Give fewer or other images, or copy the processor's files of the model again."
        ) from error


def _picture(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError(_NEEDS.format("pillow torchvision")) from error
    if not path.is_file():
        raise InputError(f"--image {path}: no such file.")
    require_ordinary(path)
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"--image {path} cannot be read as an image: {first_line(error)}") from error


def _processor(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise MissingDependencyError(f"{_NEEDS.format('torchvision')} It says: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The processor in {folder} cannot be loaded: {first_line(error)} Copy preprocessor_config.json, "
            "processor_config.json and the tokenizer's files of the model again."
        ) from error
    if not hasattr(processor, "image_processor"):
        raise InputError(f"The model in {folder} comes with no processor for images: generate without --image.")
    return processor
