"""Checks which files may be read: ordinary ones, that lie in the folder they are said to lie in.

A model or an export can be downloaded from a stranger, and an index or a link in it may name any file of this machine.
"""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from mc_cli.errors import InputError


def file_inside(folder: Path, name: object) -> Path:
    """`folder / name`, for a name that was read from a file of that folder, such as a shard in an index.

    The file need not exist. Raises InputError, naming both, for anything but a relative path without `..`, for a link
    that leads out of `folder`, and for what is there but is no ordinary file. Links of the hub's cache, whose snapshots
    point to `blobs/` of the same model, lead nowhere else and are allowed.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{folder}: {name!r:.80} is no file name. Copy, download or make the folder again.")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise InputError(
            f"{folder} names the file {name!r:.200}, which lies outside it; nothing outside the folder is read. Put "
            "the file into the folder and name it without a path."
        )
    path = folder / name
    require_inside(folder, path)
    return path


def require_inside(folder: Path, path: Path) -> None:
    """Raises InputError where `path`, links followed, leads out of `folder` or to no ordinary file."""
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that point at each other
        raise InputError(f"{path} cannot be read: {error}. Copy, download or make the folder again.") from error
    if not target.is_relative_to(home) and not _in_hub_cache(home, target):
        raise InputError(
            f"{path} is a link to {target}, outside of {home}; nothing outside the folder is read. Copy the file into "
            "the folder in place of the link."
        )
    require_ordinary(path)


def require_ordinary(path: Path) -> None:
    """Raises InputError for a folder, pipe, socket or device, whose reading may never end, and for a link to nothing.

    What is not there at all passes: its reader says so.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(
                f"{path} is a link to {path.readlink()}, which is not there. Mend the link, or put the file itself "
                "in its place."
            ) from None
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL byte
        raise InputError(f"{str(path)!r} is no file name: {error}.") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a {_kind(mode)}, not a file. Name an ordinary file.")


def _in_hub_cache(home: Path, target: Path) -> bool:
    """Whether `home` is a snapshot of the hub's cache and `target` one of the same model's blobs."""
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "folder",
        stat.S_IFIFO: "pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")
