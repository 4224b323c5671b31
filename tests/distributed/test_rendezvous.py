"""Policy ranks meet at a port that rank 0 has held since it told the others of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

RANK = """
import socket, sys
import torch.distributed as dist
from megatron_entropic.errors import PhaseTimeout
from megatron_entropic.policy.megatron.platform import Rendezvous, select_platform

rank, port, descriptor = map(int, sys.argv[1:4])
try:
    listener = socket.socket(fileno=descriptor) if descriptor >= 0 else None
    rendezvous = Rendezvous(port, rank=rank, world_size=2, listener=listener)
    select_platform("cpu").init_process_group(rendezvous, timeout_s=float(sys.argv[4]))
except PhaseTimeout as error:
    sys.exit(str(error))
dist.barrier()
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def rank(number: int, listener: socket.socket, timeout_s: float) -> subprocess.Popen[str]:
    descriptor = listener.fileno() if number == 0 else -1
    arguments = map(str, (number, listener.getsockname()[1], descriptor, timeout_s))
    return subprocess.Popen(
        [sys.executable, "-c", RANK, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        pass_fds=[descriptor] if number == 0 else [],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_meet_whoever_comes_first(listener: socket.socket) -> None:
    ranks = [rank(number, listener, 60.0) for number in (1, 0)]
    for process in ranks:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def test_a_rank_that_does_not_come_is_missed_within_the_limit(listener: socket.socket) -> None:
    _, said = rank(0, listener, 2.0).communicate(timeout=120)
    port = listener.getsockname()[1]
    assert f"policy rank 0 did not meet all 2 ranks at 127.0.0.1:{port} within 2 s" in said
