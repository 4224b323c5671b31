"""Words for the faults of a path, before anything opens it: a pipe would be waited for, a device read for ever."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_entropic.errors import UserError

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
)


def file_problem(path: Path) -> str | None:
    """Words for why `path` cannot be read as a file; None if it can."""
    return _problem(path, stat.S_ISREG, "file", os.R_OK)


def directory_problem(path: Path) -> str | None:
    """Words for why `path` cannot be read as a directory; None if it can."""
    return _problem(path, stat.S_ISDIR, "directory", os.R_OK | os.X_OK)


def new_directory_problem(path: Path) -> str | None:
    """Words for why nothing can be written into the directory `path`, which need not exist yet; None if it can."""
    place = path
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        mode = place.stat().st_mode
    except (OSError, ValueError) as error:
        return _words(place, error, "directory")
    if not stat.S_ISDIR(mode):
        return f"{place} is {_kind(mode)}, not a directory"
    # Asking for permission is not enough: root may do everything and still cannot write to a read-only file system.
    try:
        with tempfile.TemporaryDirectory(prefix=".me-check-", dir=place):
            pass
    except OSError as error:
        return f"nothing can be written in {place}: {error.strerror}"
    longest = os.pathconf(place, "PC_NAME_MAX")
    too_long = next((part for part in path.parts if len(os.fsencode(part)) > longest), None)
    return None if too_long is None else f"a name in it is longer than {longest} bytes"


def make_directory(path: Path) -> None:
    """Create a directory that somebody named, with those above it, unless it is there.

    Raises:
        UserError: there can be none, as below /proc.
        OSError: the file system refuses, or the path is that of a file; see `errors.explained`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no directory can be made there") from error


def _problem(path: Path, wanted: Callable[[int], bool], noun: str, access: int) -> str | None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return _words(path, error, noun)
    if not wanted(mode):
        return f"is {_kind(mode)}, not a {noun}"
    return None if os.access(path, access) else "not readable: permission denied"


def _kind(mode: int) -> str:
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")


def _words(path: Path, error: OSError | ValueError, noun: str) -> str:
    if not isinstance(error, OSError):
        return "a path cannot hold a NUL character"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself"
    if error.errno == errno.ENAMETOOLONG:
        return "a name in it is too long"
    if error.errno == errno.ENOENT:
        if path.is_symlink():
            return f"no such {noun}: it is a link to {os.readlink(path)}, which is not there"
        return f"no such {noun}"
    if error.errno == errno.ENOTDIR:
        return f"no such {noun}: one of the directories it names is a file"
    return f"not readable: {error.strerror}"
