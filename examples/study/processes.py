"""Ending a child process."""

from __future__ import annotations

import subprocess


def end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask it to end, as it may have something to save; make it end where it does not within `grace_s`."""
    process.terminate()
    try:
        process.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
