"""Directories that transformers loads, as sources of logits: whole where they fit into memory, else layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from mc_cli.data.batches import Batch
from mc_cli.errors import ArtifactError, McError, listed, shown
from mc_cli.measuring.logit_source import LogitSource, Reading, Walked
from mc_cli.models.checkpoint import REST, Checkpoint, part_tensors
from mc_cli.models.inventory import find_decoder_layers
from mc_cli.models.memory import available_bytes
from mc_cli.models.model_class import model_class
from mc_cli.models.model_folder import read_config
from mc_cli.models.skeleton import compute_dtype
from mc_cli.packed.packed_model import LEARNED, PackedSource

# The part of the free memory that a model may take; the rest is for activations and the tensors under comparison.
_MEMORY_SHARE = 0.7


def open_with_transformers(directory: Path, reading: Reading) -> LogitSource:
    """The model as `from_pretrained` gives it if it fits in 70 % of the free memory, else a layer at a time.

    Packed layers are read by mc-cli's own code, dense ones as those of any checkpoint.
    Raises ArtifactError where the loader refuses the directory, or names a tensor that is missing or left over.
    """
    needed = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    needed *= 2 if reading.dtype == torch.float32 else 1
    free = available_bytes(reading.device) if reading.free_bytes is None else reading.free_bytes
    if free is None or needed <= _MEMORY_SHARE * free:
        return _Whole(directory, reading)
    return _layered(directory, reading)


class _Whole:
    """The model of a directory through from_pretrained."""

    method = "whole model"

    def __init__(self, directory: Path, reading: Reading) -> None:
        self._directory = directory
        config = read_config(directory, trust_remote_code=reading.trust_remote_code)
        # Packed directories of native models bring code that only imports mc_cli; the native class is asked for, as a
        # user has it then.
        options: dict[str, Any] = {"trust_remote_code": type(config).__module__.startswith("transformers_modules")}
        # All that does not fit is listed below.
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        transformers_logging.disable_progress_bar()
        try:
            loaded: Any = model_class(config).auto.from_pretrained(directory, dtype=reading.dtype, **options)
        except McError:
            raise
        except Exception as error:  # transformers may raise anything at a directory that it cannot load
            raise ArtifactError(f"{directory} cannot be loaded: {type(error).__name__}: {error}") from error
        model, info = loaded
        problems = [
            f"{name}: {kind.replace('_', ' ')}"
            for kind, names in info.items()
            for name in _names(names)
            if kind != "unexpected_keys" or name not in reading.beyond
        ]
        _raise_if_any(directory, problems + _misnamed(config, model))
        layers_path = find_decoder_layers(model)
        for part in (REST, *range(len(model.get_submodule(layers_path)))):
            reading.look(part, part_tensors(model, layers_path, part))
        self._model: Any = model.to(reading.device).eval()

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        where = self._model.device, compute_dtype(self._model)
        rows = (batch.select(slice(row, row + 1)).to(*where) for row in range(batch.rows))
        return torch.cat([self._model(**row, use_cache=False).logits.float().cpu() for row in rows])

    @torch.inference_mode()
    def generate(self, batch: Batch, new_tokens: int) -> torch.Tensor:
        prompt = batch.to(self._model.device)
        greedy = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        try:
            return self._model.generate(**prompt, attention_mask=torch.ones_like(prompt.token_ids), **greedy).cpu()
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ArtifactError(
                f"{self._directory / 'generation_config.json'}: nothing can be generated as it says "
                f"({type(error).__name__}: {shown(str(error), 300)}). It came with the model: mend it there, and "
                "calibrate again."
            ) from error

    def close(self) -> None:
        self._model = None


def _layered(directory: Path, reading: Reading) -> LogitSource:
    """The model with one layer in memory, under the policy that the directory carries."""
    trusted = reading.trust_remote_code
    config = read_config(directory, trust_remote_code=trusted)
    pruning = None
    source: Any
    if getattr(config, "quantization_config", None) is not None:
        source = PackedSource(directory, dtype=reading.dtype, device=reading.device, trust_remote_code=trusted)
        if source.layout.pruning is not None:
            learned = [name for name, part in source.packed.items() if part == LEARNED]
            pruning = source.layout.pruning, dict(source.files.read(learned))
    else:
        source = Checkpoint(directory, config, dtype=reading.dtype, device=reading.device)
        _raise_if_any(
            directory, [f"{name}: not part of the model" for name in source.unused if name not in reading.beyond]
        )
    _raise_if_any(directory, _misnamed(config, source.model))
    return Walked(source, pruning, reading.look)


def _misnamed(config: Any, model: Any) -> list[str]:
    """A problem in words for each class that config.json names wrongly: the tensors are another one's."""
    named = tuple(getattr(config, "architectures", None) or ())
    if not named or type(model).__name__ in named:
        return []
    return [f"config.json: names {', '.join(named)}, the tensors are {type(model).__name__}'s"]


def _names(entry: Any) -> Iterator[str]:
    """Names in one entry of transformers' loading info: sets of names, or of tuples that begin with one."""
    for item in entry if isinstance(entry, Iterable) and not isinstance(entry, str) else ():
        yield str(item[0] if isinstance(item, tuple) else item)


def _raise_if_any(directory: Path, problems: list[str]) -> None:
    if problems:
        raise ArtifactError(
            f"{directory}: {len(problems)} things do not fit as it is loaded:\n{listed(problems)}\n"
            "The disk may be faulty; if exporting again gives the same, this is a defect of mc-cli."
        )
