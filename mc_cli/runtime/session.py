"""What every stage on a live model needs first: device and dtype, the checkpoint's place and digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.files import DigestCache, content_digest, read_json, write_json
from mc_cli.artifacts.store import Manifest, require_done
from mc_cli.errors import InputError, StaleArtifactError
from mc_cli.runtime.checkpoint import Checkpoint, read_config, resolve_model
from mc_cli.settings import RunSettings

POINTER = "model.json"  # where the model lies on this machine; not an artifact: the digests say which model it is
# What decides tokens and logits: configuration, tokenizer in any of its forms, weights, a model's own code.
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".tiktoken", ".txt", ".py")


@dataclass(frozen=True)
class Pointer:
    """What `model.json` holds: the model's folder, and what the user named it by."""

    folder: str
    model: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class Session:
    """A model folder, opened for a stage."""

    work_dir: Path
    folder: Path
    config: Any
    device: torch.device
    dtype: torch.dtype
    compute: RunSettings

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.config.get_text_config().vocab_size)

    def batch_size(self, length: int) -> int:
        """Sequences of `length` tokens per forward."""
        return max(1, self.compute.batch_tokens // length)

    def digests(self) -> DigestCache:
        """Digests of input files, remembered in the work directory."""
        return digest_cache(self.work_dir)

    def open_checkpoint(self) -> Checkpoint:
        """The checkpoint over a skeleton on the session's device."""
        return Checkpoint(self.folder, self.config, dtype=self.dtype, device=self.device)

    def model_digest(self) -> str:
        """One digest over config, tokenizer and weights."""
        cache = self.digests()
        files = sorted(path for path in self.folder.iterdir() if path.suffix in _MODEL_SUFFIXES)
        return content_digest([[path.name, cache.digest(path)] for path in files])

    def remember(self, model: str, revision: str | None) -> None:
        """Notes the model's place for the later stages; `model` and `revision` are what the user named it by."""
        pointer = {"folder": str(self.folder), "model": model, "revision": revision}
        if not (self.work_dir / POINTER).exists() or read_json(self.work_dir / POINTER) != pointer:
            write_json(self.work_dir / POINTER, pointer)

    def calibrated(self) -> Manifest:
        """The manifest of calibrate.

        Raises InputError where it has not run, StaleArtifactError where the model's files are not those it read.
        """
        manifest = require_done(self.work_dir, "calibrate")
        if manifest.inputs["model"] != self.model_digest():
            raise StaleArtifactError(
                f"The files in {self.folder} are not those that calibrate read. Run `mc-cli calibrate --force -w "
                f"{self.work_dir}` again with --model, or name with it the place of the model that was calibrated."
            )
        return manifest


def digest_cache(work_dir: Path) -> DigestCache:
    """The work directory's memory of file digests."""
    return DigestCache(work_dir / "digests.json")


def first_session(work_dir: Path, model: str, revision: str | None, compute: RunSettings) -> Session:
    """Opens the model that `--model` names. Nothing is written."""
    if not model:
        raise InputError(
            "--model is missing: give a folder with config.json and *.safetensors, a hub id, or bundled:demo-moe."
        )
    return _open(work_dir, resolve_model(model, revision=revision).resolve(), compute)


def later_session(work_dir: Path, compute: RunSettings) -> Session:
    """Opens the model that calibrate noted. Raises InputError where it has moved."""
    pointer = work_dir / POINTER
    if not pointer.exists():
        raise InputError(
            f"{work_dir} has no {POINTER}: it is not a work directory, or calibrate has not run. "
            "Run `mc-cli calibrate` first."
        )
    with reading(pointer, "a note of the model's place", "Run calibrate again with --model."):
        folder = Path(read_as(Pointer, read_json(pointer)).folder)
    if not folder.is_dir():
        raise InputError(
            f"The model was at {folder}, and is no longer there. Run `mc-cli calibrate --model NEW_PLACE "
            f"-w {work_dir}`: what is done is kept."
        )
    return _open(work_dir, folder, compute)


def _open(work_dir: Path, folder: Path, compute: RunSettings) -> Session:
    config: Any = read_config(folder, trust_remote_code=compute.trust_remote_code)
    device = device_named(compute.device)
    dtype = dtype_named(compute.dtype, device, stored=config.get_text_config().dtype)
    return Session(work_dir, folder, config, device, dtype, compute)


def device_named(name: str) -> torch.device:
    """What `--device` asks for. Raises InputError for cuda where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no CUDA device here. Use --device cpu, or install a CUDA build of torch."
        )
    return torch.device(name)


def dtype_named(name: str, device: torch.device, *, stored: torch.dtype | None) -> torch.dtype:
    """What `--dtype` asks for; `stored` is the checkpoint's own, where it names one.

    auto is float32 on a CPU, where bfloat16 is slow and rounds what is measured, and the checkpoint's on a GPU.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return stored or torch.bfloat16
