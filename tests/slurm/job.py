"""slurm/entropic_8b.sh with the Countdown model in place of Qwen3-8B: two nodes, a policy rank on each, one engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from private_cluster import PrivateCluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
PROMPTS_PER_STEP = 32
"""Together long enough for Slurm, which looks at time limits twice a minute, to find the job at work."""
LIMIT_S = 600
"""Of every wait; the machine may be busy with other things."""
VARYING = ("time/", "throughput/", "memory/", "cluster/")
"""Metrics that no two runs share."""


class Job:
    """One submitted job and the run it does."""

    def __init__(self, cluster: PrivateCluster, folder: Path, assets: Path, **overrides: Any) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run_dir = folder / "run"
        self.id = ""
        self._submitted = 0.0
        self._settings = {
            "run.output_dir": "run",
            "model.hf_dir": assets / "model",
            "data.train_files": assets / "train.parquet",
            "warm_start.file": assets / "warm_start.parquet",
            "warm_start.steps": 4,
            "warm_start.warmup_steps": 1,
            "rollout.prompts_per_step": PROMPTS_PER_STEP,
            "train.steps": STEPS,
            "checkpoint.every_steps": 1,
            "checkpoint.export_hf": "false",
            "logging.wandb": "off",
            "logging.tensorboard": "false",
            "cluster.policy_ranks_per_node": 1,
        } | {name.replace("__", "."): value for name, value in overrides.items()}

    def submit(self, *options: str, directive: str | None = None) -> None:
        """From a folder that is not the checkout, so that paths and logs are relative to it.

        Args:
            options: of sbatch; they win over the directives in the file.
            directive: instead of the file's `--gpus-per-node=8`, as a site would write it into a copy of its own.
        """
        overrides = [f"{name}={value}" for name, value in self._settings.items()]
        script, config = ROOT / "slurm/entropic_8b.sh", ROOT / "examples/countdown_cpu.yaml"
        if directive is not None:
            text = script.read_text(encoding="utf-8")
            assert "--gpus-per-node=8" in text
            script = self.folder / script.name
            script.write_text(text.replace("--gpus-per-node=8", directive), encoding="utf-8")
            options = (*options, f"--export=ALL,ME_CHECKOUT={ROOT}")
        self._submitted = time.monotonic()
        command = ("sbatch", "--parsable", *options, str(script), str(config), *overrides)
        self.id = self.cluster.run(*command, folder=self.folder)

    def state(self) -> str:
        """Slurm's word for it."""
        return self.cluster.job(self.id)["JobState"]

    def restarts(self) -> int:
        """How often Slurm started it again."""
        return int(self.cluster.job(self.id)["Restarts"])

    def log(self) -> str:
        """Everything the batch script and the driver printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl without what depends on the clock; a line that is being written is left out."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in rows]

    def await_step(self, step: int) -> float:
        """Waits until metrics.jsonl has the step; returns the seconds since the submission."""
        self._await(lambda: len(self.metrics()) >= step, f"step {step}")
        return time.monotonic() - self._submitted

    def await_restart(self, restarts: int) -> None:
        """Waits until the job runs again after so many restarts."""
        self._await(lambda: self.restarts() >= restarts and self.state() == "RUNNING", f"restart {restarts}")

    def await_restart_count(self, restarts: int) -> None:
        """Waits until Slurm has put the job back into the queue so many times; it need not run again yet."""
        self._await(lambda: self.restarts() >= restarts, f"restart {restarts}")

    def await_log(self, words: str) -> None:
        """Waits until the batch script or the driver has printed the words."""
        self._await(lambda: words in self.log(), f"{words!r} in the log")

    def await_end(self) -> None:
        """Waits until Slurm calls the job neither waiting nor running nor ending."""
        self._await(
            lambda: self.state() not in ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "COMPLETING"), "its end"
        )

    def _await(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what} was not reached:\n{self.log()}\n{self.cluster.logs()}"
            time.sleep(0.2)
