"""The folder of a private Ray session: nobody else gets into it, its path is short, and it does not outlive the run.

    /tmp/me-ray-abcd1234/      0700, ours
        owner                  locked while the run lives
        ray/                   Ray's: it makes every folder of its own writable for everybody

A run that is killed cannot remove its folder. The next one of the same user does, once nothing works in it any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_entropic.errors import UserError

PREFIX = "me-ray-"
OWNER = "owner"
SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket."""
_LONGEST_SOCKET = "/ray/session_2026-11-28_07-03-38_062837_4194304/sockets/plasma_store"
_RANDOM = "abcd1234"  # as many letters as `tempfile.mkdtemp` takes
_LONGEST_BASE_BYTES = SOCKET_PATH_BYTES - len(f"/{PREFIX}{_RANDOM}{_LONGEST_SOCKET}")


@contextmanager
def session_folder() -> Iterator[Path]:
    """A new folder for the duration of the block; what killed runs left behind goes first.

    Raises:
        UserError: no folder for temporary files has a path short enough for Ray's sockets.
    """
    base = _short_base([Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")])
    remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    # The lock goes with the process, however that ends. Ray's processes do not inherit it.
    with (folder / OWNER).open("w", encoding="ascii") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def short_paths(folder: Path) -> dict[str, str]:
    """Environment that keeps other sockets of the run's processes within their limit, too.

    vLLM's lie where VLLM_RPC_BASE_PATH says, those of Python's multiprocessing in TMPDIR, which is left alone unless it
    is too long.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_BASE_BYTES:
        return {"VLLM_RPC_BASE_PATH": str(folder)}
    return {"VLLM_RPC_BASE_PATH": str(folder), "TMPDIR": str(folder)}


def remove_abandoned(base: Path) -> list[Path]:
    """Remove the folders of this user's killed runs below `base`; returns them.

    A folder stays while its run lives, and while a process names it in its command line: Ray's own may still be ending.
    """
    abandoned = [folder for folder in base.glob(f"{PREFIX}*") if _is_abandoned(folder)]
    if abandoned:
        commands = _commands()
        abandoned = [folder for folder in abandoned if not any(os.fsencode(folder) in command for command in commands)]
    for folder in abandoned:
        shutil.rmtree(folder, ignore_errors=True)
    return abandoned


def _is_abandoned(folder: Path) -> bool:
    if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
        return False
    try:
        with (folder / OWNER).open("r+", encoding="ascii") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by a run; or not there (yet): a run that begins, or somebody else's folder
        return False
    return True


def _commands() -> list[bytes]:
    """Command lines of all processes that can be seen."""
    commands = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(process.read_bytes())
        except OSError:  # it has ended meanwhile, or is hidden
            continue
    return commands


def _short_base(candidates: list[Path]) -> Path:
    for base in candidates:
        if len(os.fsencode(base)) <= _LONGEST_BASE_BYTES and os.access(base, os.W_OK | os.X_OK):
            return base
    listed = ", ".join(map(str, candidates))
    raise UserError(
        f"no folder for the sockets of the run's processes: of {listed} none can be written to and has a path of at "
        f"most {_LONGEST_BASE_BYTES} bytes; set TMPDIR to one that does"
    )
