"""Lint, format, types and shell scripts of the whole checkout, by the tools and settings a developer runs by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_checkout_passes(tool: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, check=False, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = [*sorted((ROOT / "slurm").glob("*.sh")), *sorted((ROOT / "tools").glob("*.sh"))]
    scripts += [*sorted((ROOT / "examples").glob("*.sh")), *sorted((ROOT / "tests").glob("*.sh")), ROOT / ".ci/run"]
    result = subprocess.run(
        [shellcheck, "--external-sources", "--source-path", ROOT, *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
