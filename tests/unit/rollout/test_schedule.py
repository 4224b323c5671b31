"""Schedules: recorded as things come, cut where a run continues, followed to the forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_entropic.config.run import Sampling
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.rollout.schedule import (
    Admission,
    Moment,
    RecordedSchedule,
    ReplayedSchedule,
    Taken,
    open_schedule,
    read_assignments,
    read_schedule,
    schedule_path,
)
from megatron_entropic.types import GenerationRequest

SAMPLING = Sampling(1.0, 1.0, -1, 8)


def _admission(group: str, *, restored: bool = False) -> Admission:
    request = GenerationRequest(np.arange(3, dtype=np.int32), 1)
    return Admission(group, (0, 1), (10, 11), (request, request), SAMPLING, restored)


def _recorded(run: Path) -> RecordedSchedule:
    schedule = RecordedSchedule(schedule_path(run, 0), Moment(0, 0, 0))
    schedule.due([_admission("1/0")], Moment(0, 0, 0))
    schedule.due([_admission("1/1")], Moment(0, 0, 4))
    schedule.cut(Moment(0, 0, 9), "swap")
    schedule.due([_admission("2/0")], Moment(1, 0, 0))
    schedule.cut(Moment(1, 0, 3), "cut")
    schedule.cut(Moment(1, 1, 2), "swap")
    return schedule


def test_what_happens_is_on_disk_with_its_moment(tmp_path: Path) -> None:
    _recorded(tmp_path)
    rows = read_schedule(tmp_path, 0)
    assert [(row["version"], row["part"], row["engine_step"], row["event"]) for row in rows] == [
        (0, 0, 0, "admit"),
        (0, 0, 4, "admit"),
        (0, 0, 9, "swap"),
        (1, 0, 0, "admit"),
        (1, 0, 3, "cut"),
        (1, 1, 2, "swap"),
    ]
    taken = read_assignments(tmp_path, 1)
    assert list(taken) == [(group, sample) for group in ("1/0", "1/1", "2/0") for sample in (0, 1)]
    assert taken["1/1", 1] == [Taken(0, Moment(0, 0, 4), (0, 1), 0)]


def test_a_run_that_continues_forgets_what_did_not_count(tmp_path: Path) -> None:
    _recorded(tmp_path)
    open_schedule(tmp_path, 0, None, Moment(1, 0, 0))
    assert [row["event"] for row in read_schedule(tmp_path, 0)] == ["admit", "admit", "swap"]


def test_what_was_in_flight_at_a_checkpoint_is_no_event(tmp_path: Path) -> None:
    schedule = RecordedSchedule(schedule_path(tmp_path, 0), Moment(3, 0, 0))
    assert schedule.due([_admission("4/1", restored=True)], Moment(3, 0, 0))
    assert read_schedule(tmp_path, 0) == []


def test_a_followed_schedule_lets_nothing_come_early(tmp_path: Path) -> None:
    _recorded(tmp_path / "first")
    record = RecordedSchedule(schedule_path(tmp_path / "second", 0), Moment(0, 0, 0))
    replayed = ReplayedSchedule(read_schedule(tmp_path / "first", 0), record)
    # Handed over early and in another order: each waits for its moment.
    assert [one.group for one in replayed.due([_admission("1/1"), _admission("1/0")], Moment(0, 0, 0))] == ["1/0"]
    assert replayed.may_step(Moment(0, 0, 0))
    assert not replayed.cut_due(Moment(0, 0, 3))
    assert [one.group for one in replayed.due([], Moment(0, 0, 4))] == ["1/1"]
    assert not replayed.may_step(Moment(0, 0, 9))
    assert replayed.cut_due(Moment(0, 0, 9))
    replayed.cut(Moment(0, 0, 9), "swap")
    # It waits for what has not been handed over yet.
    assert replayed.due([], Moment(1, 0, 0)) == []
    assert not replayed.may_step(Moment(1, 0, 0))
    assert [one.group for one in replayed.due([_admission("2/0")], Moment(1, 0, 0))] == ["2/0"]
    # Cuts for a checkpoint come by themselves, whether or not a checkpoint is written this time.
    assert replayed.cuts_now(Moment(1, 0, 3))
    replayed.cut(Moment(1, 0, 3), "cut")
    replayed.cut(Moment(1, 1, 2), "swap")
    assert read_schedule(tmp_path / "second", 0) == read_schedule(tmp_path / "first", 0)
    # Behind the end of the record everything comes as it comes.
    assert replayed.may_step(Moment(2, 0, 0))
    assert [one.group for one in replayed.due([_admission("9/9")], Moment(2, 0, 0))] == ["9/9"]


def test_a_schedule_of_another_run_is_refused(tmp_path: Path) -> None:
    _recorded(tmp_path)
    record = RecordedSchedule(tmp_path / "other.jsonl", Moment(0, 0, 0))
    replayed = ReplayedSchedule(read_schedule(tmp_path, 0), record)
    with pytest.raises(RunError, match=r"does not fit this run: at weights version 0, part 0, forward pass 2 .* 1/0"):
        replayed.may_step(Moment(0, 0, 2))
    with pytest.raises(UserError, match=r"no schedule of engine 1 was recorded, was rollout\.lag 0"):
        read_schedule(tmp_path, 1)


def test_the_record_of_a_lost_engine_ends_where_its_successor_began(tmp_path: Path) -> None:
    path = schedule_path(tmp_path, 0)
    lost = RecordedSchedule(path, Moment(0, 0, 0))
    lost.due([_admission("1/0")], Moment(0, 0, 0))
    lost.cut(Moment(0, 0, 5), "swap")
    RecordedSchedule(path, Moment(1, 1, 0), replaces=True).due([_admission("2/0")], Moment(1, 1, 0))
    replayed = ReplayedSchedule(read_schedule(tmp_path, 0), RecordedSchedule(tmp_path / "now.jsonl", Moment(0, 0, 0)))
    replayed.due([_admission("1/0"), _admission("2/0")], Moment(0, 0, 0))
    assert not replayed.ends_here()
    assert replayed.cut_due(Moment(0, 0, 5))
    replayed.cut(Moment(0, 0, 5), "swap")
    assert replayed.ends_here()
    assert replayed.may_step(Moment(1, 0, 30)), "what it still answered is answered again"
    assert not replayed.cut_due(Moment(1, 0, 30))
    assert replayed.restart(Moment(1, 0, 30)) == Moment(1, 1, 0)
    assert [one.group for one in replayed.due([], Moment(1, 1, 0))] == ["2/0"]


def test_an_update_that_came_twice_is_one_swap_and_one_cut(tmp_path: Path) -> None:
    schedule = RecordedSchedule(schedule_path(tmp_path, 0), Moment(0, 0, 0))
    schedule.cut(Moment(0, 0, 5), "swap")  # broke off, since another engine died
    schedule.cut(Moment(0, 1, 0), "swap")
    schedule.cut(Moment(1, 0, 2), "swap")
    replayed = ReplayedSchedule(read_schedule(tmp_path, 0), RecordedSchedule(tmp_path / "now.jsonl", Moment(0, 0, 0)))
    assert replayed.cuts_now(Moment(0, 0, 5))
    replayed.cut(Moment(0, 0, 5), "cut")
    assert replayed.cut_due(Moment(0, 1, 0))
