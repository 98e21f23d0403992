"""Checks of what is asked of a model folder, made before a library is imported, so that errors come at once."""

from __future__ import annotations

import math
from pathlib import Path

from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.strict_json import has_half_character
from mc_cli.errors import InputError, shown
from mc_cli.models.model_name import check_model_folder, resolve_model
from mc_cli.settings.compute import DTYPES

UNTIMED = 2  # first tokens of a measurement: they find caches cold and buffers unmade
LEAST_TEMPERATURE = 1e-6  # logits are divided by it, in float32
_MOST_THREADS = 1024


def check_generation(model: str, prompt: str, seed: int, temperature: float = 0.0) -> Path:
    """The folder of a model that is to continue `prompt`.

    Raises InputError for a prompt that no tokenizer reads, a seed that torch does not take, a temperature by which
    logits cannot be divided, and a model that is not there; CheckpointError for what is no model folder.
    """
    if has_half_character(prompt):
        raise InputError("--prompt holds bytes that are not UTF-8, or half of a character, which no tokenizer reads.")
    if abs(seed) >= 1 << 63:
        raise InputError(f"--seed {shown(seed)}: give a number of at most 63 bits.")
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise InputError(f"--temperature {temperature:g}: 0, or a finite number of at least {LEAST_TEMPERATURE:g}.")
    folder = resolve_model(model, asked_as="DIR")
    check_model_folder(folder)
    return folder


def check_served(model: str, dtype: str) -> Path:
    """The folder of a model that is to be served with activations of a dtype.

    Raises InputError for another dtype than DTYPES and a model that is not there; CheckpointError for no model folder.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {shown(dtype)}: unknown. Known: {', '.join(DTYPES)}.")
    folder = resolve_model(model, asked_as="DIR")
    check_model_folder(folder)
    return folder


def check_speed(folder: Path, *, prompt_tokens: int | None, new_tokens: int, threads: int | None) -> None:
    """Raises, before a process is started and anything heavy imported, what the measurement would end with.

    InputError for more tokens than the model has positions, or more threads than processors have; CheckpointError and
    ArtifactError for what is no model folder.
    """
    if threads is not None and threads > _MOST_THREADS:
        raise InputError(f"--threads {shown(threads)}: at most {_MOST_THREADS:,}.")
    check_model_folder(folder)
    config = read_json(folder / "config.json", foreign=True)
    text = config.get("text_config")
    limit = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    if isinstance(limit, int):
        check_tokens(limit, prompt_tokens or 1, new_tokens)


def check_tokens(limit: int | None, prompt_tokens: int, new_tokens: int) -> None:
    """Checks positions like `check_positions`, for a measurement, whose first tokens need positions too."""
    check_positions(limit, prompt_tokens, new_tokens, option="--new-tokens", untimed=UNTIMED)


def check_positions(
    limit: int | None, prompt_tokens: int, new_tokens: int, *, option: str = "--max-new-tokens", untimed: int = 0
) -> None:
    """Raises InputError where a prompt and what is to follow it are more than a model's positions.

    limit     the model's positions, None where it states none
    option    what asked for `new_tokens`, for messages;  untimed  tokens beside them
    """
    if not limit or prompt_tokens + new_tokens + untimed <= limit:
        return
    beside = f" ({untimed} of them for tokens before time is taken)" if untimed else ""
    said = (
        f"The prompt has {prompt_tokens:,} tokens, {option} is {new_tokens:,}, and the model has {limit:,} "
        f"positions{beside}"
    )
    left = limit - untimed - prompt_tokens
    if left < 1:
        raise InputError(f"{said}: the prompt alone is too long. Shorten it to {limit - untimed - 1:,} tokens or less.")
    raise InputError(f"{said}: together too many. Use {option} {left} or less, or a shorter prompt.")
