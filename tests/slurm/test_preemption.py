"""A job that is preempted, killed and loses a node continues by itself, and its metrics do not show it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from job import STEPS, Job
from private_cluster import PrivateCluster


def _await_progress(job: Job, restarts: int) -> None:
    """Waits until the job runs for the given time and has made a step since it was started."""
    job.await_restart(restarts)
    resumed = len(job.metrics())
    job.await_step(min(resumed + 1, STEPS - 1))


@pytest.mark.timeout(2400)
def test_a_disturbed_job_has_the_metrics_of_an_undisturbed_one(
    cluster: PrivateCluster, countdown_dir: Path, finished: Job, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, countdown_dir, logging__wandb="offline")
    job.submit()

    job.await_step(1)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.await_restart(1)
    assert re.search(r"stopped: asked to stop by SIGUSR1(\nstep \d+ is saved)?", job.log())
    assert "stopped on request; the job is queued again" in job.log()

    # Slurm's own signal before the end of the time limit, which --signal wants 15 minutes before it. Slurm looks at
    # limits twice a minute: the job may be starting or at work when it comes.
    job.await_log("restart 1, nodes")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    job.await_restart_count(2)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=120")
    assert len(re.findall("stopped on request; the job is queued again", job.log())) == 2

    _await_progress(job, restarts=2)
    cluster.run("scontrol", "requeue", job.id)

    # To all steps: Ray's processes are ended together with the driver.
    _await_progress(job, restarts=3)
    cluster.run("scancel", "--signal=TERM", job.id)

    _await_progress(job, restarts=4)
    cluster.kill_node("host1")
    _await_progress(job, restarts=5)
    assert "host1" not in cluster.job(job.id)["NodeList"]
    job.await_end()
    assert job.state() == "COMPLETED", job.log()
    cluster.start_node("host1")

    assert job.metrics() == finished.metrics()
    # Every start went on with the same run of W&B.
    started = [path.name.rpartition("-")[2] for path in job.run_dir.glob("wandb/offline-run-*")]
    assert len(started) > job.restarts() // 2
    assert set(started) == {(job.run_dir / "wandb_run_id").read_text().strip()}
    assert not list((job.run_dir / "checkpoints").glob(".*")), "nothing half-written is left"
