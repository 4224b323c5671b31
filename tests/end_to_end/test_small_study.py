"""examples/study/run.py on its small grid: warm start, two runs side by side, results and page; and a second call."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyarrow.parquet
from training_run import run_script

STUDY = Path(__file__).resolve().parents[2] / "examples/study"


def study(output: Path) -> subprocess.CompletedProcess[str]:
    """One call, from another directory than the checkout."""
    return run_script(STUDY / "run.py", STUDY / "small.yaml", "--output", output, cwd=output.parent)


def test_the_small_study_runs_and_is_not_repeated(tmp_path: Path) -> None:
    output = tmp_path / "study"
    result = study(output)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    rows = pyarrow.parquet.read_table(output / "results.parquet").to_pylist()
    runs = {name: [row for row in rows if row["method"] == name] for name in ("GRPO", "EntroPIC-PI")}
    for own in runs.values():
        assert [row["step"] for row in own] == [1, 2, 3, 4]
        assert own[-1]["pass/1"] is not None
        assert 0 <= own[-1]["stepwise"] <= 1
        assert own[-1]["pass/n"] >= own[-1]["pass/1"]
    assert all(row["entropy/alpha"] == 0 for row in runs["GRPO"])
    assert any(row["entropy/alpha"] != 0 for row in runs["EntroPIC-PI"])
    # Both start from the same model with the same prompts and seeds.
    first, second = (own[0] for own in runs.values())
    assert first["entropy/mean"] == second["entropy/mean"]
    page = (output / "report/report.md").read_text(encoding="utf-8")
    assert "| EntroPIC-PI | 1 |" in page
    assert (output / "report/report-on_policy-entropy.png").is_file()

    logs = {path: path.stat().st_mtime_ns for path in (output / "logs").iterdir()}
    assert len(logs) == 3, "one warm start and two runs"
    again = study(output)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in (output / "logs").iterdir()} == logs
