"""The session that every stage on a live model opens first: device and dtype, the checkpoint's place and digest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc_cli.artifacts.damage import ALL_BYTES, damaged_files
from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.files import DigestCache, content_digest, read_json, remembers, write_json
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.names import DIGESTS, POINTER
from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.scratch import InMemory, Scratch
from mc_cli.artifacts.store import RESUME, StageFolder, require_done
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError, listed
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.model_name import resolve_model
from mc_cli.models.pieces import Pieces
from mc_cli.models.weight_digests import RECORD, SUFFIX, WeightDigests, Weights, changed_files, header_digest
from mc_cli.settings import RunSettings

# These files decide tokens and logits: configuration, tokenizer in any of its forms, weights, a model's own code.
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".tiktoken", ".txt", ".py")


@dataclass(frozen=True)
class Pointer:
    """The contents of `model.json`: the model's folder, and the name that the user gave."""

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
        pieces = Pieces(self.compute.max_memory_bytes)
        store = Scratch(self.work_dir) if pieces.scratch else InMemory()
        return Checkpoint(self.folder, self.config, dtype=self.dtype, device=self.device, pieces=pieces, store=store)

    def model_digest(self) -> str:
        """One digest over config, tokenizer, and names, sizes and headers of the weights, which are not read."""
        cache = self.digests()
        return content_digest(
            [
                [path.name, path.stat().st_size, header_digest(path)]
                if path.suffix == SUFFIX
                else [path.name, cache.digest(path)]
                for path in self._model_files()
            ]
        )

    def _model_files(self) -> list[Path]:
        found = sorted(path for path in self.folder.iterdir() if path.suffix in _MODEL_SUFFIXES)
        for path in found:
            require_ordinary(path)
        return found

    def _whole_digest(self) -> str | None:
        """One digest over all bytes, by which earlier versions told models apart; None in a dry run that lacks it."""
        cache, files = self.digests(), self._model_files()
        if not remembers() and any(cache.known(path) is None for path in files if path.suffix == SUFFIX):
            return None
        return content_digest([[path.name, cache.digest(path)] for path in files])

    def model_inputs(self) -> dict[str, str]:
        """The entry of a stage's inputs that identifies the model, `calibrated` being true of it.

        A calibration of an earlier version has no record of the weights; it is identified as that version did.
        """
        manifest = require_done(WorkDir(self.work_dir), "calibrate")
        weights = self._recorded(manifest)
        identity = {"model": manifest.inputs["model"]}
        return identity if weights is None else {**identity, "weights": weights.digest}

    def calibrate_inputs(self) -> dict[str, str]:
        """The entry of calibrate's own inputs that identifies the model."""
        done: Manifest | None = None
        with suppress(ArtifactError):  # damaged: it is said, or made anew, where the stage looks at it
            done = Manifest.read(self._calibration)
        if done is not None and RECORD not in done.outputs:
            return {"model": self._whole_digest() or done.inputs["model"]}
        return {"model": self.model_digest()}

    def recorded_weights(self) -> Weights | None:
        """The weights that calibrate read; None from an earlier version. Raises ArtifactError for a damaged record."""
        return self._recorded(require_done(WorkDir(self.work_dir), "calibrate"))

    def _recorded(self, manifest: Manifest) -> Weights | None:
        if RECORD not in manifest.outputs:
            return None
        wrong = damaged_files(self._calibration, {RECORD: manifest.outputs[RECORD]}, up_to_bytes=ALL_BYTES)
        if wrong:
            raise ArtifactError(
                f"{self._calibration} is damaged:\n{listed(wrong)}\nUse --force to make it again: `mc-cli calibrate -w "
                f"{self.work_dir} --force` with its flags, or put the file of that time back."
            )
        return Weights.read(self._calibration)

    @property
    def _calibration(self) -> Path:
        return WorkDir(self.work_dir).folder("calibrate")

    def check_weights(self) -> None:
        """Raises StaleArtifactError where the weights are not those of a finished calibration, changed files read."""
        weights = self.recorded_weights()
        wrong = changed_files(self.folder, weights.digests if weights else {}, self.digests(), read=True)
        if wrong:
            raise StaleArtifactError(
                f"{self._calibration} was made from other weights:\n{listed(wrong)}\nUse --force to rebuild it, or put "
                "the files of that time back."
            )

    def digesting(self, checkpoint: Checkpoint, folder: StageFolder | None) -> WeightDigests:
        """Hashes the checkpoint's files while a stage reads them; `finish` has to be called before its manifest.

        folder   of the stage, where what is read is noted for a resume; None for one that resumes nothing
        """
        weights: Weights | None = None
        if folder is None or folder.folder != self._calibration:
            weights = self.recorded_weights()
        names = {file for tensor in checkpoint.files.tensors.values() for file in tensor.files}
        found = WeightDigests(
            self.folder,
            tuple(sorted(names)),
            self.digests(),
            {} if weights is None else weights.digests,
            None if folder is None else folder.path(f"{RESUME}/{RECORD}"),
        )
        checkpoint.files.on_open = found.opened
        return found

    def remember(self, model: str, revision: str | None) -> None:
        """Notes the model's place for the later stages; `model` and `revision` are what the user named it by."""
        pointer = {"folder": str(self.folder), "model": model, "revision": revision}
        if not (self.work_dir / POINTER).exists() or read_json(self.work_dir / POINTER) != pointer:
            write_json(self.work_dir / POINTER, pointer)

    def calibrated(self) -> Manifest:
        """The manifest of calibrate.

        Raises InputError where it has not run, StaleArtifactError where the model's files are not those it read.
        """
        manifest = require_done(WorkDir(self.work_dir), "calibrate")
        weights = self._recorded(manifest)
        now = self._whole_digest() if weights is None else self.model_digest()
        known = changed_files(self.folder, weights.digests if weights else {}, self.digests(), read=False)
        if now not in (None, manifest.inputs["model"]) or known:
            which = f":\n{listed(known)}\n" if known else ". "
            raise StaleArtifactError(
                f"The files in {self.folder} are not those that calibrate read{which}Run `mc-cli calibrate --force -w "
                f"{self.work_dir}` again with --model, or name with it the place of the model that was calibrated."
            )
        return manifest


def digest_cache(work_dir: Path) -> DigestCache:
    """The work directory's memory of file digests."""
    return DigestCache(work_dir / DIGESTS)


def first_session(work_dir: Path, model: str, revision: str | None, compute: RunSettings) -> Session:
    """Opens the model that `--model` names. Nothing is written, and in a dry run nothing is fetched."""
    if not model:
        raise InputError(
            "--model is missing: give a folder with config.json and *.safetensors, a hub id, or bundled:demo-moe."
        )
    return _open(work_dir, resolve_model(model, revision=revision, fetch=remembers()).resolve(), compute)


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
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{pointer}: the model was at {folder}, and is no longer there. Run `mc-cli calibrate --model NEW_PLACE "
            f"-w {work_dir}`: what is done is kept."
        )
    return _open(work_dir, folder, compute)


def _open(work_dir: Path, folder: Path, compute: RunSettings) -> Session:
    config: Any = read_config(folder, trust_remote_code=compute.trust_remote_code)
    device = device_named(compute.device)
    dtype = dtype_named(compute.dtype, device, stored=config.get_text_config().dtype)
    return Session(work_dir, folder, config, device, dtype, compute)


def device_named(name: str) -> torch.device:
    """The device that `--device` asks for. Raises InputError for cuda where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no CUDA device here. Use --device cpu, or install a CUDA build of torch."
        )
    return torch.device(name)


def dtype_named(name: str, device: torch.device, *, stored: torch.dtype | None) -> torch.dtype:
    """The dtype that `--dtype` asks for; `stored` is the checkpoint's own, where it names one.

    auto is float32 on a CPU, where bfloat16 is slow and rounds what is measured, and the checkpoint's on a GPU.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return stored or torch.bfloat16
