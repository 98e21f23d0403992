"""One process at a time in a work directory, and one at an export's target.

The lock is the system's (`flock`) on a file that says who holds it, so a process that was killed holds nothing. Where a
file system has no such locks, a file that is made only if it is not there takes their place; then a dead process is
told by its number. Where nothing can be written, nothing can be torn either: there is no lock, and none is needed.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mc_cli.artifacts.leftovers import PARTIAL_SUFFIX, remove_partial
from mc_cli.artifacts.names import DIGESTS, EXPORTS, POINTER
from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import BusyError, InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".mc-cli-lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_TRIES = 100  # a lock file that its holder removes while we open it is opened anew
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
_TIDIED = (DIGESTS, POINTER, EXPORTS)  # files of a work directory that may be half-written


@contextmanager
def work_dir_lock(work_dir: Path) -> Iterator[None]:
    """Holds the work directory, which is made if need be, and tidies what a killed process left beside the stages.

    Raises BusyError where another process works in it, InputError where it is a file. Entered again inside, it does
    nothing.
    """
    if os.path.lexists(work_dir) and not work_dir.is_dir():
        raise InputError(
            f"-w {work_dir} is a file or a dead link, not a directory. Name one, which is made if need be."
        )
    with _lock(work_dir / LOCK, f"the work directory {work_dir}", f"`mc-cli status -w {work_dir}` shows how far it is"):
        for name in _TIDIED:
            remove_partial(work_dir / (name + PARTIAL_SUFFIX))
        yield


def process_in(work_dir: Path) -> str:
    """The process that works in the directory now, in words; empty where none does, or none that can be told."""
    for path in (work_dir / LOCK, work_dir / f"{LOCK}.pid"):
        if path.is_file() and (holder := _holder(path)) and not _is_dead(holder):
            return f"process {holder.get('pid')} on {holder.get('host')} is at it since {holder.get('since')}"
    return ""


@contextmanager
def target_lock(target: Path) -> Iterator[None]:
    """Holds the place of an export, by a file beside it. Raises BusyError where another process exports to it."""
    with _lock(target.with_name(f".{target.name}.lock"), f"--out {target}", "name another directory"):
        yield


@contextmanager
def _lock(path: Path, what: str, instead: str) -> Iterator[None]:
    place = path.absolute()
    if place in _HELD.get():
        yield
        return
    made = _make_folders(place.parent)
    descriptor, name = _acquired(place, what, instead)
    token = _HELD.set(_HELD.get() | {place})
    try:
        yield
    finally:
        _HELD.reset(token)
        if name is not None:
            with suppress(OSError):
                name.unlink()
        if descriptor is not None:
            os.close(descriptor)
        for folder in made:  # nothing was put there: a refused input leaves no empty folder
            with suppress(OSError):
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder with those above it; gives the new ones, innermost first."""
    new: list[Path] = []
    try:
        missing = folder
        while not missing.exists():
            new.append(missing)
            missing = missing.parent
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(refusal(error, folder, action="cannot be made")) from error
    except ValueError as error:
        raise InputError(f"{str(folder)!r} is no file name: {error}. Choose another one.") from error
    return new


def _acquired(path: Path, what: str, instead: str) -> tuple[int | None, Path | None]:
    """(descriptor that holds the lock, file to remove at the end); None where nothing can be written."""
    for _ in range(_TRIES):
        descriptor = _opened(path)
        if descriptor is None:
            return None, None
        try:
            supported = _flock(descriptor)
        except BlockingIOError:
            holder = _holder(path)
            os.close(descriptor)
            raise _busy(what, instead, holder) from None
        if not supported:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            return None, _exclusive(path, what, instead)
        if _still_there(descriptor, path):
            with suppress(OSError):  # a full disk: who holds it is not said, and it is held all the same
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _ourselves())
            return descriptor, path
        os.close(descriptor)
    raise _busy(what, instead, {})


def _opened(path: Path) -> int | None:
    """The lock file, opened; None where there is none and nothing can be written."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise InputError(refusal(error, path, action="could not be made")) from error
    try:
        return os.open(path, os.O_RDONLY)  # another user's, who may hold it
    except OSError:
        return None


def _flock(descriptor: int) -> bool:
    """Takes the lock, False where there are none. Raises BlockingIOError where another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise BlockingIOError(error.errno, error.strerror) from error
    return True


def _still_there(descriptor: int, path: Path) -> bool:
    """Whether the file that we locked is still the one of that name: its holder removes it at the end."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _exclusive(path: Path, what: str, instead: str) -> Path:
    """A lock by the file's presence alone; one whose process is dead is taken over."""
    name = path.with_name(path.name + ".pid")
    for _ in range(_TRIES):
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            holder = _holder(name)
            if not _is_dead(holder):
                raise _busy(what, f"{instead}; if it has ended, remove {name}", holder) from None
            _take_away(name, holder)
            continue
        except OSError as error:
            raise InputError(refusal(error, name, action="could not be made")) from error
        os.write(descriptor, _ourselves())
        os.close(descriptor)
        return name
    raise _busy(what, instead, {})


def _take_away(name: Path, holder: dict[str, Any]) -> None:
    """Removes a dead process's file, and puts back what another one has made there meanwhile."""
    aside = name.with_name(f"{name.name}.{os.getpid()}")
    with suppress(OSError):
        name.rename(aside)
        if _holder(aside) == holder:
            aside.unlink()
        else:
            aside.rename(name)


def _ourselves() -> bytes:
    command = " ".join(["mc-cli" if sys.argv[0].endswith(("mc-cli", "__main__.py")) else sys.argv[0], *sys.argv[1:]])
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": command[:300],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(os.getpid()),
    }
    return json.dumps(who).encode()


def _holder(path: Path) -> dict[str, Any]:
    """Who holds a lock, as far as its file says."""
    for _ in range(20):  # between making the file and writing to it
        with suppress(OSError, ValueError, RecursionError):
            content = json.loads(path.read_bytes())
            if isinstance(content, dict):
                return content
        time.sleep(0.005)
    return {}


def _started(pid: int) -> str:
    """When a process began, in the system's own count: a number that comes again belongs to another process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process that a file names has ended; of another machine's nothing is known."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return bool(holder.get("started")) and _started(pid) not in ("", holder["started"])


def _busy(what: str, instead: str, holder: dict[str, Any]) -> BusyError:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')} (`{holder.get('command')}`), since "
        who += str(holder.get("since"))
    return BusyError(
        f"{what[0].upper()}{what[1:]} is in use by {who}. Two runs at once would write over each other's files, so "
        f"this one has not begun. Wait until the other has ended, or stop it; {instead}."
    )
