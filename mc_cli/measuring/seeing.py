"""A prompt with images as the inputs of a model, by the processor that came with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc_cli.data.pictures import ImageSource
from mc_cli.data.processors import load_processor
from mc_cli.errors import InputError, first_line


def seen_inputs(folder: Path, prompt: str, images: Sequence[Path], *, trust_remote_code: bool = False) -> Any:
    """The processor's output for a prompt with images before it: tensors by name, a batch of one row.

    A chat template of the processor makes a user's turn of it; without one the image tokens come before the prompt.
    Raises InputError for files that are no images and models that take none, MissingDependencyError where a library is
    missing.
    """
    pictures = [ImageSource(f"--image {path}", path=path).picture() for path in images]
    processor = load_processor(folder, trust_remote_code=trust_remote_code, remedy="generate without --image.")
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
