"""Environments in processes of their own: what dies or hangs costs its own conversation and nothing else."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from trajectories import task_of

from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.environments import host
from megatron_entropic.environments.conversation import Answer, Call, Conversation, Environments, Key, Limits
from megatron_entropic.environments.host import EnvironmentHost
from megatron_entropic.environments.record import RecordedEnvironments, recorded_environments
from megatron_entropic.errors import UserError
from megatron_entropic.types import Response, Segment

HOSTILE = "tests.unit.environments.hostile"


@pytest.fixture(scope="module")
def environments(countdown_dir: Path) -> Iterator[EnvironmentHost]:
    """One host for all tests, each of which has conversations of its own."""
    config = EnvironmentConfig(name=f"{HOSTILE}:Hostile", reply_timeout_s=2.0)
    with pytest.MonkeyPatch.context() as patch, EnvironmentHost(config, countdown_dir / "model") as one:
        patch.setattr(host, "_GRACE_S", 1.0)
        yield one


def _call(sample: int, what: str, turns: int) -> Call:
    task = task_of(1, [1, 2], truth=what)
    said = tuple(np.array([3 + number], np.int32) for number in range(turns))
    answers = (task.tokens, *(turn + 1 for turn in said[:-1])) if turns else ()
    return Call(Key(f"1/{what}", sample, turns), task, said, answers, 50, 50)


def _ask(environments: Environments, calls: list[Call]) -> list[Answer]:
    """Answers to calls that are made at the same time."""
    came: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
    for place, call in enumerate(calls):
        environments.ask(call, lambda answer, place=place: came.put((place, answer)))  # type: ignore[misc]
    found = dict(came.get(timeout=120) for _ in calls)
    environments.check()
    return [found[place] for place in range(len(calls))]


def test_a_dying_process_costs_the_conversation_that_kills_it(environments: EnvironmentHost) -> None:
    """The others go on in a new process, which is told what happened so far."""
    assert environments.gives_reward
    began = _ask(environments, [_call(sample, "dies" if sample == 1 else "", 0) for sample in range(3)])
    assert all(answer.tokens is not None for answer in began)
    first = _ask(environments, [_call(0, "", 1), _call(2, "", 1)])
    assert [answer.tokens.tolist() for answer in first if answer.tokens is not None] == [[4], [4]]
    (dead,) = _ask(environments, [_call(1, "dies", 1)])
    assert (dead.ending, dead.message) == ("lost", "its process ended twice (status 3)")
    second = _ask(environments, [_call(0, "", 2), _call(2, "", 2)])
    assert [answer.tokens.tolist() for answer in second if answer.tokens is not None] == [[5], [5]]
    last = _ask(environments, [_call(0, "", 3), _call(2, "", 3)])
    assert [(answer.ending, answer.reward) for answer in last] == [("over", 12.0), ("over", 12.0)]
    metrics = environments.take_metrics()
    assert (metrics["environment/restarts"], metrics["environment/rebuilt_differences"]) == (2.0, 0.0)
    assert environments.take_metrics()["environment/restarts"] == 0.0


def test_a_process_that_says_nothing_any_more_is_ended(environments: EnvironmentHost) -> None:
    _ask(environments, [_call(0, "blocks the loop", 0), _call(1, "", 0)])
    (silent,) = _ask(environments, [_call(0, "blocks the loop", 1)])
    assert (silent.ending, silent.message) == ("timeout", "its process said nothing any more, and was ended")
    (other,) = _ask(environments, [_call(1, "", 1)])
    assert other.tokens is not None
    assert other.tokens.tolist() == [4]


def test_ten_megabytes_have_no_room(environments: EnvironmentHost) -> None:
    one = Conversation(task_of(1, [1, 2], truth="10 MB"), 0, 7, "2/0", Limits(1000, 1, 3000, 99))
    turns = 0
    while not one.over:
        (answer,) = _ask(environments, [one.call])
        one.answered(answer)
        if not one.over:
            turns += 1
            one.add(Response(Segment(np.array([4], np.int32), np.zeros(1, np.float32), 0), "stop"))
    assert (one.ending, turns) == ("length", 1)


def test_what_was_said_is_played_back_to_a_replay(environments: EnvironmentHost, tmp_path: Path) -> None:
    recorded = RecordedEnvironments(environments, tmp_path / "run")
    calls = [_call(7, "", 0), _call(7, "", 1)]
    first = [_ask(recorded, [call])[0] for call in calls]

    class Silent:
        def ask(self, call: Call, answered: object) -> None:
            raise AssertionError("everything is known")

        def check(self) -> None: ...

        def take_metrics(self) -> dict[str, float]:
            return {}

    with recorded_environments(Silent(), tmp_path / "replay", tmp_path / "run") as again:
        assert again is not None
        second = [_ask(again, [call])[0] for call in calls]
    for before, now in zip(first, second, strict=True):
        assert before.tokens is not None
        assert now.tokens is not None
        assert before.tokens.tolist() == now.tokens.tolist()
        assert before.seconds == now.seconds
    # Written down once more beside the replay, which can be replayed itself.
    files = [tmp_path / run / "conversations" / "step_000001.jsonl" for run in ("run", "replay")]
    assert files[0].read_text() == files[1].read_text()


def test_an_environment_that_cannot_be_made_is_refused_at_the_start(countdown_dir: Path) -> None:
    with pytest.raises(UserError, match="lacks reward"):
        EnvironmentHost(EnvironmentConfig(name=f"{HOSTILE}:NoReward"), countdown_dir / "model")
