"""The queue of requests that all engines take from, while the driver does other work.

    ask --> queue, earliest step first --> engine with room --> reports --> arrived
                ^                              |
                '------ of a lost engine ------'  what it had sampled up to its last cut stays

Engines are stepped by calls, two in flight each, from a thread of the driver's: weights and cuts come between two of
them. The thread calls `arrived`; an error in it, or of an engine, is raised where the driver waits.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.cluster.followed import Followed
from megatron_entropic.cluster.waiting import HeadWatch, all_ready, result_of
from megatron_entropic.config.run import Config, Sampling
from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError
from megatron_entropic.rollout.in_flight import Report
from megatron_entropic.rollout.schedule import Admission, Moment
from megatron_entropic.types import CUT, GenerationRequest, Response

_CALLS_IN_FLIGHT = 2
"""Calls that each engine has: it works on one while the driver takes in the result of the other."""
_POLL_S = 0.2
_REPLAY_STANDS_S = 120.0
"""Seconds without a forward pass after which a replay counts as stuck."""
_SHORTEST_SLICE_S, _LONGEST_SLICE_S = 0.02, 1.0
"""Limits of the time that an engine works before it reports: a call costs about a millisecond."""

Arrived = Callable[[int, Response], None]
"""Function that takes the number of an attempt within its group and a part of it, which is its last unless CUT."""


@dataclass(slots=True)
class Ask:
    """Attempts at one task, each until its end."""

    group: str
    """Name in the schedule, unique among what is in flight."""
    order: tuple[int, ...]
    """What is asked for first, smallest first."""
    requests: dict[int, GenerationRequest]
    """Requests by number of the attempt; what is done of it counts."""
    sampling: Sampling
    arrived: Arrived
    engine: str | None = None
    """Engine that has to take the attempts, where that is known: they were in flight there at a checkpoint."""


@dataclass(slots=True)
class _Attempt:
    ask: Ask
    sample: int
    request: GenerationRequest
    since: tuple[int, int] | None = None
    """Version and part in which the engine took it up; None: it has not said so yet."""
    until: int | None = None
    """Of a replay: number of tokens with which it moves on to another engine, this one being lost; None: never."""
    moved: bool = False


@dataclass(slots=True)
class _Engine:
    """One process of an engine. A replaced one gets a new object; what the old one still answers is its own."""

    name: str
    actor: ray.actor.ActorHandle
    moment: Moment
    attempts: dict[int, _Attempt] = field(default_factory=dict)
    outbox: list[Admission] = field(default_factory=list)
    calls: dict[ray.ObjectRef, float] = field(default_factory=dict)
    """Calls in flight, oldest first, with their deadlines (monotonic seconds)."""
    cut_due: bool = True
    lost: RunError | None = None


class Dispatcher:
    """Lets the engines of a group work on what is asked for, from `begin` to the end of its context."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        """Prepare; engines do nothing before `begin`."""
        rollout = config.rollout
        self.cluster, self._engines = cluster, cluster.engines
        self._colocated = config.cluster.colocate
        self._limit = rollout.max_concurrent_sequences
        self._timeout_s = config.cluster.generate_timeout_s
        followed = rollout.schedule_of
        self._followed = None if followed is None else Followed(followed, self._engines.names)
        self._working: dict[str, _Engine] = {}
        self._ended: list[_Engine] = []
        self._queue: list[tuple[tuple[int, ...], int, Ask]] = []
        self._tickets = itertools.count()
        self._changed = threading.Condition(threading.RLock())
        self._paused = True
        self._closed = False
        self.version = 0
        """Version of the weights that engines have."""
        self._error: BaseException | None = None
        self._slice_s = _SHORTEST_SLICE_S
        self._reports: list[tuple[str, Report]] = []
        self._moved_at = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="dispatcher", daemon=True)

    def __enter__(self) -> Dispatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def begin(self, start: Moment) -> None:
        """Let engines work, whose weights are those of `start`; also after some were replaced."""
        fresh: dict[str, tuple[_Engine, bool]] = {}
        with self._changed:
            self.version = start.version
            for name in self._engines.names:
                actor, known = self._engines.actor(name), self._working.get(name)
                if known is not None and known.actor is actor:
                    continue
                # The place of a lost engine goes on with a part of its own, so that no moment comes twice.
                moment = start if known is None else Moment(start.version, known.moment.part + 1, 0)
                if known is not None:
                    self._give_back(known)
                fresh[name] = _Engine(name, actor, moment), known is not None
        if not fresh:
            return
        self._engines.begin_in_flight({name: (engine.moment, known) for name, (engine, known) in fresh.items()})
        with self._changed:
            self._working |= {name: engine for name, (engine, _) in fresh.items()}
            self._ended = [engine for engine in self._ended if engine.calls]
            self._hand_out()
            self._changed.notify_all()

    def ask(self, asks: Sequence[Ask]) -> None:
        """Put attempts into the queue; each part of them goes to `arrived`, in the dispatcher's thread."""
        with self._changed:
            for ask in asks:
                self._push(ask)
            self._hand_out()
            self._changed.notify_all()

    @contextmanager
    def turn(self, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Let engines work; with `cluster.colocate` only within the block, elsewhere from the first one on.

        Args:
            while_waiting: called at least about once a second of a wait; may raise.
        """
        with self.cluster.rollout(), self._changed:
            self._paused = False
            self._changed.notify_all()
        try:
            yield
        finally:
            if self._colocated:
                self.before_swap("engines fall asleep", while_waiting)
                with self._changed:
                    self._paused = True

    def wait(self, done: Callable[[], bool], *, phase: str, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until `done`, which is asked after every report. Engines that are lost meanwhile are replaced.

        The policy stands still and has the weights that were published last.

        Args:
            done: whether the wait is over; called in this thread, while nothing arrives.
            phase: name of what is going on, for errors.
            while_waiting: called at least about once a second; may raise.

        Raises:
            PeerDied, PhaseTimeout: more engines were lost than `cluster.max_engine_restarts` allows.
            RunError: an engine raised.
        """
        head, self._moved_at = HeadWatch(phase), time.monotonic()
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                if done():
                    return
                if not self._lost:
                    self._changed.wait(_POLL_S)
            head.check()
            while_waiting()
            self._require_movement(phase)
            if lost := self._lost:
                self._engines.replace(lost)
                self.cluster.renew_weights()
                self.begin(Moment(self.version, 0, 0))
                with self.cluster.rollout():  # whose turn it was
                    continue

    @property
    def _lost(self) -> dict[str, RunError]:
        """Errors of the engines that are lost and not replaced yet, by name."""
        return {name: engine.lost for name, engine in self._working.items() if engine.lost is not None}

    @property
    def waiting(self) -> int:
        """Number of attempts in the queue."""
        with self._changed:
            return sum(len(ask.requests) for *_, ask in self._queue)

    def placed(self, before: Moment) -> dict[tuple[str, int], tuple[int, int]]:
        """Attempts that an engine took up in a part before that of `before`, by group and number of the attempt.

        Returns:
            Number of the engine, and ticket: attempts of one engine are in the order of their tickets.
        """
        with self._changed:
            return {
                (attempt.ask.group, attempt.sample): (self._engines.names.index(engine.name), ticket)
                for engine in self._working.values()
                for ticket, attempt in engine.attempts.items()
                if attempt.since is not None and attempt.since < before[:2]
            }

    def take_reports(self) -> list[tuple[str, Report]]:
        """Reports since the last call, without their responses, with the names of their engines."""
        with self._changed:
            reports, self._reports = self._reports, []
        return reports

    def before_swap(self, phase: str, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until new weights may come: at once, unless a recorded schedule says when."""
        if self._followed is not None:

            def due() -> bool:
                # What a report says that is older than the weights is about their own arrival.
                return all(one.cut_due and one.moment.version == self.version for one in self._busy)

            self.wait(due, phase=phase, while_waiting=while_waiting)

    @contextmanager
    def stopped(self, phase: str) -> Iterator[Moment]:
        """Cut everything that runs, and let nothing run in the block, at whose beginning all parts have arrived.

        Yields:
            The moment with which engines go on.
        """
        with self._changed:
            paused, self._paused = self._paused, True
        try:
            self._engines.cut()
            self.settle(phase)
            yield max(one.moment for one in self._working.values())
        finally:
            with self._changed:
                self._paused = paused
                self._hand_out()
                self._changed.notify_all()

    def settle(self, phase: str) -> None:
        """Wait until everything has arrived that engines have to report by now."""
        with self._changed:
            asked = set()
            for engine in self._working.values():
                if engine.lost is None:
                    reference = self._engines.report(engine.actor)
                    engine.calls[reference] = time.monotonic() + self._timeout_s
                    asked.add(reference)
            self._changed.notify_all()
        self.wait(lambda: not any(asked & engine.calls.keys() for engine in self._all()), phase=phase)

    def standing(self) -> AbstractContextManager[Any]:
        """Block in which nothing arrives."""
        return self._changed

    def pace(self, step_s: float) -> None:
        """Let engines report in a small part of the time of a step, on which weights have to wait."""
        self._slice_s = min(max(step_s / 50, _SHORTEST_SLICE_S), _LONGEST_SLICE_S)

    @property
    def _busy(self) -> list[_Engine]:
        return [one for one in self._working.values() if one.attempts and one.lost is None]

    def _require_movement(self, phase: str) -> None:
        """Refuse to wait for ever for what a recorded schedule says next.

        Raises:
            RunError: no engine has moved for `_REPLAY_STANDS_S`.
        """
        if self._followed is None or not self._busy or time.monotonic() - self._moved_at < _REPLAY_STANDS_S:
            return
        places = ", ".join(f"{one.name} at {tuple(one.moment)}" for one in self._working.values())
        raise RunError(
            f"{phase}: nothing has moved for {_REPLAY_STANDS_S:g} s ({places}; version, part, forward pass): the "
            "recorded schedule is not of a run with these settings"
        )

    def _push(self, ask: Ask) -> None:
        heapq.heappush(self._queue, (ask.order, next(self._tickets), ask))

    def _hand_out(self) -> None:
        """Give engines with room what comes first in the queue. The least busy one has the most room."""
        left = []
        least_busy = [(len(one.attempts), place, one) for place, one in enumerate(self._alive)] if self._queue else []
        heapq.heapify(least_busy)
        while self._queue:
            order, ticket, ask = heapq.heappop(self._queue)
            engine = self._engine_for(ask, least_busy)
            if engine is None:
                left.append((order, ticket, ask))
                if ask.engine is None:
                    break
                continue
            attempts = {next(self._tickets): _Attempt(ask, sample, one) for sample, one in ask.requests.items()}
            engine.attempts |= attempts
            if self._followed is not None and ask.engine is None:
                for attempt in attempts.values():
                    attempt.until = self._followed.handed_out(ask.group, attempt.sample)
                    self._move_on(attempt)
            engine.outbox.append(
                Admission(
                    ask.group,
                    samples=tuple(ask.requests),
                    numbers=tuple(attempts),
                    requests=tuple(ask.requests.values()),
                    sampling=ask.sampling,
                    restored=ask.engine is not None,
                    doomed=tuple(attempt.until is not None for attempt in attempts.values()),
                )
            )
        for item in left:
            heapq.heappush(self._queue, item)
        for engine in self._working.values():
            if engine.outbox and len(engine.calls) < _CALLS_IN_FLIGHT:
                self._call(engine)

    @property
    def _alive(self) -> list[_Engine]:
        return [one for one in self._working.values() if one.lost is None]

    def _engine_for(self, ask: Ask, least_busy: list[tuple[int, int, _Engine]]) -> _Engine | None:
        """The engine that is to take an ask; None: none has room for it.

        Args:
            ask: what is to be handed out.
            least_busy: heap of the engines that are not lost by the attempts they had; they have more by now.
        """
        name = ask.engine
        if name is None and self._followed is not None:
            name = self._followed.engine(ask.group, next(iter(ask.requests)))
        if name:
            named = self._working.get(name)
            return named if named is not None and named.lost is None else None
        while least_busy and least_busy[0][0] != len(least_busy[0][2].attempts):
            _, place, one = least_busy[0]
            heapq.heapreplace(least_busy, (len(one.attempts), place, one))
        engine = least_busy[0][2] if least_busy else None
        # One group more than the engine can work on at a time: the next one is there when there is room.
        return engine if engine is not None and len(engine.attempts) < self._limit + len(ask.requests) else None

    def _call(self, engine: _Engine) -> None:
        if self._paused or engine.lost is not None:
            return
        admissions, engine.outbox = engine.outbox, []
        reference = self._engines.advance(engine.actor, admissions, self._slice_s)
        engine.calls[reference] = time.monotonic() + self._timeout_s

    def _serve(self) -> None:
        try:
            while True:
                with self._changed:
                    if self._closed:
                        return
                    for engine in self._busy:
                        while len(engine.calls) < _CALLS_IN_FLIGHT and not self._paused:
                            self._call(engine)
                    # Reports of an engine are taken in in their order.
                    calls = {next(iter(engine.calls)): engine for engine in self._all() if engine.calls}
                    if not calls:
                        self._changed.wait(_POLL_S)
                        continue
                for reference in all_ready(list(calls), _POLL_S):
                    self._take_in(calls[reference], reference)
                with self._changed:  # once for all of them: it looks at every engine
                    self._hand_out()
                self._look_for_silence()
        except BaseException as error:  # noqa: BLE001  whoever waits must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _all(self) -> list[_Engine]:
        return [*self._working.values(), *self._ended]

    def _take_in(self, engine: _Engine, reference: ray.ObjectRef) -> None:
        try:
            report: Report = result_of(reference, engine.name, "generate")
        except PeerDied as error:
            with self._changed:
                del engine.calls[reference]
                self._lose(engine, error)
            return
        with self._changed:
            del engine.calls[reference]
            engine.moment, engine.cut_due = report.moment, report.cut_due
            if engine.lost is None:
                # Without the responses, whose arrays would keep the object store occupied until the step ends.
                self._reports.append((engine.name, replace(report, responses=[])))
                if report.passes or report.taken_up or report.responses:
                    self._moved_at = time.monotonic()
                for ticket, version, part in report.taken_up:
                    engine.attempts[ticket].since = (version, part)
                for ticket, response in report.responses:
                    self._arrived(engine, ticket, response)
                for ticket in report.dropped:
                    del engine.attempts[ticket]
            self._changed.notify_all()

    def _arrived(self, engine: _Engine, ticket: int, response: Response) -> None:
        attempt = engine.attempts[ticket]
        if response.finish_reason == CUT:
            attempt.request = attempt.request.continued(response.segment.tokens)
        else:
            del engine.attempts[ticket]
        if attempt.until is None or (not attempt.moved and attempt.request.done <= attempt.until):
            attempt.ask.arrived(attempt.sample, response)
            self._move_on(attempt)

    def _move_on(self, attempt: _Attempt) -> None:
        """Let another engine take an attempt whose own is lost in the run that is followed, once it has all of it."""
        if attempt.until is None or attempt.moved or attempt.request.done < attempt.until:
            return
        assert self._followed is not None, "nothing else has an end"
        attempt.moved, ask = True, attempt.ask
        if together := self._followed.move(ask.group, attempt.sample, attempt.request):
            self._push(Ask(ask.group, ask.order, together, ask.sampling, ask.arrived))

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        with self._changed:
            for engine in self._working.values():
                if engine.lost is None and any(deadline < now for deadline in engine.calls.values()):
                    told = f"generate: no answer within {self._timeout_s:g} s from {engine.name}"
                    self._lose(engine, PhaseTimeout(told))

    def _lose(self, engine: _Engine, error: RunError) -> None:
        if engine.lost is None:
            engine.lost = error
            self._give_back(engine)
        self._changed.notify_all()

    def _give_back(self, engine: _Engine) -> None:
        """Put what a lost engine had into the queue again, from its last cut on."""
        engine.lost = engine.lost or PeerDied(f"{engine.name} was replaced")
        by_ask: dict[int, tuple[Ask, dict[int, GenerationRequest]]] = {}
        for attempt in engine.attempts.values():
            by_ask.setdefault(id(attempt.ask), (attempt.ask, {}))[1][attempt.sample] = attempt.request
        for ask, requests in by_ask.values():
            self._push(Ask(ask.group, ask.order, requests, ask.sampling, ask.arrived))
        engine.attempts, engine.outbox = {}, []
        if engine not in self._ended:
            self._ended.append(engine)
        self._hand_out()
