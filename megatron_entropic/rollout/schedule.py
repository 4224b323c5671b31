"""When requests and weights reached an engine, between which two of its forward passes: all that the clock decides.

    RUN/schedule/engine_0.jsonl     {"version": 3, "part": 0, "engine_step": 17, "event": "admit", "group": "4/2", ...}

A moment is (version of the weights, part, forward passes since). A part ends when everything that runs is cut: for new
weights, which also begin part 0 of the next version, or because the engine has to stop. Counting from the last cut, a
run that continues from a checkpoint has the moments of one that was not stopped.

`RecordedSchedule` lets things happen as they come and writes each down before it takes effect. `ReplayedSchedule` lets
them happen when another run's record says so, and not before. On a CPU the second then samples what the first did, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from megatron_entropic.config.run import Sampling
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.files.jsonl import JsonLinesWriter, read_json_lines
from megatron_entropic.types import GenerationRequest

CutEvent = Literal["swap", "cut"]
"""Reason of a cut: new weights, or a stop."""


class Moment(NamedTuple):
    """A point between two forward passes of an engine."""

    version: int
    part: int
    engine_step: int


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """Attempts at one task that an engine takes up together."""

    group: str
    """Name of the task's group: STEP/PLACE, or that of a benchmark's problem; unique among those in flight."""
    samples: tuple[int, ...]
    """Numbers of the attempts within their group."""
    numbers: tuple[int, ...]
    """The driver's numbers for the requests, unique in the run, in the order of admission."""
    requests: tuple[GenerationRequest, ...]
    sampling: Sampling
    restored: bool = False
    """Whether they were in flight when the checkpoint was written that the run continues from."""
    doomed: tuple[bool, ...] = ()
    """Of a replay: whether each was lost with its engine, by which time another had it; empty: none was."""


class Schedule(Protocol):
    """What decides when an engine does something beside stepping."""

    cuts_itself: bool
    """Whether cuts without new weights come when the schedule says so, and not when they are asked for."""

    def cuts_now(self, now: Moment) -> bool:
        """Whether such a cut comes now."""

    def ends_here(self) -> bool:
        """Whether the process that is followed was lost after the last event, with all it still had."""

    def restart(self, now: Moment) -> Moment | None:
        """The moment at which the next process in its place began, if that is what comes now."""

    def due(self, handed: Sequence[Admission], now: Moment) -> list[Admission]:
        """Admissions, of those handed over now or earlier, that take effect before the next forward pass."""

    def may_step(self, now: Moment) -> bool:
        """Whether the next forward pass may come now."""

    def cut_due(self, now: Moment) -> bool:
        """Whether new weights may come now."""

    def cut(self, now: Moment, event: CutEvent) -> None:
        """Let a cut take effect, which `cuts_now` or `cut_due` allows."""


class RecordedSchedule:
    """Everything takes effect as it comes, and is on disk before."""

    cuts_itself = False

    def __init__(self, path: Path, start: Moment, *, replaces: bool = False) -> None:
        """Record into `path`; what stands there for `start` or later did not count. `replaces`: `open_schedule`."""
        self._record = JsonLinesWriter(path)
        self._record.truncate_from(lambda row: _moment(row) >= start)
        if replaces:
            self._record.append(_row(start, "start"))

    def due(self, handed: Sequence[Admission], now: Moment) -> list[Admission]:
        """All that were handed over; see `Schedule`."""
        # What was in flight at a checkpoint is part of the state that the run continues from.
        rows = [
            _row(now, "admit", group=one.group, samples=one.samples, done=[request.done for request in one.requests])
            for one in handed
            if not one.restored
        ]
        if rows:
            self._record.append_all(rows)
        return list(handed)

    def may_step(self, now: Moment) -> bool:
        """Always."""
        return True

    def cuts_now(self, now: Moment) -> bool:
        """Never."""
        return False

    def ends_here(self) -> bool:
        """Never: who is lost does not ask."""
        return False

    def restart(self, now: Moment) -> Moment | None:
        """Never."""
        return None

    def cut_due(self, now: Moment) -> bool:
        """Always."""
        return True

    def cut(self, now: Moment, event: CutEvent) -> None:
        """At once; see `Schedule`."""
        self._record.append(_row(now, event))


class ReplayedSchedule:
    """Everything takes effect when a recorded schedule says so; it is recorded once more beside this run.

    What comes after the end of the recorded schedule takes effect as it comes.
    """

    cuts_itself = True

    def __init__(self, rows: Sequence[dict[str, Any]], record: RecordedSchedule) -> None:
        self._rows = list(map(_by_itself, rows, [*rows[1:], None]))
        self._next = 0
        self._held: dict[tuple[str, tuple[int, ...]], Admission] = {}
        self._record = record

    def due(self, handed: Sequence[Admission], now: Moment) -> list[Admission]:
        """Those whose recorded moment is now, in the recorded order; see `Schedule`."""
        restored = [one for one in handed if one.restored]
        self._held |= {(one.group, one.samples): one for one in handed if not one.restored}
        due = list(restored)
        while (row := self._row) is not None and row["event"] == "admit" and _moment(row) == now:
            admission = self._held.pop((row["group"], tuple(row["samples"])), None)
            if admission is None:
                break
            due.append(admission)
            self._next += 1
        if self._row is None:
            due += self._held.values()
            self._held = {}
        return self._record.due(due, now)

    def may_step(self, now: Moment) -> bool:
        """Not while something that was recorded for now has not happened.

        Raises:
            RunError: the record has something for a moment that is over: this is another run.
        """
        row = self._row
        if row is not None and _moment(row) < now:
            raise RunError(
                f"the schedule does not fit this run: at {_words(now)} its next event is {row['event']} "
                f"{row.get('group', '')} at {_words(_moment(row))}"
            )
        return row is None or _moment(row) > now

    def cuts_now(self, now: Moment) -> bool:
        """At the moment of a recorded cut that was not made for new weights."""
        row = self._row
        return row is not None and _moment(row) == now and row["event"] == "cut"

    def ends_here(self) -> bool:
        """Where the record of a process ends; see `Schedule`."""
        return self._row is None or self._row["event"] == "start"

    def restart(self, now: Moment) -> Moment | None:
        """Where the next process in the same place began with the version of now."""
        row = self._row
        if row is None or row["event"] != "start" or row["version"] != now.version:
            return None
        self._next += 1
        return _moment(row)

    def cut_due(self, now: Moment) -> bool:
        """At the moment of a recorded swap, after the end of the record, and where a process was lost before it."""
        row = self._row
        if row is not None and row["event"] == "start":
            return bool(row["version"] > now.version)
        return row is None or (_moment(row) == now and row["event"] == "swap")

    def cut(self, now: Moment, event: CutEvent) -> None:
        """At its recorded moment; see `Schedule`."""
        self._next += self._row is not None and self._row["event"] != "start"
        self._record.cut(now, event)

    @property
    def _row(self) -> dict[str, Any] | None:
        return self._rows[self._next] if self._next < len(self._rows) else None


def schedule_path(run_dir: Path, engine: int) -> Path:
    """File of the events of one engine."""
    return run_dir / "schedule" / f"engine_{engine}.jsonl"


def open_schedule(
    run_dir: Path, engine: int, replayed: Path | None, start: Moment, *, replaces: bool = False
) -> Schedule:
    """Schedule of an engine that begins at `start`.

    Args:
        run_dir: directory of the run, into which is recorded.
        engine: number of the engine.
        replayed: directory of the run whose schedule is followed; None: none.
        start: first moment; what was recorded for earlier ones stays, for later ones did not count.
        replaces: whether the engine's process is new in the place of one that was lost.

    Raises:
        UserError: `replayed` has no schedule for this engine.
    """
    record = RecordedSchedule(schedule_path(run_dir, engine), start, replaces=replaces)
    if replayed is None:
        return record
    rows = read_schedule(replayed, engine)
    return ReplayedSchedule([row for row in rows if _moment(row) >= start], record)


def read_schedule(run_dir: Path, engine: int) -> list[dict[str, Any]]:
    """Events of one engine of a run, in order.

    Raises:
        UserError: there are none.
    """
    path = schedule_path(run_dir, engine)
    if not path.is_file():
        raise UserError(f"{path} is not there: no schedule of engine {engine} was recorded, was rollout.lag 0?")
    return read_json_lines(path)


@dataclass(frozen=True, slots=True)
class Taken:
    """One time that an engine of a recorded run took up an attempt."""

    engine: int
    moment: Moment
    samples: tuple[int, ...]
    """Attempts of the group that it took up together."""
    done: int
    """Number of tokens that the attempt had."""


def read_assignments(run_dir: Path, engines: int) -> dict[tuple[str, int], list[Taken]]:
    """Who took up each attempt of a recorded run, by group and number: more than one, where the first was lost."""
    found: dict[tuple[str, int], list[Taken]] = {}
    for engine in range(engines):
        for row in read_schedule(run_dir, engine):
            if row["event"] == "admit":
                for sample, done in zip(row["samples"], row["done"], strict=True):
                    taken = Taken(engine, _moment(row), tuple(row["samples"]), done)
                    found.setdefault((row["group"], sample), []).append(taken)
    return {key: sorted(taken, key=lambda one: one.moment) for key, taken in found.items()}


def _by_itself(row: dict[str, Any], following: dict[str, Any] | None) -> dict[str, Any]:
    """A swap after which the version is the same was an update that broke off or came again: no more than a cut."""
    again = row["event"] == "swap" and following is not None and following["version"] == row["version"]
    return {**row, "event": "cut"} if again else row


def _row(now: Moment, event: str, **what: Any) -> dict[str, Any]:
    return {**now._asdict(), "event": event, **what}


def _moment(row: dict[str, Any]) -> Moment:
    return Moment(row["version"], row["part"], row["engine_step"])


def _words(moment: Moment) -> str:
    return f"weights version {moment.version}, part {moment.part}, forward pass {moment.engine_step}"
