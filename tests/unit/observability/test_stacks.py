"""What a process and its children say of what they are doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_entropic.observability.stacks import offer_stacks, stacks_of_family

FAMILY = """
import subprocess, sys, time
from megatron_entropic.observability.stacks import offer_stacks

def wait_in(role):
    print(role, flush=True)
    time.sleep(100)

def parent_waits():
    wait_in("parent")

def child_waits():
    wait_in("child")

offer_stacks()
if sys.argv[1:]:
    child_waits()
child = subprocess.Popen([sys.executable, __file__, "child"])
subprocess.Popen(["sleep", "100"])
parent_waits()
"""


@pytest.fixture
def family(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A process with a child that offers its stacks and one that knows nothing of that."""
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert {process.stdout.readline(), process.stdout.readline()} == {"parent\n", "child\n"}
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_process_and_its_children_tell_where_they_are(family: subprocess.Popen[str]) -> None:
    for _ in range(2):
        text = stacks_of_family(family.pid)
        assert text.index("in parent_waits") < text.index("its process") < text.index("in child_waits")
        assert text.count("in wait_in") == 2
    assert family.poll() is None


def test_of_one_that_cannot_answer_its_state_is_told(family: subprocess.Popen[str]) -> None:
    family.send_signal(signal.SIGSTOP)
    text = stacks_of_family(family.pid)
    assert "did not write its stacks" in text
    assert "State:\tT (stopped)" in text
    assert "in child_waits" in text


def test_one_that_is_gone_is_told() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert stacks_of_family(process.pid) == f"process {process.pid} is gone\n"


def test_offering_twice_is_offering_once() -> None:
    before = len(os.listdir("/proc/self/fd"))
    offer_stacks()
    offer_stacks()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
