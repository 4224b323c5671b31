"""tests/gpu/first_light.sh as far as a machine without a GPU lets it: arguments, limits, the report of a part."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EIGHT_MINUTES_S = 480


def first_light(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tests/gpu/first_light.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment},
    )


def summary(output: Path) -> dict[str, str]:
    """What became of each part."""
    lines = (output / "summary.txt").read_text().splitlines()[1:]
    return {part: status for part, status, _ in map(str.split, lines)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fast",), "unknown option --fast"),
        (("--site", "/nowhere/at/all"), "--site /nowhere/at/all is no folder"),
        (("--output",), "--output needs a folder"),
        (("machine", "warp"), "unknown part warp, choose of machine kernels heads policy colocated large"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(arguments: tuple[str, ...], message: str) -> None:
    refused = first_light(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stdout == ""


def test_all_parts_together_stay_within_eight_minutes_and_run_files_that_are_there() -> None:
    listed = first_light("--dry-run")
    assert listed.returncode == 0
    limits = [int(number) for number in re.findall(r"at most (\d+) s", listed.stdout)]
    assert len(limits) == 6
    assert sum(limits) <= EIGHT_MINUTES_S
    files = re.findall(r"\S+\.py", listed.stdout)
    assert len(files) == 7
    assert all((ROOT / file).is_file() for file in files)


def test_a_part_that_fails_is_reported_with_its_log(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho this is $*; case $* in *machine.py*) exit 3;; esac\n")
    python.chmod(0o755)
    run = first_light("--output", tmp_path / "out", "machine", "heads", PYTHON=str(python))
    assert run.returncode == 1
    assert summary(tmp_path / "out") == {"machine": "failed", "heads": "passed"}
    assert "this is tests/gpu/machine.py" in run.stdout
    assert "vocab_parallel_gpu.py" in (tmp_path / "out/heads.log").read_text()


def test_a_part_whose_tests_were_all_skipped_has_not_passed(tmp_path: Path) -> None:
    """As without a GPU; one test that lacks another program, as the comparison with Liger, may be skipped."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        "case $* in *fused_heads*) echo '56 skipped in 3.85s';; *colocated*) echo '1 passed, 1 skipped in 9s';; esac\n"
    )
    python.chmod(0o755)
    run = first_light("--output", tmp_path / "out", "kernels", "colocated", PYTHON=str(python))
    assert run.returncode == 1
    assert summary(tmp_path / "out") == {"kernels": "skipped", "colocated": "passed"}
