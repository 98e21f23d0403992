"""Errors of the system when it refuses a file: one paragraph each, which names the file and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_KEPT = "What was finished before is kept; "
_WHAT_TO_DO = {
    errno.EFBIG: "The file is larger than this file system, or a limit of this shell (`ulimit -f`), lets a file grow. "
    f"{_KEPT}raise the limit or name a place elsewhere, and run the same command again.",
    errno.EIO: f"The disk or the network behind it may be faulty. {_KEPT}look at the system's log, name a place on "
    "another disk if this one fails again, and run the same command again.",
    errno.EROFS: f"{_KEPT}name another place, and run the same command again.",
    errno.EACCES: f"{_KEPT}name another place, or see to the permissions of this one, and run the same command again.",
    errno.EPERM: f"{_KEPT}name another place, or see to the permissions of this one, and run the same command again.",
    errno.EBUSY: f"{_KEPT}close what uses it, or name another place, and run the same command again.",
    errno.ENOTDIR: "A part of this path is a file, where a folder is needed. Move it away, or name another place.",
    errno.EISDIR: "A folder lies where a file is needed. Move it away, or name another place.",
    errno.EEXIST: "Something lies where a folder is needed. Move it away, or name another place.",
    errno.ENOTEMPTY: "A folder with something in it lies there. Move it away, or name another place.",
    errno.ENAMETOOLONG: "Choose a shorter name: one piece of a path has 255 bytes at most, and some are added to it.",
    errno.ELOOP: "Links in this path point at each other. Mend them, or name another place.",
    errno.EMFILE: f"Too many files are open. {_KEPT}raise the limit (`ulimit -n`), and run the same command again.",
    errno.ENFILE: f"Too many files are open. {_KEPT}close other programs, and run the same command again.",
    errno.ENOENT: "Something else removed it, or a folder above it. Run the same command again.",
    errno.ESTALE: f"The network file system was mounted anew. {_KEPT}run the same command again.",
}
_ELSE = f"{_KEPT}see to this file or name another place, and run the same command again."


def refusal(error: OSError, path: Path | str | None = None, *, action: str = "") -> str:
    """The paragraph for a file call that failed.

    path     the file it is about; None: the one that the error names
    action   what was not done, such as "could not be written"; empty: only what the system says
    """
    if isinstance(error, MemoryError):
        return str(error)
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = str(path) if path is not None else " and ".join(named) or "A file (the system does not say which)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        lost = f"while writing {where}" if path is None else f": {where} could not be written"
        return _full(f" {lost}" if path is None else lost, where, error)
    reason = error.strerror or str(error) or type(error).__name__
    what_to_do = _WHAT_TO_DO.get(error.errno or 0, _ELSE)
    return f"{where} {action}: {reason}. {what_to_do}" if action else f"{where}: {reason}. {what_to_do}"


def _full(lost: str, where: str, error: OSError) -> str:
    """A full disk: of bytes, of files, or of what this user may take."""
    quota = " (your quota on it is used up)" if error.errno == errno.EDQUOT else ""
    again = "What was finished before is kept; free some space and run the same command again."
    there = _existing(Path(where))
    if there is None:
        return f"The disk is full{quota}{lost}. {again}"
    if not quota and _without_inodes(there):
        return (
            f"The disk is full{lost}, the file system of {there} has no inodes left: it can hold no more files, "
            "whatever their size. What was finished before is kept; remove some files, or name a place elsewhere, and "
            "run the same command again."
        )
    free_bytes = shutil.disk_usage(there).free
    return f"The disk is full{quota}{lost}, {free_bytes:,} bytes are free in {there}. {again}"


def _existing(path: Path) -> Path | None:
    """The nearest folder above `path` that exists, None where that cannot be told."""
    for parent in path.absolute().parents:
        try:
            if parent.is_dir():
                return parent
        except (OSError, ValueError):
            continue
    return None


def _without_inodes(folder: Path) -> bool:
    try:
        found = os.statvfs(folder)
    except (OSError, AttributeError):  # no such call on Windows
        return False
    return found.f_files > 0 and found.f_favail == 0
