"""Nobody else gets into the folder of a run's Ray, its paths stay short, and what killed runs leave is collected."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_entropic.cluster.session import PREFIX, _interpreter, remove_abandoned, session_folder, short_paths
from megatron_entropic.errors import UserError

HOLDS = """
import sys, time
from megatron_entropic.cluster.session import _interpreter
from megatron_entropic.cluster.session import session_folder
with session_folder() as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short folder in the place of /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="b-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_others_do_not_get_into_the_folder_and_it_goes_with_the_run(base: Path) -> None:
    with session_folder() as folder:
        assert folder.parent == base
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "ray").mkdir(mode=0o777)
    assert not list(base.iterdir())


def test_what_a_killed_run_left_is_collected_and_what_lives_is_not(base: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        folder = Path(run.stdout.readline().strip())
        assert remove_abandoned(base) == [], "it lives"
        run.send_signal(signal.SIGKILL)
    # Ray's own processes can outlive the run for a while.
    works = [sys.executable, "-c", "input(print('here', flush=True))", str(folder / "ray")]
    with subprocess.Popen(works, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as raylet:
        assert raylet.stdout is not None
        raylet.stdout.readline()
        assert remove_abandoned(base) == [], "something works in it"
        raylet.communicate(b"\n")
    assert remove_abandoned(base) == [folder]
    assert not folder.exists()


def test_folders_that_are_no_runs_stay(base: Path) -> None:
    (base / f"{PREFIX}begins12").mkdir()
    (base / f"{PREFIX}link1234").symlink_to("/")
    assert remove_abandoned(base) == []


def test_a_long_folder_for_temporary_files_is_left_for_a_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / "scratch_of_a_job"
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with session_folder() as folder:
        assert folder.parent in (Path("/tmp"), Path("/var/tmp"))
        assert short_paths(folder) == {"VLLM_RPC_BASE_PATH": str(folder), "TMPDIR": str(folder)}
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="set TMPDIR to one that does"), session_folder():
        pass


def test_an_interpreter_whose_path_has_a_blank_is_quoted_for_the_shell_that_starts_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/a check out/.venv/bin/python")
    assert _interpreter() == {"py_executable": "'/a check out/.venv/bin/python'"}
    monkeypatch.setattr(sys, "executable", "/checkout/.venv/bin/python")
    assert _interpreter() == {}
