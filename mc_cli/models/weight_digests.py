"""Digests of the weights that a stage reads: of headers at its start, in full while it computes.

A model of 93 GB takes minutes to read. So a stage begins on the names, sizes and safetensors headers of its weight
files, and a thread hashes each file once the stage has opened it; in calibrate the others too, as soon as it has time.
calibrate records the digests; later stages compare theirs before they write a manifest; a resumed run compares with
what its own beginning noted.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import DigestCache, content_digest, file_stamp, read_json, write_json
from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.states import read_sealed, write_sealed
from mc_cli.errors import ArtifactError, StaleArtifactError, listed

RECORD = "weights.json"
SUFFIX = ".safetensors"
_CHUNK_BYTES = 1 << 24
_NOW, _LATER = 0, 1  # files that the stage reads are hashed first, while their pages are in memory
_LARGEST_HEADER = 10**8  # safetensors' own limit


def header_digest(path: Path) -> str:
    """sha256 of a safetensors file's header; of its beginning where it has none that can be read."""
    require_ordinary(path)
    with path.open("rb") as handle:
        length = handle.read(8)
        rest = handle.read(min(int.from_bytes(length, "little"), _LARGEST_HEADER))
    return hashlib.sha256(length + rest).hexdigest()


@dataclass(frozen=True)
class Weights:
    """sha256 and size of every weight file, by name, as calibrate read them."""

    files: Mapping[str, Mapping[str, Any]]

    @property
    def digest(self) -> str:
        """One digest of all."""
        return content_digest({name: facts["sha256"] for name, facts in self.files.items()})

    @property
    def digests(self) -> dict[str, str]:
        """Name -> sha256."""
        return {name: str(facts["sha256"]) for name, facts in self.files.items()}

    def write(self, folder: Path) -> None:
        """Writes the record of a stage's folder."""
        write_json(folder / RECORD, {"files": dict(self.files)})

    @classmethod
    def read(cls, folder: Path) -> Weights:
        """The record in a stage's folder. Raises ArtifactError where it is missing or damaged."""
        path = folder / RECORD
        files = read_json(path).get("files")
        if not isinstance(files, dict) or not all(
            isinstance(facts, dict) and isinstance(facts.get("sha256"), str) for facts in files.values()
        ):
            raise ArtifactError(f"{path} is damaged: it names no sha256 for each file. Run calibrate --force again.")
        return cls(files)


def changed_files(folder: Path, recorded: Mapping[str, str], cache: DigestCache, *, read: bool) -> list[str]:
    """A line for each weight file in `folder` that is not the recorded one: name -> sha256.

    read   hash files that the cache does not know; without it they are taken for unchanged
    """
    wrong = []
    for name, wanted in recorded.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
            continue
        found = cache.digest(path) if read else cache.known(path)
        if found is not None and found != wanted:
            wrong.append(_difference(path, found, wanted))
    return wrong


@dataclass
class WeightDigests:
    """Hashes the weight files of one run of a stage, those first that the stage has opened.

    expected   name -> sha256 that calibrate recorded; empty in calibrate
    record     where this run notes which files it has read, for a resume; None: nothing is resumed
    """

    folder: Path
    names: tuple[str, ...]
    cache: DigestCache
    expected: Mapping[str, str] = field(default_factory=dict)
    record: Path | None = None

    def __post_init__(self) -> None:
        self._stamps = {name: file_stamp(self.folder / name) for name in self.names}
        self._digests: dict[str, str] = {}
        self._opened: set[str] = set()
        self._noted: dict[str, Any] = {}
        self._work: queue.PriorityQueue[tuple[int, str]] = queue.PriorityQueue()
        self._done: queue.SimpleQueue[tuple[str, str] | Exception] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._hash_all, name="weight digests", daemon=True)

    def __enter__(self) -> WeightDigests:
        """Compares the files with what an earlier part of this run noted. Raises StaleArtifactError for other ones."""
        earlier = self._earlier()
        problems = []
        for name, stamp in self._stamps.items():
            path, then = self.folder / name, earlier.get(name, {})
            same = then.get("stamp") == stamp
            digest = then.get("sha256") if same else None
            if then and not same:
                problems += self._compare_with_earlier(path, then.get("sha256") or self.expected.get(name))
            digest = digest or self.cache.known(path)
            if digest is not None:
                self._digests[name] = digest
        if problems:
            raise StaleArtifactError(
                f"The model's weights were exchanged since this run began:\n{listed(problems)}\nPut the files of that "
                "time back to go on where it was, or start over with --force."
            )
        self._compare()
        self._note()
        if not self.expected:  # nobody knows them yet, and a resume would have nothing to compare with
            self._ask(self.names, _LATER)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops the thread, which may be in the middle of a file."""
        self._stopped.set()
        self._work.put((_NOW, ""))
        self._thread.join()

    def opened(self, name: str) -> None:
        """Notes that the stage begins to read a file. Raises StaleArtifactError once one is known to differ."""
        if name not in self._opened:
            self._opened.add(name)
            self._ask([name], _NOW)
        self.check()

    def check(self) -> None:
        """Takes in what the thread has finished. Raises StaleArtifactError for weights that calibrate did not read."""
        news = False
        while not self._done.empty():
            news = True
            self._take(self._done.get())
        if news:
            self._compare()
            self._note()

    def finish(self) -> Weights:
        """The digests of all files, hashed by now. Raises StaleArtifactError where one was changed or is another."""
        self._ask(self.names, _NOW)
        while len(self._digests) < len(self.names):
            self._take(self._done.get())
        self._compare()
        moved = [name for name in self.names if self._stamp_now(name) != self._stamps[name]]
        # A file that was only touched, by a backup for example, has other times and the same bytes.
        wrong = changed_files(self.folder, {name: self._digests[name] for name in moved}, self.cache, read=True)
        if wrong:
            raise StaleArtifactError(
                f"The model's weights were exchanged while this stage read them:\n{listed(wrong)}\nRun it again with "
                "--force, and leave the files alone until it has ended."
            )
        sizes = {name: stamp[0] for name, stamp in self._stamps.items()}
        return Weights(
            {name: {"sha256": self._digests[name], "size_bytes": sizes[name]} for name in sorted(self.names)}
        )

    def _stamp_now(self, name: str) -> list[int] | None:
        path = self.folder / name
        return file_stamp(path) if path.is_file() else None

    def _earlier(self) -> dict[str, Any]:
        if self.record is None or not self.record.exists():
            return {}
        noted = read_sealed(self.record)
        if not all(isinstance(entry, dict) for entry in noted.values()):
            raise ArtifactError(f"{self.record} is damaged. Use --force to rebuild this stage.")
        return noted

    def _compare_with_earlier(self, path: Path, wanted: str | None) -> list[str]:
        """Hashed here and now: a run must not go on for hours on other weights than it began with."""
        if wanted is None:
            return [f"{path}: changed before its digest was made"]
        found = self.cache.digest(path)
        return [] if found == wanted else [_difference(path, found, wanted)]

    def _ask(self, names: Iterable[str], when: int) -> None:
        for name in names:
            if name in self._stamps and name not in self._digests:
                self._work.put((when, name))

    def _take(self, found: tuple[str, str] | Exception) -> None:
        if isinstance(found, Exception):
            raise found
        name, digest = found
        self._digests[name] = digest
        self.cache.remember(self.folder / name, self._stamps[name], digest)

    def _compare(self) -> None:
        wrong = [
            _difference(self.folder / name, digest, self.expected[name])
            for name, digest in sorted(self._digests.items())
            if name in self.expected and digest != self.expected[name]
        ]
        if wrong:
            raise StaleArtifactError(
                f"Weights of the model are not those that calibrate read:\n{listed(wrong)}\nPut the files of that time "
                "back and run this stage again with --force, or run calibrate --force and all stages after it."
            )

    def _note(self) -> None:
        """Writes down which files this run reads, before anything that it computes from them."""
        if self.record is None:
            return
        now = {
            name: {"stamp": stamp} | ({"sha256": self._digests[name]} if name in self._digests else {})
            for name, stamp in self._stamps.items()
        }
        if now != self._noted:
            write_sealed(self.record, now)
            self._noted = now

    def _hash_all(self) -> None:
        hashed: set[str] = set()
        while not self._stopped.is_set():
            _, name = self._work.get()
            if not name or name in hashed:
                continue
            hashed.add(name)
            try:
                digest = self._hash(self.folder / name)
                if digest is not None:
                    self._done.put((name, digest))
            except Exception as error:  # raised again where the stage takes it in
                self._done.put(ArtifactError(f"{self.folder / name} cannot be read: {error}."))

    def _hash(self, path: Path) -> str | None:
        """The file's sha256; None where the stage has ended meanwhile. Hashing a chunk lets other threads compute."""
        found = hashlib.sha256()
        with path.open("rb", buffering=0) as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                if self._stopped.is_set():
                    return None
                found.update(chunk)
        return found.hexdigest()


def _difference(path: Path, found: str, wanted: str) -> str:
    return f"{path}: sha256 {found[:16]}..., was {wanted[:16]}..."
