"""The Python stacks of a process, written when another process of the same machine asks for them.

    asking process --SIGUSR2--> C code in the other one --stacks of all its threads--> memory that the first one reads

The handler runs at once, whatever the process is waiting for. The memory is a file without a name in any folder, found
among the open files of its process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

import psutil

ANSWER_S = 3.0
"""Seconds that a process may take to write its stacks."""
_NAME = "stacks"


def offer_stacks() -> None:
    """Let this process write its stacks when it is asked to. Repeatable."""
    if _memory_of(os.getpid()) is None:
        faulthandler.register(signal.SIGUSR2, file=os.memfd_create(_NAME), all_threads=True)


def stacks_of_family(pid: int) -> str:
    """The stacks of a process and of all its descendants that offer them, as text.

    A process that was stopped or is gone writes nothing; then the text says what Linux knows of it.
    """
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return _gone(pid)
    text = _stacks_of(pid)
    for child in descendants:
        if _memory_of(child.pid) is not None:
            text += f"\nits process {child.pid}:\n{_stacks_of(child.pid)}"
    return text


def _stacks_of(pid: int) -> str:
    file = _memory_of(pid)
    if file is None:
        return _gone(pid)
    try:
        before = file.stat().st_size
        os.kill(pid, signal.SIGUSR2)
        deadline = time.monotonic() + ANSWER_S
        size = before
        while time.monotonic() < deadline:
            time.sleep(0.1)
            # Complete when it has stopped growing.
            if (now := file.stat().st_size) == size > before:
                return file.read_bytes()[before:].decode(errors="replace")
            size = now
        state = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()[2]
    except (FileNotFoundError, ProcessLookupError):
        return _gone(pid)
    return f"process {pid} did not write its stacks within {ANSWER_S:g} s; {state}\n"


def _gone(pid: int) -> str:
    return f"process {pid} is gone\n"


def _memory_of(pid: int) -> Path | None:
    """File to which a process writes its stacks; None if it does not offer them, or is gone."""
    try:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(file).startswith(f"/memfd:{_NAME} "):
                return file
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    return None
