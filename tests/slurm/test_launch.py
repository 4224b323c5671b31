"""`sbatch slurm/entropic_8b.sh` on a real Slurm: two nodes with their own addresses, what is refused, and a job that is
preempted, killed and loses a node.

One file, since the workers of a test run share no fixtures: two files might start two clusters.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from job import STEPS, Job
from private_cluster import PrivateCluster


def test_a_policy_over_two_nodes_trains_to_the_end(
    finished: Job, record_property: Callable[[str, object], None]
) -> None:
    reported = re.search(r"first step of this start after \d+ s, (\d+) s after the job was queued", finished.log())
    assert reported, finished.log()
    record_property("seconds from submission to the first step", int(reported[1]))
    rows = finished.metrics()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["mismatch/logprob_abs_max"] <= 1e-3 for row in rows)
    assert all(row["entropy/alpha"] != 0 for row in rows)
    assert "nodes host0,host1" in finished.log()
    # One tensor-parallel rank on each node: each of them holds a raylet and a policy worker.
    for node in ("host0", "host1"):
        assert "Ray runtime started" in (finished.folder / f"slurm-{finished.id}/ray-{node}.log").read_text()


def test_nothing_is_left_on_the_nodes(finished: Job) -> None:
    # A job is complete when its batch script has ended; the daemon of a step that was killed may need a moment more.
    deadline = time.monotonic() + 30
    for node in finished.cluster.nodes:
        while len(finished.cluster.processes(node)) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        commands = [Path(f"/proc/{process}/cmdline").read_bytes() for process in finished.cluster.processes(node)]
        assert len(commands) == 1, commands
    assert not (finished.folder / f"slurm-{finished.id}/ray_token").exists()


def test_preflight_names_the_node_and_what_it_lacks(
    cluster: PrivateCluster, countdown_dir: Path, tmp_path: Path
) -> None:
    jobs = []
    # The other jobs ask for --gpus-per-node=8, as the file says.
    ways: dict[str, tuple[tuple[str, ...], str | None]] = {
        "typed": (("--gpus-per-node=h100:8",), None),
        "gres": ((), "--gres=gpu:8"),
    }
    for way, (options, directive) in ways.items():
        (tmp_path / way).mkdir()
        missing = tmp_path / "nowhere.parquet"
        job = Job(cluster, tmp_path / way, countdown_dir, data__train_files=missing, cluster__device="cuda")
        job.submit(*options, directive=directive)
        jobs.append(job)
    for job in jobs:
        job.await_end()
        assert job.state() == "FAILED", job.log()
        assert cluster.job(job.id)["ExitCode"] == "2:0"
        for node in ("host0", "host1"):
            assert re.search(rf"{node}: cannot read \S+/nowhere\.parquet", job.log())
            assert f"{node}: 0 GPUs, 8 are needed" in job.log()
        assert "nothing was started" in job.log()


def test_a_lost_node_is_replaced_by_a_spare_one_and_the_job_is_not_queued_again(
    cluster: PrivateCluster, countdown_dir: Path, finished: Job, tmp_path: Path
) -> None:
    """A lost node took the whole job back into the queue, 127 good ones with it."""
    steps = 12
    job = Job(cluster, tmp_path, countdown_dir, train__steps=steps, cluster__spare_nodes=1)
    job.submit("--nodes=3", "--no-kill")
    job.await_step(2)
    cluster.kill_node("host1")
    job.await_end()
    cluster.start_node("host1")
    assert job.state() == "COMPLETED", job.log()
    assert job.restarts() == 0
    assert job.metrics() == finished.metrics()[:steps]
    assert "nodes: at work on host0, host1; spare host2; gone none" in job.log()
    assert "nodes: at work on host0, host2; spare none; gone host1" in job.log()
    (restart,) = (json.loads(line) for line in (job.run_dir / "restarts.jsonl").read_text().splitlines())
    assert restart["restarted"] == "run"
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    nodes = [(row["cluster/spare_nodes"], row["cluster/lost_nodes"]) for row in rows]
    assert (nodes[0], nodes[-1]) == ((1, 0), (0, 1))


def _await_progress(job: Job, restarts: int) -> None:
    """Waits until the job runs for the given time and has made a step since it was started."""
    job.await_restart(restarts)
    resumed = len(job.metrics())
    job.await_step(min(resumed + 1, STEPS - 1))


@pytest.mark.timeout(2400)
def test_a_disturbed_job_has_the_metrics_of_an_undisturbed_one(
    cluster: PrivateCluster, countdown_dir: Path, finished: Job, tmp_path: Path
) -> None:
    """It continues by itself, and its metrics do not show what it went through."""
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
    # offline-run-TIME-ID, with a number behind it where one process has started it twice.
    started = [path.name.split("-")[3] for path in job.run_dir.glob("wandb/offline-run-*")]
    assert len(started) > job.restarts() // 2
    assert set(started) == {(job.run_dir / "wandb_run_id").read_text().strip()}
    assert not list((job.run_dir / "checkpoints").glob(".*")), "nothing half-written is left"
