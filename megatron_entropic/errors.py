"""Failures with a message meant for the person who started the run, and the exit status of each kind.

UserError   2    the person must change something: configuration, files, options
RunError    1    the run ended: what happened, where, what to do. A scheduler may try again
StopAsked   75   a signal asked for it; the state is saved
Interrupted 130  the same by Ctrl-C
others      1    a bug of ours, with its traceback
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """The person who started the command must change something; the message says what and where. Exit status 2.

    It is a ValueError so that a reader of one row or one value can turn it into a line of a longer list of problems.
    """


class RunError(RuntimeError):
    """A run cannot go on; the message says what happened, where, and what to do. Exit status 1."""


class PeerDied(RunError):
    """A process of the run is gone: the message names it and the phase it was needed in."""


class StopAsked(RunError):
    """A signal asked the run to end: its state is saved and the same command continues. Exit status 75."""


class Interrupted(StopAsked):
    """Ctrl-C asked the run to end, by a person who does not want it started again by a scheduler. Exit status 130."""


class PhaseTimeout(RunError):
    """A wait between processes passed its limit: the message names the phase and who is missing."""


_PATHS = {
    errno.EISDIR: "is a directory, where a file is needed",
    errno.ENOTDIR: "one of the directories it names is a file",
    errno.ELOOP: "is a link that leads back to itself",
    errno.ENAMETOOLONG: "a name in it is too long",
    errno.EEXIST: "is there already and is no directory, which is needed here",
}
"""Words for what is wrong with a path that somebody gave, by errno."""

_CURES = {
    errno.ENOSPC: "make room there, or choose another folder",
    errno.EDQUOT: "the quota is used up: make room there, or choose another folder",
    errno.EFBIG: "a limit of file sizes (ulimit -f) is in the way",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "the user who runs this needs the right to it",
    errno.EPERM: "the user who runs this needs the right to it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give",
    errno.ENOMEM: "the machine, or a limit of memory (ulimit -v), has no more to give",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.EADDRINUSE: "another process listens there",
    errno.EIO: "the disk or the network file system failed",
    errno.ESTALE: "the network file system failed",
    errno.ENOTCONN: "the network file system is gone",
}
"""Words for what a person can do where the machine refused something, by errno."""

_OUTAGES = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Values of errno that say nothing about the file: the same command may succeed later or elsewhere."""


def explained(error: OSError) -> UserError | RunError | None:
    """Meaning of an error of the operating system for the person who started the command; None: it is a bug of ours."""
    what = _PATHS.get(error.errno or 0) or error.strerror or str(error)
    if error.filename is not None:
        what = f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {what}"
    if error.errno in _PATHS:
        return UserError(what)
    if error.errno in _CURES:
        # Locks between processes, and memory that they share, are files in /dev/shm that no message names.
        nameless = error.errno == errno.ENOSPC and error.filename is None
        cure = "`df` shows which disk is full, or whether /dev/shm is" if nameless else _CURES[error.errno]
        return RunError(f"{what}; {cure}")
    return None


def missing_model(hf_dir: Path) -> str:
    """Words for a model directory that is not there; a name of the Hugging Face hub gets the command that fetches it.

    Args:
        hf_dir: the directory as it was given, or made absolute from the current directory.
    """
    words = f"{hf_dir}: no such model directory"
    given = hf_dir
    if hf_dir.is_absolute() and hf_dir.is_relative_to(Path.cwd()):
        given = hf_dir.relative_to(Path.cwd())
    if _HUB_NAME.fullmatch(str(given)):
        words += (
            f"; models are local directories, nothing is downloaded here. If {given} is a name on the Hugging Face "
            f"hub, fetch it once: hf download {given} --local-dir {given}"
        )
    return words


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""Pattern owner/name of the Hugging Face hub, which is also how a relative path can look."""


class Problems:
    """Everything that is wrong with an input, collected for one message."""

    _LISTED = 20
    """Number of details that are listed under one message; the rest is a count."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, message: str, detail: str | None = None) -> None:
        """Note one problem, once; details of the same message, such as names of tensors, are listed under it."""
        details = self._found.setdefault(message, [])
        if detail is not None and detail not in details:
            details.append(detail)

    def attempt(self, read: Callable[[], T]) -> T | None:
        """Return what `read` returns; None if it is refused, by us or by the operating system, which is noted."""
        try:
            return read()
        except UserError as error:
            self.add(str(error))
        except OSError as error:
            told = explained(error)
            if told is None:
                raise
            self.add(str(told))
        return None

    @property
    def messages(self) -> list[str]:
        """Messages that were noted, without details."""
        return list(self._found)

    def raise_if_any(self, headline: str) -> None:
        """Raise one error if any problem was noted.

        Raises:
            UserError: everything that was noted, below the headline.
        """
        if not self._found:
            return
        lines = [headline]
        for message, details in self._found.items():
            lines.append(f"  {message} ({len(details)}):" if details else f"  - {message}")
            lines += [f"    - {detail}" for detail in details[: self._LISTED]]
            if len(details) > self._LISTED:
                lines.append(f"    - and {len(details) - self._LISTED} more")
        raise UserError("\n".join(lines))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn failures to read a file that the user named, in the block, into errors that say so.

    Raises:
        UserError: it is missing, may not be read, is something else than a file, or is not text where text is read.
        RunError: the disk or the machine failed meanwhile.
    """
    try:
        yield
    except OSError as error:
        kind = RunError if error.errno in _OUTAGES else UserError
        raise kind(f"{path}: {_PATHS.get(error.errno or 0) or error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error
