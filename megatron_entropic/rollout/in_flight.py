"""Requests that an engine works on while the policy learns, and while its weights change.

    admit --> waiting --> vLLM --> finished responses --> report
                 ^          |
                 '-- cut <--'      for new weights, or because the engine has to stop

A cut ends every running request. What one has sampled so far is a segment under one version of the weights, and the
rest becomes a request whose prompt is longer by that segment, with a seed of its own. So every token has been sampled
from one version with keys and values of that version, and what is in flight can continue in another process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_entropic.config.run import Sampling
from megatron_entropic.rollout.engine import RolloutEngine
from megatron_entropic.rollout.schedule import Admission, CutEvent, Moment, Schedule
from megatron_entropic.types import GenerationRequest, Response

_IDLE_S = 0.01
"""Seconds that an engine which has to wait for what a replayed schedule says next lets pass before it reports."""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What an engine has done since its last report."""

    responses: list[tuple[int, Response]]
    """Responses with the driver's numbers of their requests, in the order in which they came to their end or a cut."""
    moment: Moment
    taken_up: list[tuple[int, int, int]]
    """Requests that were taken up, each with the version and the part in which it was."""
    dropped: list[int]
    """Numbers of requests that a replay lets go where the process that it follows was lost."""
    unfinished: int
    """Number of requests that are not at their end."""
    tokens: int
    """Number of tokens of `responses`."""
    passes: int
    """Number of forward passes."""
    began_s: float
    ended_s: float
    """Begin and end, seconds since the epoch."""
    cut_due: bool
    """Whether the schedule lets new weights come now."""


@dataclass(slots=True)
class _Work:
    """One unfinished request."""

    request: GenerationRequest
    sampling: Sampling
    name: str | None = None
    """Its name in vLLM, while it runs."""
    doomed: bool = False
    """Whether the process that is followed was lost before its end."""


class InFlight:
    """The unfinished requests of one engine, in the order of their admission."""

    def __init__(self, engine: RolloutEngine, schedule: Schedule, start: Moment) -> None:
        """Begin with none, at the moment `start`, whose version is that of the engine's weights."""
        self._engine = engine
        self._schedule = schedule
        # Not the engine's own: an update that broke off leaves it without one.
        self._version, self._part, self._engine_step = start
        self._work: dict[int, _Work] = {}
        self._numbers: dict[str, int] = {}
        self._responses: list[tuple[int, Response]] = []
        self._taken_up: list[tuple[int, int, int]] = []
        self._dropped: list[int] = []

    @property
    def moment(self) -> Moment:
        """The point between two forward passes that has been reached."""
        return Moment(self._version, self._part, self._engine_step)

    def advance(self, admissions: Sequence[Admission], seconds: float) -> Report:
        """Take admissions up and run forward passes for about so long, or until there is nothing to do.

        Args:
            admissions: what is handed over; the schedule decides when each is taken up.
            seconds: wall time after which to report.

        Raises:
            UserError: a prompt that leaves no room for its response.
            RunError: a replayed schedule does not fit.
        """
        began, before = time.time(), self._engine_step
        handed = list(admissions)
        while True:
            self._take_up(handed)
            handed = []
            if self._schedule.cuts_now(self.moment):
                self._cut("cut")
                continue
            if self._schedule.ends_here() and all(work.doomed for work in self._work.values()):
                self._drop()
            if not self._work and (start := self._schedule.restart(self.moment)):
                self._version, self._part, self._engine_step = start
                continue
            if not self._work or time.time() - began >= seconds:
                break
            if not self._schedule.may_step(self.moment):
                time.sleep(_IDLE_S)
                break
            self._step()
        return self.report(began, self._engine_step - before)

    def report(self, began_s: float | None = None, passes: int = 0) -> Report:
        """What has come to its end or a cut since the last report; nothing is done for it."""
        (responses, self._responses), (taken_up, self._taken_up) = (self._responses, []), (self._taken_up, [])
        dropped, self._dropped = self._dropped, []
        ended_s = time.time()
        return Report(
            responses,
            moment=self.moment,
            taken_up=taken_up,
            dropped=dropped,
            unfinished=len(self._work),
            tokens=sum(response.segment.tokens.size for _, response in responses),
            passes=passes,
            began_s=ended_s if began_s is None else began_s,
            ended_s=ended_s,
            cut_due=self._schedule.cut_due(self.moment),
        )

    def cut(self) -> None:
        """Cut everything that runs; it goes on with the next `advance`, a new part having begun."""
        if not self._schedule.cuts_itself:
            self._cut("cut")

    def before_swap(self) -> None:
        """Cut everything that runs, because the engine's weights are about to be those of another version."""
        self._cut("swap")

    def _cut(self, event: CutEvent) -> None:
        self._schedule.cut(self.moment, event)
        running = {number: work.name for number, work in self._work.items() if work.name is not None}
        for number, response in zip(running, self._engine.cut(list(running.values())), strict=True):
            work = self._work[number]
            work.request, work.name = work.request.continued(response.segment.tokens), None
            if response.segment.tokens.size:
                self._responses.append((number, response))
        self._numbers.clear()
        self._part, self._engine_step = self._part + 1, 0

    def swapped(self, version: int) -> None:
        """Go on with new weights; parts are counted from 0 again, unless they are of the same version."""
        if version != self._version:
            self._version, self._part = version, 0

    def _take_up(self, handed: Sequence[Admission]) -> None:
        """Take up what is due; it runs from the next forward pass on."""
        for admission in self._schedule.due(handed, self.moment):
            version, part, _ = self.moment
            self._taken_up += [(number, version, part) for number in admission.numbers]
            doomed = admission.doomed or (False,) * len(admission.numbers)
            for number, request, lost in zip(admission.numbers, admission.requests, doomed, strict=True):
                self._work[number] = _Work(request, admission.sampling, doomed=lost)

    def _drop(self) -> None:
        """Let go of all there is."""
        self._engine.cut([work.name for work in self._work.values() if work.name is not None])
        self._dropped += self._work
        self._work.clear()
        self._numbers.clear()

    def _begin_waiting(self) -> None:
        """Let run what was taken up or cut, in the order of admission."""
        waiting = [number for number, work in self._work.items() if work.name is None]
        for sampling, numbers in groupby(waiting, key=lambda number: self._work[number].sampling):
            begun = list(numbers)
            names = self._engine.begin([self._work[number].request for number in begun], sampling)
            for number, name in zip(begun, names, strict=True):
                self._work[number].name, self._numbers[name] = name, number

    def _step(self) -> None:
        self._begin_waiting()
        for name, response in self._engine.step():
            number = self._numbers.pop(name)
            del self._work[number]
            self._responses.append((number, response))
        self._engine_step += 1
