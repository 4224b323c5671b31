"""Requests that stay while weights change: cut into segments, continued in their order, nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropic.config.run import Sampling
from megatron_entropic.rollout.in_flight import InFlight
from megatron_entropic.rollout.schedule import (
    Admission,
    Moment,
    RecordedSchedule,
    ReplayedSchedule,
    read_schedule,
    schedule_path,
)
from megatron_entropic.types import CUT, GenerationRequest, Response, Segment

SAMPLING = Sampling(1.0, 1.0, -1, 5)


class CountingEngine:
    """Stands where vLLM does: one token a request and pass, the number of tokens it has; five are the end."""

    def __init__(self) -> None:
        self.weights_version = 0
        self.begun: list[tuple[int, int]] = []
        self._running: dict[str, tuple[GenerationRequest, int]] = {}

    def begin(self, requests: list[GenerationRequest], sampling: Sampling) -> list[str]:
        names = [f"{request.seed}.{request.done}" for request in requests]
        self._running |= {name: (request, 0) for name, request in zip(names, requests, strict=True)}
        self.begun += [(request.seed, request.done) for request in requests]
        return names

    def step(self) -> list[tuple[str, Response]]:
        self._running = {name: (request, count + 1) for name, (request, count) in self._running.items()}
        ended = [name for name, (request, count) in self._running.items() if request.done + count == 5]
        return [(name, self._response(*self._running.pop(name), "stop")) for name in ended]

    def cut(self, names: list[str]) -> list[Response]:
        return [self._response(*self._running.pop(name), CUT) for name in names]

    def _response(self, request: GenerationRequest, count: int, reason: str) -> Response:
        tokens = np.arange(request.done, request.done + count, dtype=np.int32)
        return Response(Segment(tokens, np.zeros(count, np.float32), self.weights_version), reason)


def _admission(number: int, *, done: int = 0, doomed: bool = False) -> Admission:
    request = GenerationRequest(np.arange(2 + done, dtype=np.int32), number, done)
    return Admission(f"1/{number}", (0,), (number,), (request,), SAMPLING, doomed=(doomed,))


def _steps(in_flight: InFlight, engine: Any, count: int) -> None:
    for _ in range(count):
        in_flight._step()


def test_a_cut_makes_segments_of_one_version_and_loses_nothing(tmp_path: Path) -> None:
    engine: Any = CountingEngine()
    start = Moment(0, 0, 0)
    in_flight = InFlight(engine, RecordedSchedule(schedule_path(tmp_path, 0), start), start)
    assert in_flight.advance([_admission(1), _admission(2)], seconds=0).unfinished == 2
    _steps(in_flight, engine, 2)
    in_flight.before_swap()
    engine.weights_version = 1
    in_flight.swapped(1)
    report = in_flight.advance([_admission(3)], seconds=0)
    assert [(n, r.segment.tokens.tolist(), r.finish_reason) for n, r in report.responses] == [
        (1, [0, 1], CUT),
        (2, [0, 1], CUT),
    ]
    assert report.moment == Moment(1, 0, 0)
    assert report.taken_up == [(3, 1, 0)]
    report = in_flight.advance([], seconds=10)
    # The rest of the first two comes from the new weights, and before the third, as when they were admitted.
    assert [(n, r.segment.tokens.tolist(), r.segment.weights_version) for n, r in report.responses] == [
        (1, [2, 3, 4], 1),
        (2, [2, 3, 4], 1),
        (3, [0, 1, 2, 3, 4], 1),
    ]
    assert engine.begun == [(1, 0), (2, 0), (1, 2), (2, 2), (3, 0)]
    assert report.unfinished == 0
    assert [row["event"] for row in read_schedule(tmp_path, 0)] == ["admit", "admit", "swap", "admit"]


def test_what_has_not_begun_is_cut_without_a_segment(tmp_path: Path) -> None:
    engine: Any = CountingEngine()
    start = Moment(4, 0, 0)
    engine.weights_version = 4
    in_flight = InFlight(engine, RecordedSchedule(schedule_path(tmp_path, 0), start), start)
    in_flight.advance([_admission(1)], seconds=0)
    in_flight.cut()
    assert in_flight.report().responses == []
    assert in_flight.moment == Moment(4, 1, 0)
    assert [r.finish_reason for _, r in in_flight.advance([], seconds=10).responses] == ["stop"]


def test_the_rest_of_a_response_has_a_seed_of_its_own() -> None:
    request = GenerationRequest(np.array([5, 6], np.int32), 11)
    first = request.continued(np.array([1, 2], np.int32))
    second = first.continued(np.array([3], np.int32))
    assert second.tokens.tolist() == [5, 6, 1, 2, 3]
    assert (second.seed, second.done) == (11, 3)
    assert request.own_seed == 11
    assert len({request.own_seed, first.own_seed, second.own_seed}) == 3


def test_a_replay_lets_go_of_what_was_lost_when_the_rest_is_answered(tmp_path: Path) -> None:
    start, path = Moment(0, 0, 0), schedule_path(tmp_path, 0)
    RecordedSchedule(path, start).due([_admission(1), _admission(2, done=3)], start)
    RecordedSchedule(path, Moment(0, 1, 0), replaces=True).due([_admission(3)], Moment(0, 1, 0))
    engine: Any = CountingEngine()
    followed = ReplayedSchedule(read_schedule(tmp_path, 0), RecordedSchedule(tmp_path / "now.jsonl", start))
    in_flight = InFlight(engine, followed, start)
    # The second had two tokens to go when the first, with five, was lost with its engine.
    handed = [_admission(1, doomed=True), _admission(2, done=3), _admission(3)]
    report = in_flight.advance(handed, seconds=10)
    assert [(number, response.finish_reason) for number, response in report.responses] == [(2, "stop"), (3, "stop")]
    assert report.dropped == [1]
    assert report.moment == Moment(0, 1, 5)
    assert report.unfinished == 0
