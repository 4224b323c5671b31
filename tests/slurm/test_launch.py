"""`sbatch slurm/entropic_8b.sh` on a real Slurm: two nodes with their own addresses, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

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
    for node in finished.cluster.nodes:
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
