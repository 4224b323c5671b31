"""A training run through the real command line: Ray, megatron-core ranks, vLLM engines, each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VARYING = ("time/", "throughput/", "memory/")
"""Metrics that no two runs share."""


@dataclass
class Run:
    """A training run in a process group of its own."""

    directory: Path
    arguments: list[str]

    def start(self) -> subprocess.Popen[str]:
        """Start `megatron-entropic train`; output goes to train.log beside the run directory."""
        with self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_entropic.cli", "train", *self.arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Run to the end; the test fails with the log if the run does."""
        process = self.start()
        try:
            status = process.wait(timeout=500)
        finally:
            process.kill()
        assert status == 0, self.log.read_text(encoding="utf-8")

    @property
    def log(self) -> Path:
        """Everything the run's attempts printed."""
        return self.directory.with_suffix(".log")

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl; a line that is being written is left out."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reproducible_metrics(self) -> list[dict[str, Any]]:
        """The rows without what depends on the clock."""
        return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in self.metrics()]
