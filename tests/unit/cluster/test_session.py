"""Starting Ray: what cannot succeed is not tried for minutes, and leaves nothing behind."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from megatron_entropic.cluster import session
from megatron_entropic.config.run import ClusterConfig
from megatron_entropic.errors import RunError


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "is_prepared", lambda: True)


@pytest.mark.usefixtures("prepared")
def test_what_fails_at_once_is_said_after_three_attempts_and_not_after_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts = []

    def fail(**_: Any) -> None:
        attempts.append(1)
        raise IndexError("list index out of range")

    monkeypatch.setattr(session.ray, "init", fail)
    with pytest.raises(RunError, match="Ray did not come up on this machine: IndexError: list index out of range"):
        session._start_local(ClusterConfig(startup_timeout_s=600), 2, tmp_path)
    assert len(attempts) == 3


@pytest.mark.usefixtures("prepared")
def test_the_servers_of_a_failed_start_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []
    others = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "elsewhere"])

    def fail(**_: Any) -> None:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path / "ray")]))
        raise RuntimeError("no second server")

    monkeypatch.setattr(session.ray, "init", fail)
    try:
        with pytest.raises(RunError, match="no second server"):
            session._start_local(ClusterConfig(), 2, tmp_path)
        assert not any(psutil.pid_exists(server.pid) for server in started)
        assert others.poll() is None
    finally:
        for process in (others, *started):
            process.kill()
            process.wait()


@pytest.mark.usefixtures("prepared")
def test_a_slow_machine_gets_the_time_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    attempts = []

    def fail_slowly(**_: Any) -> None:
        now[0] += 30
        attempts.append(1)
        if len(attempts) < 6:
            raise RuntimeError("The current node timed out during startup")

    monkeypatch.setattr(session.ray, "init", fail_slowly)
    session._start_local(ClusterConfig(startup_timeout_s=240), 2, tmp_path)
    assert len(attempts) == 6


def test_what_rays_servers_report_is_one_line_each_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk put a traceback of Ray's on the screen for every object."""
    traceback = 'Traceback (most recent call last):\n  File "ray/_raylet.pyx", line 2888\nOSError: disk is full\n'
    with session._short_messages():
        for lines in ([traceback], [traceback], ["2 workers were killed (OOM)\nRefer to the documentation\n", ""]):
            ray._private.worker.print_to_stdstream({"lines": lines, "pid": "raylet", "is_err": False})
    assert capsys.readouterr().err == "Ray's raylet: OSError: disk is full\nRay's raylet: 2 workers were killed (OOM)\n"
    with session._short_messages():
        changed = ray._private.worker.print_to_stdstream
    assert ray._private.worker.print_to_stdstream is not changed
    listening = inspect.getsource(ray._private.worker.listen_error_messages)
    assert "print_to_stdstream(" in listening, "Ray no longer prints messages by this function"
