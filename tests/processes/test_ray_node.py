"""slurm/ray_node.sh on a node that is not the first: what it does without the first one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_job_that_lost_its_first_node_is_queued_again_by_another(tmp_path: Path) -> None:
    """With --no-kill Slurm let it stand, without batch shell and driver, until its time was over."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    scontrol.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "host1",
        "SLURM_CPUS_ON_NODE": "1",
        "ME_HEAD_GONE_S": "1",
    }
    # Nothing listens at the head's address, which is another one than that by which this machine goes to it.
    command = ["bash", str(ROOT / "slurm/ray_node.sh"), sys.executable, "127.0.0.2", "9", "/tmp"]
    node = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not asked.exists() and time.monotonic() < deadline:
            assert node.poll() is None
            time.sleep(0.05)
        node.terminate()
        _, said = node.communicate(timeout=60)
    finally:
        node.kill()
    assert asked.read_text().splitlines()[0] == "requeue 7"
    assert "nothing has answered at 127.0.0.2:9 for" in said
    assert node.returncode == 0
