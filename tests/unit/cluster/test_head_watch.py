"""The loss of Ray's head is noticed within a limit, a short silence is forgiven."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
from ray._private.node import Node

from megatron_entropic.cluster.waiting import GONE_AFTER_S, PROBE_EVERY_S, HeadWatch, head_refusal, require_raylet
from megatron_entropic.errors import PeerDied


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port in the place of Ray's head."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        yield listener


def wait(watch: HeadWatch, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        watch.check()


def test_a_head_that_is_gone_is_noticed_before_ray_ends_the_driver(head: socket.socket, clock: Clock) -> None:
    watch = HeadWatch("generate (step 4)")
    clock.now += PROBE_EVERY_S
    watch.check()
    head.close()
    began = clock.now
    with pytest.raises(PeerDied, match=r"^generate \(step 4\): Ray's head process, gcs_server, is gone"):
        wait(watch, clock, 60)
    assert clock.now - began <= GONE_AFTER_S + 2 * PROBE_EVERY_S


def test_a_head_that_answers_again_is_forgiven(head: socket.socket, clock: Clock) -> None:
    watch = HeadWatch("generate (step 4)")
    address = head.getsockname()
    head.close()
    clock.now += PROBE_EVERY_S
    watch.check()
    with socket.create_server(address):
        assert head_refusal() is None
        clock.now += GONE_AFTER_S
        watch.check()
        clock.now += 60
        watch.check()


def test_a_raylet_that_is_gone_is_noticed_before_ray_ends_the_driver_without_a_word(
    head: socket.socket, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next `ray.put` ended the run with status 1, and the raylet's log was all that was said."""
    assert hasattr(Node, "dead_processes")
    dead: list[tuple[str, None]] = [("log_monitor", None)]
    monkeypatch.setattr(ray._private.worker, "_global_node", SimpleNamespace(dead_processes=lambda: dead))
    watch = HeadWatch("score")
    watch.check()
    dead.append(("raylet", None))
    with pytest.raises(PeerDied, match=r"^score: Ray's process on this machine, raylet, is gone"):
        watch.check()
    monkeypatch.setattr(ray._private.worker, "_global_node", None)  # of a driver that joined a cluster
    require_raylet("score")


def test_looking_costs_at_most_one_connection_in_two_seconds(head: socket.socket, clock: Clock) -> None:
    watch = HeadWatch("update")
    for _ in range(25):
        clock.now += 0.1
        watch.check()
    head.settimeout(0.2)
    head.accept()[0].close()
    with pytest.raises(TimeoutError):
        head.accept()
