"""How often Ray is asked, as a function of the number of peers: a call of `ray.wait` looks at each of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic.cluster import placement, waiting


class Ray:
    """Pending calls and streams that end in the given order, some more with every look at them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at_a_time: int) -> None:
        self.looks = 0
        self.looked_at = 0
        self._at_a_time = at_a_time
        monkeypatch.setattr(waiting.ray, "wait", self.wait)
        monkeypatch.setattr(waiting.ray, "get", lambda reference, timeout: reference)
        monkeypatch.setattr(waiting.HeadWatch, "check", lambda watch: None)

    def wait(self, pending: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.looks, self.looked_at = self.looks + 1, self.looked_at + len(pending)
        count = min(num_returns, self._at_a_time, len(pending))
        return pending[:count], pending[count:]


class Stream:
    """A generator of some items, as a dictionary's key."""

    def __init__(self, count: int) -> None:
        self._items = iter(range(1, count + 1))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> int:
        return next(self._items)


@pytest.mark.parametrize("peers", [1, 64, 2048])
def test_answers_that_are_there_are_gathered_with_one_look(monkeypatch: pytest.MonkeyPatch, peers: int) -> None:
    ray = Ray(monkeypatch, at_a_time=peers)
    calls: Any = {f"policy rank {rank}": rank for rank in range(peers)}
    assert waiting.gather(calls, phase="score", timeout_s=60) == calls
    assert (ray.looks, ray.looked_at) == (1, peers)


def test_answers_that_come_in_two_halves_are_gathered_with_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, told = Ray(monkeypatch, at_a_time=512), []
    calls: Any = {f"policy rank {rank}": rank for rank in range(1024)}
    waiting.gather(calls, phase="score", timeout_s=60, while_waiting=lambda: told.append(1))
    assert (ray.looks, len(told)) == (2, 1)


@pytest.mark.parametrize("engines", [1, 64, 1024])
def test_looks_at_streams_do_not_grow_with_their_number(monkeypatch: pytest.MonkeyPatch, engines: int) -> None:
    """Messages that all engines have sent are taken in together: 4 each and their ends, with two looks a round."""
    ray, taken = Ray(monkeypatch, at_a_time=engines), []
    streams: Any = {f"engine {number}": Stream(4) for number in range(engines)}
    lost = waiting.receive_streams(streams, lambda *one: taken.append(one), phase="generate", timeout_s=60)
    assert not lost
    assert len(taken) == 4 * engines
    assert ray.looks <= 10


@pytest.mark.parametrize("ranks", [8, 1152])
def test_ranks_are_ordered_with_one_table_of_a_group(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    asked: list[str] = []

    def table(group: Any) -> dict[str, Any]:
        asked.append(group.id)
        return {"bundles_to_node_id": {bundle: f"node {bundle % 3}" for bundle in range(ranks)}}

    monkeypatch.setattr(placement, "placement_group_table", table)
    group: Any = SimpleNamespace(id="group")
    slots = placement._by_node([placement.Slot(group, bundle) for bundle in range(ranks)])
    assert asked == ["group"]
    assert [slot.bundle for slot in slots] == sorted(range(ranks), key=lambda bundle: (bundle % 3, bundle))
