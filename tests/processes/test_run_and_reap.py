"""tools/run_and_reap.py: a process that outlives its command is found, wherever it hides."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools/run_and_reap.py"


def reap(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command under the script."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *command], capture_output=True, text=True, check=False, timeout=120
    )


def is_running(process: int) -> bool:
    """Whether a process exists and is not merely waiting to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_status_and_output_are_the_commands_own() -> None:
    result = reap("bash", "-c", "echo out; echo err >&2; exit 3")
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_a_process_with_a_session_of_its_own_is_found_and_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    # Two forks and a new session: neither its parent nor its session or group leads back to the command.
    hidden = f"(setsid bash -c 'trap \"\" TERM; echo $$ > {pid_file}; while :; do sleep 1; done' >{os.devnull} 2>&1 &)"
    result = reap("bash", "-c", f"{hidden}; while [ ! -s {pid_file} ]; do sleep 0.1; done")
    assert result.returncode == 1
    assert "left behind: process" in result.stderr
    assert not is_running(int(pid_file.read_text()))


def test_a_process_that_ends_soon_after_is_no_fault() -> None:
    started = time.monotonic()
    result = reap("bash", "-c", f"(setsid sleep 2 >{os.devnull} 2>&1 &)")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started >= 1.5


def test_an_orphan_that_ends_before_the_command_does_not_stay_a_zombie() -> None:
    result = reap("bash", "-c", "p=$( (setsid sleep 0.2 >&- 2>&- & echo $!) ); sleep 2; test ! -e /proc/$p")
    assert result.returncode == 0, result.stderr
