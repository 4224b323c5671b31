"""Runs a command and checks that it leaves no process behind.

    python tools/run_and_reap.py COMMAND [ARGUMENT ...]

Makes itself the subreaper of everything the command starts (Linux prctl), so that whatever daemonizes or opens a
session of its own still becomes a child of this process when its parent ends. Processes that are alive some seconds
after the command are named on standard error, ended by their id, and turn a status of 0 into 1. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 10.0
"""Servers that were told to stop (a Ray session, a W&B writer) may need this long after the command's own end."""
POLL_S = 0.2


def become_subreaper() -> None:
    """Adopts orphaned descendants from now on.

    Raises:
        OSError: if the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def descendants(root: int) -> dict[int, str]:
    """Living processes below `root`: id to command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name in parentheses may hold blanks; state and parent follow the last closing one.
            state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(entry.name)] = int(parent)
    found: dict[int, str] = {}
    for process in parents:
        ancestor = process
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root and process != root:
            found[process] = _command_line(process)
    return found


def _command_line(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return b" ".join(words).decode(errors="replace").strip()[:200] or "?"


def reap_zombies() -> None:
    """Collects the statuses of adopted children that have ended."""
    while True:
        try:
            process, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return


def wait_for(command: int) -> int:
    """Exit status of the command; adopted children that end before it are collected at once, none stays a zombie."""
    while True:
        process, status = os.waitpid(-1, 0)
        if process == command:
            return os.waitstatus_to_exitcode(status)


def wait_until_gone(limit_s: float) -> dict[int, str]:
    """Waits up to `limit_s` for all descendants to end; returns those that did not."""
    deadline = time.monotonic() + limit_s
    while True:
        reap_zombies()
        alive = descendants(os.getpid())
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(POLL_S)


def end(processes: dict[int, str], with_signal: signal.Signals) -> None:
    """Sends a signal to each process that still exists."""
    for process in processes:
        try:
            os.kill(process, with_signal)
        except ProcessLookupError:
            continue


def main(arguments: list[str]) -> int:
    """Runs the command; returns its status, or 1 if it was 0 and something was left behind."""
    if not arguments:
        sys.stderr.write("usage: run_and_reap.py COMMAND [ARGUMENT ...]\n")
        return 2
    become_subreaper()
    command = subprocess.Popen(arguments)

    def forward(number: int, frame: FrameType | None) -> None:
        # It may have ended already; what it left behind is ended below.
        with contextlib.suppress(ProcessLookupError):
            os.kill(command.pid, number)

    # A terminal sends its interrupt to the command as well; this process only has to outlive it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, forward)
    status = command.returncode = wait_for(command.pid)
    status = status if status >= 0 else 128 - status
    left = wait_until_gone(GRACE_S)
    if not left:
        return status
    for process, line in left.items():
        sys.stderr.write(f"left behind: process {process}: {line}\n")
    end(left, signal.SIGTERM)
    end(wait_until_gone(5.0), signal.SIGKILL)
    wait_until_gone(5.0)
    sys.stderr.write(f"run_and_reap: {len(left)} processes outlived the command and were ended\n")
    return status or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
