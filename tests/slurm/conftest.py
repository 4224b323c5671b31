"""One private Slurm cluster and one tiny model for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from job import Job
from private_cluster import PROGRAMS, PrivateCluster


def _install_slurm() -> None:
    """Debian's Slurm, if this process may install it; otherwise these tests are skipped and say why."""
    if os.geteuid() != 0:
        pytest.skip("a private Slurm with network namespaces of its own needs root")
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        pytest.skip(f"{', '.join(PROGRAMS)} are not all here, and there is no apt-get to install them with")
    packages = ["slurm-wlm", "munge", "iproute2", "util-linux"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        result = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        if result.returncode != 0:
            pytest.skip(f"apt-get {command[0]} failed: {result.stderr.strip()[-300:]}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    # Of the module, not of the session: its daemons are children of the worker, which runs other files afterwards.
    with pytest.MonkeyPatch.context() as shell:
        # Slurm's daemons and `ip` are root's programs: not every PATH names their folders.
        shell.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        _install_slurm()
        cluster = PrivateCluster(nodes=3)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def finished(cluster: PrivateCluster, countdown_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """slurm/entropic_8b.sh run to its end without any disturbance."""
    job = Job(cluster, tmp_path_factory.mktemp("finished"), countdown_dir)
    job.submit()
    job.await_end()
    assert job.state() == "COMPLETED", job.log()
    return job
