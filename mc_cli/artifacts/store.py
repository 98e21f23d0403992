"""Files that are whole or absent: atomic writes, digests, and the manifest that is written last.

A stage folder passes through three states: absent; begun (`begun.json`, no manifest); done (`manifest.json`).
Killing the process at any moment leaves one of them, never a half-written file under its final name: what is being
written lies in a folder `NAME.partial` beside it, what is being removed in `FOLDER.removed`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.errors import ArtifactError, InputError, StaleArtifactError, listed
from mc_cli.progress import Progress

if TYPE_CHECKING:
    import torch

SCHEMA = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"
PARTIAL_SUFFIX = ".partial"
REMOVED_SUFFIX = ".removed"
RESUME = "resume"  # what only a resume needs: hidden states after the last finished layer

# command -> folder in the work directory, in the order of a run
STAGE_FOLDERS = {
    "calibrate": "calibration",
    "score": "importance",
    "allocate": "plan",
    "quantize": "packed",
    "prune-eval": "evaluation",
}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def write_bytes_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Calls `writer(partial)`, flushes it to disk and moves it to `path` in one step; removes it if that fails.

    Raises ArtifactError where the disk is full or does not take the file; what was at `path` is then still there.
    """
    # A folder of its own, because safetensors writes to a temporary name that it chooses beside its target.
    folder = path.with_name(path.name + PARTIAL_SUFFIX)
    partial = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer(partial)
        partial.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_written(path: Path, error: OSError) -> ArtifactError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(f"{path} could not be written: {error.strerror or error}.")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    quota = " (your quota on it is used up)" if error.errno == errno.EDQUOT else ""
    return ArtifactError(
        f"The disk is full{quota}: {path} could not be written, {shutil.disk_usage(there).free:,} bytes are free in "
        f"{there}. What was finished before is kept; free some space and run the same command again."
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes_with(path, lambda partial: _write_plain(partial, text))


def _write_plain(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN and infinity are refused, since JSON has no word for them."""
    try:
        text = _json_text(content, "\n")
    except ValueError as error:
        raise ArtifactError(f"{path}: a measured value is not finite ({error}); nothing was written.") from error
    write_text(path, text + "\n")


def _json_text(value: Any, margin: str) -> str:
    """JSON as `json.dumps(value, indent=1)` writes it, but a row of numbers takes one line and not one for each.

    margin   line break and indentation of the line that `value` begins in
    """
    # A name is written through a pair with 0, because JSON's names are texts and json turns numbers into them.
    inner = margin + " "
    if isinstance(value, dict) and value:
        pairs = (f"{json.dumps({name: 0})[1:-4]}: {_json_text(item, inner)}" for name, item in value.items())
        return f"{{{inner}{f',{inner}'.join(pairs)}{margin}}}"
    if isinstance(value, list | tuple) and not all(isinstance(item, int | float | type(None)) for item in value):
        return f"[{inner}{f',{inner}'.join(_json_text(item, inner) for item in value)}{margin}]"
    return json.dumps(value, allow_nan=False)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, tensors on the CPU and contiguous."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes_with(path, lambda partial: _save_tensors(partial, ready, dict(metadata or {"format": "pt"})))


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk included, which it tells in its message alone
        found = re.search(r"\(os error ([0-9]+)\)", str(error))
        if found is None and os.strerror(errno.ENOSPC) not in str(error):
            raise
        number = int(found[1]) if found else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


def read_text(path: Path) -> str:
    """The file's text. Raises ArtifactError where it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Run the stage that writes it first.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The file's JSON object. Raises ArtifactError where it is missing or not one."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}. Delete it and run its stage again.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} should hold a JSON object, but holds a {type(content).__name__}.")
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in memory. Raises ArtifactError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Run the stage that writes it first.") from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file: {error}. Delete it and run its stage again."
        ) from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def damaged_files(folder: Path, outputs: Mapping[str, Mapping[str, Any]], *, contents: bool) -> list[str]:
    """A line for each file that is not as it was recorded when it was written: {"sha256", "size_bytes"} by name.

    contents   read all of every file; without it, only sizes are compared
    """
    wrong = []
    for name, facts in outputs.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif path.stat().st_size != facts["size_bytes"]:
            wrong.append(f"{path}: {path.stat().st_size:,} bytes, {facts['size_bytes']:,} when it was written")
        elif contents and file_digest(path) != facts["sha256"]:
            wrong.append(f"{path}: other bytes than were written")
    return wrong


def content_digest(content: Any) -> str:
    """sha256 of the canonical JSON of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_REMEMBERS: ContextVar[bool] = ContextVar("remembers", default=True)


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Inside, digests of input files are worked out but not written down: a dry run leaves the disk as it is."""
    token = _REMEMBERS.set(False)
    try:
        yield
    finally:
        _REMEMBERS.reset(token)


class DigestCache:
    """sha256 of input files, each hashed once: remembered by path, size and modification time in one JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, Any] = read_json(path) if path.exists() else {}
        except ArtifactError:  # only a memory: a damaged one is made anew
            self._known = {}

    def digest(self, path: Path) -> str:
        """The file's sha256, from memory where size and modification time (nanoseconds) are unchanged."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        name = str(path.resolve())
        entry = self._known.get(name)
        if not isinstance(entry, dict) or entry.get("stamp") != stamp or "sha256" not in entry:
            entry = {"stamp": stamp, "sha256": file_digest(path)}
            self._known[name] = entry
            if _REMEMBERS.get():
                write_json(self._path, self._known)
        return entry["sha256"]


@dataclass(frozen=True)
class Manifest:
    """What made a stage folder, from what, with which settings, and the files it holds."""

    stage: str
    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, Mapping[str, Any]]  # file -> {"sha256", "size_bytes"}
    tool_version: str
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, or None where the stage has not finished."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {content.get('schema')!r}; this version reads {SCHEMA}. Use --force to rebuild."
            )
        try:
            return cls(**{**content, "warnings": tuple(content["warnings"])})
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a manifest of this version: {error}. Use --force to rebuild."
            ) from error


@dataclass
class StageFolder:
    """The folder of one stage in a work directory, and whether it is done, begun, new or stale.

    settings   everything that changes the result; what does not (progress, batch of a GPU) stays out
    inputs     name -> digest of what the stage reads: model files, data, fingerprints of earlier stages
    """

    work_dir: Path
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)
    folder_name: str = ""  # "" = the stage's own; another for what a stage makes beside it

    @property
    def folder(self) -> Path:
        return self.work_dir / (self.folder_name or STAGE_FOLDERS[self.stage])

    @property
    def fingerprint(self) -> str:
        return content_digest({"stage": self.stage, "schema": SCHEMA, "settings": self.settings, "inputs": self.inputs})

    def path(self, name: str) -> Path:
        """Where the file `name` of this stage lies."""
        return self.folder / name

    def state(self) -> str:
        """`done`, `begun`, `stale` or `new`, compared with the settings and inputs asked for now.

        A run that stopped before it had written anything, refusing its input for example, leaves a folder like new.
        """
        if not self.folder.exists():
            return "new"
        manifest = Manifest.read(self.folder)
        if manifest is not None:
            return "done" if manifest.fingerprint == self.fingerprint else "stale"
        if not self.path(BEGUN).exists() or not self._holds_work():
            return "new"
        return "begun" if read_json(self.path(BEGUN)).get("fingerprint") == self.fingerprint else "stale"

    def _holds_work(self) -> bool:
        return any(path.name != BEGUN and path.suffix != PARTIAL_SUFFIX for path in self.folder.iterdir())

    def differences(self) -> list[str]:
        """Each setting and input that differs between what lies on disk and what is asked for now."""
        record = self.path(MANIFEST) if self.path(MANIFEST).exists() else self.path(BEGUN)
        if not record.exists():
            return []
        then = read_json(record)
        return [
            line
            for kind, now in (("settings", self.settings), ("inputs", self.inputs))
            for line in _differences(kind[:-1], then.get(kind, {}), json.loads(json.dumps(now)))
        ]

    def begin(self, *, force: bool) -> bool:
        """`needed`, and where it is, `start` at once: for stages that can refuse nothing in between."""
        if not self.needed(force=force):
            return False
        self.start(force=force)
        return True

    def needed(self, *, force: bool) -> bool:
        """True if the stage has to run, False if it is done. Nothing that is whole is changed.

        Raises StaleArtifactError naming every setting and input that changed, unless `force`; ArtifactError for a
        folder that is done but damaged, or that holds files of somebody else.
        """
        _discard_rest(self.folder)
        self._refuse_foreign()
        if not force:
            state = self.state()
            if state == "done":
                self.verify()
                self._clean()
                return False
            if state == "stale":
                raise StaleArtifactError(
                    f"{self.folder} was made with other settings or inputs:\n{listed(self.differences())}\n"
                    "Use --force to rebuild it, another work directory to keep both, or the old settings to continue."
                )
        return True

    def start(self, *, force: bool) -> None:
        """Makes the folder ready to be written; what lies there is removed, unless it is this run's own beginning.

        To be called once everything that could be refused has been read: with `force` it removes a finished result.
        """
        if force or self.state() == "new":
            _discard(self.folder)
        self._clean_partial()
        if not self.path(BEGUN).exists():
            begun = {"fingerprint": self.fingerprint, "settings": self.settings, "inputs": self.inputs}
            write_json(self.path(BEGUN), begun)

    def _refuse_foreign(self) -> None:
        """Raises ArtifactError for a folder that no stage made: it would be removed, with whatever is in it."""
        if not self.folder.exists() or self.path(MANIFEST).exists() or self.path(BEGUN).exists():
            return
        found = sorted(path.name for path in self.folder.iterdir() if path.name != BEGUN + PARTIAL_SUFFIX)
        if found:
            raise ArtifactError(
                f"{self.folder} has neither {MANIFEST} nor {BEGUN}, so {self.stage} did not make it, but it holds "
                f"{len(found)} files or folders ({', '.join(found[:5])}). Move it away, or use another work directory."
            )

    def _clean_partial(self) -> None:
        """Removes what a killed run was writing."""
        for leftover in self.folder.rglob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _clean(self) -> None:
        """Removes what only an unfinished stage needs."""
        shutil.rmtree(self.path(RESUME), ignore_errors=True)
        self._clean_partial()
        self.path(BEGUN).unlink(missing_ok=True)

    def verify(self, *, contents: bool = False) -> None:
        """Raises ArtifactError if a file of the manifest is missing or has another size, or other `contents`."""
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise ArtifactError(f"{self.folder} has no {MANIFEST}: the stage has not finished. Run it again.")
        wrong = damaged_files(self.folder, manifest.outputs, contents=contents)
        if wrong:
            raise ArtifactError(f"{self.folder} is damaged:\n{listed(wrong)}\nUse --force to rebuild this stage.")

    def warn(self, message: str, progress: Progress) -> None:
        """Shows a warning now, and keeps it for the manifest."""
        if message not in self.warnings:
            self.warnings.append(message)
            progress.warn(message)

    def recorded_warnings(self) -> tuple[str, ...]:
        """The warnings in the manifest of a finished stage."""
        manifest = Manifest.read(self.folder)
        return manifest.warnings if manifest else ()

    def finish(self, tool_version: str) -> Manifest:
        """Writes the manifest, from which on the stage is done, and removes what only a resume needed."""
        self._clean_partial()
        outputs = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_file() and path.name not in (BEGUN, MANIFEST) and name.parts[0] != RESUME:
                outputs[str(name)] = {"sha256": file_digest(path), "size_bytes": path.stat().st_size}
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            settings=self.settings,
            inputs=self.inputs,
            outputs=outputs,
            tool_version=tool_version,
            warnings=tuple(self.warnings),
        )
        write_json(self.path(MANIFEST), asdict(manifest))
        self._clean()
        return manifest


def _discard(folder: Path) -> None:
    """Removes a folder; killed half-way, none of it is left under its own name."""
    if folder.exists():
        folder.rename(folder.with_name(folder.name + REMOVED_SUFFIX))
        _discard_rest(folder)


def _discard_rest(folder: Path) -> None:
    shutil.rmtree(folder.with_name(folder.name + REMOVED_SUFFIX), ignore_errors=True)


def _differences(kind: str, then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """One line per value that differs, nested mappings entry by entry."""
    lines = []
    for name in sorted(set(now) | set(then)):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(kind, before, after, f"{where}{name}.")
        elif before != after:
            lines.append(f"{kind} {where}{name}: made with {_short(before)}, asked for {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def require_done(work_dir: Path, stage: str) -> Manifest:
    """The manifest of a finished earlier stage, made from what the stages before it are now.

    Raises InputError naming the command to run where it is not finished, StaleArtifactError where a stage that it read
    has been made anew since.
    """
    folder = work_dir / STAGE_FOLDERS[stage]
    manifest = Manifest.read(folder)
    if manifest is None:
        begun = (folder / BEGUN).exists()
        raise InputError(
            f"{folder} {'is not finished' if begun else 'does not exist'}: this stage reads it. "
            f"Run `mc-cli {stage} -w {work_dir}` first."
        )
    for name in STAGE_FOLDERS:
        read = Manifest.read(work_dir / STAGE_FOLDERS[name]) if name in manifest.inputs else None
        if read is not None and read.fingerprint != manifest.inputs[name]:
            raise StaleArtifactError(
                f"{folder} was made from an earlier run of {name}, which has been made anew since. "
                f"Run `mc-cli {stage} -w {work_dir} --force` first."
            )
    return manifest
