"""Runs one Python script as several communicating processes, as a launcher would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.policy.local_ranks import held_port

RunRanks = Callable[..., list[str]]
GRACE_S = 5.0
"""How long the other ranks may live after the first failure, so that they can say what they saw."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class RankServer:
    """rank_server.py, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self, command: list[str], ranks: list[dict[str, Any]]) -> list[int]:
        """Process ids of new ranks, each the leader of a process group."""
        return self._ask({"command": command, "ranks": ranks})

    def poll(self, ranks: list[int]) -> list[int | None]:
        """Exit statuses; None for a rank that runs."""
        return self._ask({"poll": ranks})

    def stop(self) -> None:
        """Ends the process, which has no children any more."""
        if self._process is not None:
            self._process.communicate(timeout=60)

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
                env={**os.environ, **ONE_THREAD},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def rank_server() -> Iterator[RankServer]:
    server = RankServer()
    yield server
    server.stop()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _wait(server: RankServer, ranks: list[int], timeout_s: float) -> tuple[list[int | None], bool]:
    """Waits for all ranks, or until GRACE_S after the first failure; their statuses, and whether the time ran out."""
    deadline = time.monotonic() + timeout_s
    failed = False
    while True:
        statuses = server.poll(ranks)
        if None not in statuses:
            return statuses, False
        if any(statuses):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            return statuses, not failed
        time.sleep(0.05)


def _kill(server: RankServer, ranks: list[int]) -> None:
    """Ends every rank with all its children: each rank leads a process group of its own."""
    for rank in ranks:
        try:
            os.killpg(rank, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while None in server.poll(ranks):
        time.sleep(0.01)


def _report(statuses: list[int | None], logs: list[tuple[Path, Path]]) -> str:
    parts = []
    for index, (status, (stdout, stderr)) in enumerate(zip(statuses, logs, strict=True)):
        state = "still running" if status is None else f"exit status {status}"
        parts.append(f"---- rank {index}: {state}; stdout:\n{stdout.read_text()}\n---- rank {index} stderr:")
        parts.append(stderr.read_text())
    return "\n".join(parts)


@pytest.fixture
def run_ranks(rank_server: RankServer, tmp_path: Path) -> RunRanks:
    """`run_ranks(script, world_size, *args, timeout_s=300)` -> stdout of every rank.

    Runs `python script args` once per rank with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and one thread
    each. If a rank fails or the time runs out, the test fails with the output of every rank. No process survives.
    """
    return _runner(rank_server, tmp_path)


@pytest.fixture(scope="module")
def run_ranks_once(rank_server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """`run_ranks` for fixtures of a module, whose tests look at one launch from several sides."""
    return _runner(rank_server, tmp_path_factory.mktemp("ranks"))


def _runner(server: RankServer, tmp_path: Path) -> RunRanks:
    def run(script: Path, world_size: int, *args: object, timeout_s: float = 300) -> list[str]:
        with held_port() as port:
            return launch(script, world_size, port, args, timeout_s)

    def launch(script: Path, world_size: int, port: int, args: tuple[object, ...], timeout_s: float) -> list[str]:
        stems = [tmp_path / f"{Path(script).stem}-{port}-{rank}" for rank in range(world_size)]
        logs = [(stem.with_suffix(".out"), stem.with_suffix(".err")) for stem in stems]
        described = [
            {"environment": _environment(rank, world_size, port), "stdout": str(stdout), "stderr": str(stderr)}
            for rank, (stdout, stderr) in enumerate(logs)
        ]
        ranks = server.start([str(script), *map(str, args)], described)
        try:
            statuses, timed_out = _wait(server, ranks, timeout_s)
        finally:
            _kill(server, ranks)
        if timed_out or any(status != 0 for status in statuses):
            reason = f"no end after {timeout_s} s" if timed_out else "a rank failed"
            pytest.fail(f"{script} on {world_size} ranks: {reason}\n{_report(statuses, logs)}", pytrace=False)
        return [stdout.read_text() for stdout, _ in logs]

    return run
