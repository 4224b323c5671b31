"""tools/environment.sh: which Python it takes, and what it says about it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SYSTEM = Path("/usr/bin/python3.11")


def chosen(*, path: str = os.environ["PATH"], **environment: str) -> subprocess.CompletedProcess[str]:
    """The script's answer to `which`, with these variables and nothing else."""
    return subprocess.run(
        ["bash", ROOT / "tools/environment.sh", "cpu", "which"],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def own_python(tmp_path: Path) -> Path:
    """A folder with a python3.11 of the user's own, to stand first on the PATH."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the CPU environment is of Python 3.11")
    (tmp_path / "python3.11").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "python3.11").chmod(0o755)
    return tmp_path


def test_the_systems_own_python_is_taken_before_one_on_the_path(own_python: Path) -> None:
    said = chosen(path=f"{own_python}:{os.environ['PATH']}").stderr
    if SYSTEM.exists():
        assert f"at {SYSTEM} (the system's own)" in said
    else:
        assert f"at {sys.executable} (the first on the PATH; the system has no {SYSTEM})" in said


def test_python_names_another(own_python: Path) -> None:
    assert f"at {sys.executable} (PYTHON names it)" in chosen(PYTHON=str(own_python / "python3.11")).stderr


def test_a_wrong_python_is_an_error_and_not_replaced_by_another(tmp_path: Path) -> None:
    result = chosen(PYTHON=str(tmp_path / "none"))
    assert result.returncode == 1
    assert f"PYTHON={tmp_path}/none is not a Python 3.11 that starts" in result.stderr
