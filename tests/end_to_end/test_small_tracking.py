"""examples/study/tracking.py on a study of two short runs, of which one goes on from the other with another reward."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest
from training_run import run_script

STUDY = Path(__file__).resolve().parents[2] / "examples/study"
CASES = """
tasks:
  countdown:
    generate: countdown
    config: examples/countdown_cpu.yaml
    model: {num_hidden_layers: 1}
    warm_start: [{file: warm_start, overrides: {warm_start.steps: 2, warm_start.sequences_per_step: 32}}]
    common: {policy.tensor_parallel: 1, rollout.prompts_per_step: 8, logging.wandb: "off", checkpoint.every_steps: 0}
    regimes:
      off_policy: {algorithm.optimizer_steps_per_rollout: 2, entropy_control.feedback: auto}
cases:
  - name: first
    table: targets
    task: countdown
    regimes: [off_policy]
    legs: [{steps: 2, overrides: {entropy_control.target: 2.0, entropy_control.kp: 0.5, entropy_control.ki: 0.1}}]
  - name: second
    table: disturbances
    task: countdown
    regimes: [off_policy]
    after: first
    legs:
      - steps: 1
        overrides:
          entropy_control.target: 1.5
          optimizer.learning_rate: 6.0e-4
          reward.verifier: examples.study.countdown_rewards:with_product
"""


def study(output: Path) -> subprocess.CompletedProcess[str]:
    """One call, from another directory than the checkout."""
    cases = output.with_suffix(".yaml")
    cases.write_text(CASES, encoding="utf-8")
    return run_script(STUDY / "tracking.py", cases, "--output", output, "--processes", "1", cwd=output.parent)


def test_a_run_goes_on_from_another_with_other_settings(tmp_path: Path) -> None:
    output = tmp_path / "study"
    result = study(output)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    rows = pyarrow.parquet.read_table(output / "results.parquet").to_pylist()
    first, second = ([row for row in rows if row["case"] == name] for name in ("first", "second"))
    assert [(row["step"], row["leg"], row["entropy/target"]) for row in first] == [(1, 1, 2.0), (2, 1, 2.0)]
    assert [(row["step"], row["leg"]) for row in second] == [(1, 0), (2, 0), (3, 1)]
    assert [row["entropy/rollout"] for row in second[:2]] == [row["entropy/rollout"] for row in first]
    assert second[2]["entropy/target"] == 1.5
    # The random model solves nothing, so the integral stands still and alpha is K_p times the new error.
    assert second[2]["entropy/alpha"] == pytest.approx(0.5 * (second[2]["entropy/mean"] - 1.5))
    for name in ("targets", "disturbances"):
        assert f"![{name}, off_policy]" in (output / "report/report.md").read_text(encoding="utf-8")
    files = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    again = study(output)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == files
