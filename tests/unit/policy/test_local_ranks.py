"""What becomes of a rank's failure in a process of its own."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_entropic.errors import PeerDied, UserError
from megatron_entropic.policy.local_ranks import held_port, run_local_ranks

PROGRAM = """
import os
from megatron_entropic.errors import UserError
from megatron_entropic.policy.local_ranks import run_as_rank

def run(job_dir):
    if (job_dir / "of_ours").exists():
        raise KeyError("ours")
    raise UserError(f"weights of {os.environ['RANK']} hold NaN")

run_as_rank(run)
"""


@pytest.fixture
def job_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rank_of_a_test.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[3]}")
    return tmp_path


def test_what_the_person_has_to_change_comes_without_a_traceback(job_dir: Path) -> None:
    """`score` printed the ranks' tracebacks about a model with NaN."""
    with pytest.raises(UserError) as refused:
        run_local_ranks("rank_of_a_test", job_dir, 2, stall_timeout_s=60)
    assert str(refused.value) == "weights of 0 hold NaN\nweights of 1 hold NaN"


def test_a_bug_of_ours_comes_with_its_traceback(job_dir: Path) -> None:
    (job_dir / "of_ours").touch()
    with pytest.raises(PeerDied, match=r"(?s)policy rank 0 failed in phase start .*Traceback.*KeyError: 'ours'"):
        run_local_ranks("rank_of_a_test", job_dir, 1, stall_timeout_s=60)


def test_nobody_gets_the_port_of_ranks_before_they_open_it() -> None:
    """Chosen and let go of, it could be another program's by the time rank 0 listened there."""
    with held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", port))
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
        assert store.port == port
