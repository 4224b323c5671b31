"""Runs one Python script as several communicating processes, as a launcher would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

RunRanks = Callable[..., list[str]]
GRACE_S = 5.0
"""How long the other ranks may live after the first failure, so that they can say what they saw."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> bool:
    """Waits for all ranks, or until GRACE_S after the first failure; returns whether the time ran out."""
    deadline = time.monotonic() + timeout_s
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
            timed_out = False
        else:
            timed_out = True
        if time.monotonic() > deadline:
            return timed_out
        time.sleep(0.05)
    return False


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Ends every rank with all its children: each rank leads a process group of its own."""
    for rank in ranks:
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        rank.wait()


def _report(ranks: list[subprocess.Popen[bytes]], logs: list[tuple[Path, Path]]) -> str:
    parts = []
    for index, (rank, (stdout, stderr)) in enumerate(zip(ranks, logs, strict=True)):
        state = "still running" if rank.returncode is None else f"exit status {rank.returncode}"
        parts.append(f"---- rank {index}: {state}; stdout:\n{stdout.read_text()}\n---- rank {index} stderr:")
        parts.append(stderr.read_text())
    return "\n".join(parts)


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """`run_ranks(script, world_size, *args, timeout_s=300)` -> stdout of every rank.

    Runs `python script args` once per rank with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and one thread
    each. If a rank fails or the time runs out, the test fails with the output of every rank. No process survives.
    """
    return _runner(tmp_path)


@pytest.fixture(scope="module")
def run_ranks_once(tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """`run_ranks` for fixtures of a module, whose tests look at one launch from several sides."""
    return _runner(tmp_path_factory.mktemp("ranks"))


def _runner(tmp_path: Path) -> RunRanks:
    def run(script: Path, world_size: int, *args: object, timeout_s: float = 300) -> list[str]:
        port = _free_port()
        logs = []
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world_size):
                stem = f"{Path(script).stem}-{port}-{rank}"
                paths = (tmp_path / f"{stem}.out", tmp_path / f"{stem}.err")
                logs.append(paths)
                with paths[0].open("wb") as stdout, paths[1].open("wb") as stderr:
                    process = subprocess.Popen(
                        [sys.executable, str(script), *map(str, args)],
                        env=_environment(rank, world_size, port),
                        stdout=stdout,
                        stderr=stderr,
                        start_new_session=True,
                    )
                ranks.append(process)
            timed_out = _wait(ranks, timeout_s)
            if timed_out or any(rank.returncode != 0 for rank in ranks):
                reason = f"no end after {timeout_s} s" if timed_out else "a rank failed"
                pytest.fail(f"{script} on {world_size} ranks: {reason}\n{_report(ranks, logs)}", pytrace=False)
            return [stdout.read_text() for stdout, _ in logs]
        finally:
            _kill(ranks)

    return run
