"""Text from a model folder, as any user of transformers would get it: one load, one generate, words as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

import mc_cli  # noqa: F401  teaches transformers to load packed directories
from mc_cli.data.text import load_tokenizer
from mc_cli.errors import CheckpointError, InputError, McError, about, first_line, listed, shown
from mc_cli.measuring.requests import check_generation, check_positions
from mc_cli.measuring.seeing import seen_inputs
from mc_cli.models.memory import large_blocks_mapped
from mc_cli.models.model_class import model_class
from mc_cli.models.model_folder import read_config
from mc_cli.models.model_name import check_model_folder
from mc_cli.models.session import device_named, dtype_named
from mc_cli.models.skeleton import compute_dtype
from mc_cli.packed.packed_files import is_packed_folder, open_packed, weight_files
from mc_cli.packed.stored_tensors import check_layer_count
from mc_cli.settings import RunSettings

# RuntimeErrors of loading that are not about tensors and config.json that do not fit each other.
_MATRIX_DIMS = 2  # tensors of more are stacked experts
_NOT_OF_THE_FILES = ("out of memory", "allocate memory", "not enough memory", "CUDA", "unable to open file")


@dataclass(frozen=True)
class Generated:
    """The generated text, without the prompt, and its speed, which counts the prompt's own pass too."""

    text: str
    prompt_tokens: int
    new_tokens: int
    load_s: float
    generate_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.generate_s if self.generate_s else 0.0


class _Pieces(TextStreamer):
    """Hands finished words to a function instead of printing them."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self._show(text)


@large_blocks_mapped()
def generate(
    model: str,
    prompt: str,
    *,
    compute: RunSettings,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], None],
    images: Sequence[Path] = (),
) -> Generated:
    """The continuation of `prompt`, handed to `show` piece by piece as it comes.

    temperature   0 takes the most likely token each time; above, tokens are drawn with `seed`
    images        files that the model sees before the prompt
    The prompt itself is shown first, once the model is loaded.
    Raises InputError for an empty prompt or one too long for the model, CheckpointError where loading fails.
    """
    folder = check_generation(model, prompt, seed, temperature)
    tokenizer = load_tokenizer(folder, trust_remote_code=compute.trust_remote_code)
    trusted = compute.trust_remote_code
    encoded: Any = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if images:
        encoded = seen_inputs(folder, prompt, images, trust_remote_code=trusted)
    prompt_tokens = int(encoded["input_ids"].shape[1])
    if not prompt_tokens:
        raise InputError("--prompt holds no token. Give some text to continue.")
    config: Any = read_config(folder, trust_remote_code=compute.trust_remote_code)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    check_positions(limit, prompt_tokens, max_new_tokens)
    begun = time.monotonic()
    network = load_model(folder, compute)
    loaded = time.monotonic()
    torch.manual_seed(seed)
    show(prompt)
    streamer = _Pieces(tokenizer, show)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A processor gives pixels in a dtype of its own; a tokenizer's output has no dtype to be changed.
    fed = encoded.to(network.device, compute_dtype(network)) if images else encoded.to(network.device)
    try:
        with torch.inference_mode():
            output = network.generate(
                **fed,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                streamer=streamer,
                **sampling,
            )
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: nothing can be generated as its generation_config.json and tokenizer say "
            f"({type(error).__name__}: {shown(str(error), 300)}). Mend, copy or download these files again."
        ) from error
    return Generated(
        text="".join(streamer.pieces),
        prompt_tokens=prompt_tokens,
        new_tokens=int(output.shape[1]) - prompt_tokens,
        load_s=loaded - begun,
        generate_s=time.monotonic() - loaded,
    )


def load_model(folder: Path, compute: RunSettings) -> Any:
    """The model, in float32 on a CPU and in its own dtype on a GPU unless asked otherwise; in evaluation mode."""
    check_model_folder(folder)
    config: Any = read_config(folder, trust_remote_code=compute.trust_remote_code)
    _check_weight_files(folder, config)
    device = device_named(compute.device)
    dtype = dtype_named(compute.dtype, device, stored=config.get_text_config().dtype)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with about(folder / "config.json"):  # where it says what is to be built of the files, and how
            loaded: Any = model_class(config).auto.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=compute.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except McError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"A safetensors file in {folder} is damaged or cut short ({error}). Compare the sizes of the files with "
            "those of their source, and copy, download or make it again."
        ) from error
    except RuntimeError as error:
        if any(words in str(error) for words in _NOT_OF_THE_FILES):
            raise
        raise CheckpointError(
            f"The tensors in {folder} have other shapes than config.json describes: {_without_advice(error)} They are "
            "damaged or of different models; copy, download or make the directory again."
        ) from error
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as the causal language model that its config.json and generation_config.json "
            f"describe ({type(error).__name__}: {shown(str(error), 300)})."
        ) from error
    network, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers warns, and goes on with random weights in their place
        raise CheckpointError(
            f"{folder}: its safetensors files lack {len(missing)} tensors of the model:\n{listed(missing)}\nCopy, "
            "download or make the directory again."
        )
    return network.to(device).eval()


def _check_weight_files(folder: Path, config: Any) -> None:
    """Refuses, before anything is built, files outside, pickles, and more layers than there are."""
    if getattr(config, "quantization_config", None) is not None and is_packed_folder(folder):
        check_layer_count(config, open_packed(folder).tensors, folder)
        return
    paths = weight_files(folder)
    if not all(path.is_file() for path in paths):
        missing = ", ".join(path.name for path in paths if not path.is_file())
        raise CheckpointError(
            f"{folder} lacks {missing}: weights are read from safetensors files alone. Convert other formats with "
            "`save_pretrained`, or copy, download or make the directory again."
        )
    if getattr(config, "quantization_config", None) is None:
        _check_floats(folder, paths)


def _check_floats(folder: Path, paths: Sequence[Path]) -> None:
    """Raises CheckpointError for weights that are stored as integers: transformers takes these for their values.

    A file that is damaged is left to loading, which says so.
    """
    wrong = []
    with suppress(SafetensorError), ExitStack() as stack:
        for path in paths:
            handle = stack.enter_context(safe_open(path, "pt"))
            for name in handle.keys():  # noqa: SIM118 a handle is no mapping
                stored = handle.get_slice(name)
                if stored.get_dtype()[0] in "IU" and (
                    name.endswith("weight") or len(stored.get_shape()) > _MATRIX_DIMS
                ):
                    wrong.append(f"{name}: {stored.get_dtype()}")
    if wrong:
        raise CheckpointError(
            f"{folder}: its safetensors files hold {len(wrong)} weights as integers:\n{listed(wrong)}\nThey are "
            "damaged, or quantized in a way that config.json does not name. Copy, download or make the directory again."
        )


def _without_advice(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line or "shape" in line.lower()]
    return (" ".join(lines[:4]) or first_line(error)).rstrip(".") + "."
