"""What a failure means to whoever started the command: status, message, or the traceback of a bug of ours."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_entropic import cli
from megatron_entropic.commands import report
from megatron_entropic.errors import (
    Interrupted,
    PeerDied,
    PhaseTimeout,
    RunError,
    StopAsked,
    UserError,
    explained,
    reading,
)

Raises = Callable[[BaseException], int]


@pytest.fixture
def raises(monkeypatch: pytest.MonkeyPatch) -> Raises:
    """Status of a command that ends with an exception."""

    def run(error: BaseException) -> int:
        def command(_options: argparse.Namespace) -> None:
            raise error

        monkeypatch.setattr(report, "_report", command)
        return cli.main(["report", "somewhere"])

    return run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("train.steps=-1"), 2, "error: train.steps=-1"),
        (RunError("policy rank 0 [busy]"), 1, "error: policy rank 0 [busy]"),
        (PeerDied("engine 1 died"), 1, "error: engine 1 died"),
        (PhaseTimeout("score: no answer"), 1, "error: score: no answer"),
        (StopAsked("asked to stop by SIGTERM"), 75, "stopped: asked to stop by SIGTERM"),
        (Interrupted("asked to stop by SIGINT"), 130, "stopped: asked to stop by SIGINT"),
        (MemoryError(), 1, "error: the machine, or a limit of memory (ulimit -v)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), 1, "/runs/a: No space left on device; make room"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "or whether /dev/shm is"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/a"), 1, "/runs/a: Permission denied; the user"),
        (OSError(errno.EROFS, "Read-only file system", "/runs/a"), 1, "/runs/a: Read-only file system; choose a"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files; raise the limit of open files"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/etc/passwd/a"),
            2,
            "/etc/passwd/a: one of the directories it names is a file",
        ),
    ],
)
def test_every_failure_has_its_status_and_one_message(
    raises: Raises, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    assert raises(error) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("no"),
        RuntimeError("no"),
        AssertionError("no"),
        ModuleNotFoundError("no"),
        FileNotFoundError(errno.ENOENT, "no"),
        BrokenPipeError(errno.EPIPE, "no"),
        OSError("no"),
    ],
)
def test_a_bug_of_ours_is_not_told_as_the_users_mistake(raises: Raises, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raises(error)
    assert caught.value is error


def test_a_bug_of_ours_ends_with_its_traceback_and_1() -> None:
    program = (
        "import sys; from megatron_entropic import cli; cli.report._report = lambda options: {}['ours']; "
        "sys.exit(cli.main(['report', 'somewhere']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "KeyError: 'ours'" in ended.stderr


def test_a_file_that_the_user_named_and_is_not_there_is_the_users(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "gone", "gone: No such file"),
        (tmp_path, "is a directory, where a file is needed"),
    ):
        with pytest.raises(UserError, match=message), reading(path):
            path.read_bytes()
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="binary: not UTF-8 text"), reading(binary):
        binary.read_text(encoding="utf-8")
    with pytest.raises(RunError, match="Input/output error"), reading(binary):
        raise OSError(errno.EIO, "Input/output error")


def test_the_path_of_a_refusal_may_be_bytes() -> None:
    told = explained(OSError(errno.ENOSPC, "No space left on device", b"/runs/a"))
    assert isinstance(told, RunError)
    assert str(told).startswith("/runs/a: No space")
