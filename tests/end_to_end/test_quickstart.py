"""examples/quickstart.sh, shortened by its own overrides, from another directory."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def quickstart(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user would, with the run's files below `run_dir`."""
    return subprocess.run(
        ["bash", str(ROOT / "examples/quickstart.sh"), f"run.output_dir={run_dir}", *overrides],
        cwd=run_dir.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=560,
    )


def test_quickstart_trains_and_reports(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = quickstart(run_dir, "warm_start.steps=2", "rollout.prompts_per_step=4", "train.steps=2")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert (run_dir / "report/report.html").is_file()
    assert (run_dir / "hf/config.json").is_file()
    assert str(run_dir / "metrics.jsonl") in result.stdout
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
