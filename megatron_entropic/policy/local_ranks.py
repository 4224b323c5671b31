"""Runs policy ranks as processes of this machine, without Ray, and watches over them.

Each rank tells its phase through a file; the parent reads it when a rank fails or stands still.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_entropic.errors import PeerDied, PhaseTimeout, UserError
from megatron_entropic.files.atomic import write_text

_GRACE_S = 5.0
_POLL_S = 0.05
_SHOWN_CHARACTERS = 4000
USER_ERROR_STATUS = 2


def tell_phase(job_dir: Path, rank: int, phase: str) -> None:
    """Note a rank's phase: to be called at the start of each phase, and again while it makes progress in a long one."""
    write_text(job_dir / f"phase-{rank}", phase, durable=False)


def run_as_rank(run: Callable[[Path], None]) -> NoReturn:
    """Run a rank's module as a program: call `run` with the job's folder and end.

    What the person has to change is handed to the parent as such, without a traceback.
    """
    job_dir = Path(sys.argv[1])
    try:
        run(job_dir)
    except UserError as error:
        _refusal(job_dir, int(os.environ["RANK"])).write_text(str(error), encoding="utf-8")
        # The other ranks may wait for this one in a collective, and what ends a process in order would wait for them.
        os._exit(USER_ERROR_STATUS)
    sys.exit(0)


def run_local_ranks(module: str, job_dir: Path, world_size: int, *, stall_timeout_s: float) -> None:
    """Run `python -m module job_dir` on `world_size` ranks until all have ended.

    The ranks find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment, share the cores
    unless OMP_NUM_THREADS is set, and write into `job_dir`.

    Raises:
        UserError: a rank found something that the person has to change, see `run_as_rank`.
        PeerDied: a rank failed; the message has the phase and the errors of all that did.
        PhaseTimeout: no rank told a phase for `stall_timeout_s`; the message has the phase of each.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with held_port() as port:
            for rank in range(world_size):
                tell_phase(job_dir, rank, "start")
                with (job_dir / f"stderr-{rank}").open("wb") as stderr:
                    command = [sys.executable, "-m", module, str(job_dir)]
                    environment = _environment(rank, world_size, port)
                    ranks.append(subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr))
            _watch(ranks, job_dir, stall_timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _watch(ranks: Sequence[subprocess.Popen[bytes]], job_dir: Path, stall_timeout_s: float) -> None:
    while any(process.poll() is None for process in ranks):
        if any(process.returncode for process in ranks):
            break
        last_news = max((job_dir / f"phase-{rank}").stat().st_mtime for rank in range(len(ranks)))
        if time.time() - last_news > stall_timeout_s:
            waiting = [f"rank {r} ({_phase(job_dir, r)})" for r, process in enumerate(ranks) if process.poll() is None]
            raise PhaseTimeout(f"no policy rank made progress for {stall_timeout_s:g} s; waiting: {', '.join(waiting)}")
        time.sleep(_POLL_S)
    if any(process.returncode for process in ranks):
        _wait_for_the_others(ranks)
        found = [_refusal(job_dir, rank) for rank in range(len(ranks))]
        if refusals := sorted({path.read_text(encoding="utf-8") for path in found if path.exists()}):
            raise UserError("\n".join(refusals))
        raise PeerDied("\n".join(_failure(job_dir, r, process) for r, process in enumerate(ranks) if process.poll()))


def _wait_for_the_others(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait a little for the other ranks to end, after one has failed."""
    # A rank that fails takes its peers with it shortly after: give them the time to say how.
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(_POLL_S)


def _failure(job_dir: Path, rank: int, process: subprocess.Popen[bytes]) -> str:
    text = (job_dir / f"stderr-{rank}").read_text(encoding="utf-8", errors="replace").strip()
    return (
        f"policy rank {rank} failed in phase {_phase(job_dir, rank)} with exit status {process.returncode}:\n"
        f"{text[-_SHOWN_CHARACTERS:]}"
    )


def _refusal(job_dir: Path, rank: int) -> Path:
    return job_dir / f"refusal-{rank}"


def _phase(job_dir: Path, rank: int) -> str:
    return (job_dir / f"phase-{rank}").read_text(encoding="utf-8")


@contextmanager
def held_port() -> Iterator[int]:
    """Port of the loopback interface that nobody else gets in the block, for a store that a process opens there."""
    # Bound, but not listening: Linux gives it to nobody who asks for any port, and to whoever asks for this one and, as
    # torch's store does, allows to share the address.
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // world_size)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
