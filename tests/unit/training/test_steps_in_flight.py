"""Rollouts that run ahead, with engines that answer when the test says: which tasks, in which order, how old."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trajectories import reward_of, task_of

from megatron_entropic.cluster.dispatch import Ask
from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.config.run import Config
from megatron_entropic.environments.conversation import Answer, Answered, Call, Environments
from megatron_entropic.rollout.schedule import Moment
from megatron_entropic.training.in_flight import SavedAttempt
from megatron_entropic.training.run_ahead import RunAhead
from megatron_entropic.training.step_ahead import Judges
from megatron_entropic.types import CUT, Response, Scores, Segment, Task, derived_seed

STEPS, PROMPTS, SAMPLES = 6, 2, 2


def _config(lag: int, **rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_dir": Path("model")},
            "data": {"train_files": [Path("train.parquet")]},
            "rollout": {"lag": lag, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, **rollout},
            "train": {"steps": STEPS},
        }
    )


class Desk:
    """Stands where the dispatcher does: keeps what is asked for until the test lets it arrive."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.waiting = 0

    def begin(self, start: Moment) -> None:
        self.moment = start

    def ask(self, asks: Sequence[Ask]) -> None:
        self.asked += sorted(asks, key=lambda ask: ask.order)

    def turn(self, while_waiting: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def standing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self, done: Callable[[], bool], *, phase: str, while_waiting: Callable[[], None]) -> None:
        assert done(), f"{phase} would wait for ever"

    def before_swap(self, phase: str) -> None: ...

    def settle(self, phase: str) -> None: ...

    def pace(self, step_s: float) -> None: ...

    def take_reports(self) -> list[Any]:
        return []

    def answer(self, group: str, version: int, *tokens: int, reason: str = "stop") -> None:
        """Let a part of every attempt of a group arrive."""
        ask = next(one for one in self.asked if one.group == group)
        for sample in ask.requests:
            array = np.array(tokens, np.int32)
            segment = Segment(array, np.full(array.size, -1.0, np.float32), version)
            ask.arrived(sample, Response(segment, reason))


class Tasks:
    """As many tasks as one likes; replacements are the thousands."""

    tokenizer = SimpleNamespace(decode=lambda row, skip_special_tokens: " ".join(map(str, row)))

    def at_step(self, step: int, count: int) -> list[Task]:
        return [task_of(10 * step + place, [step, place]) for place in range(count)]

    def replacements(self, step: int, earlier: int, count: int, seen: set[int]) -> list[Task]:
        return [task_of(1000 * step + 10 * earlier + i, [step, 9]) for i in range(count)]


class Scoring:
    """Judges by the last token: 1 is right in the first attempt of a group, everything else is wrong."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: dict[int, float] = {}

    @property
    def ready(self) -> bool:
        return len(self._found) == self._count

    def add(self, position: int, trajectory: Any) -> None:
        self._found[position] = float(trajectory.text.endswith("1") and trajectory.sample_index == 0)

    def finish(self) -> tuple[list[Any], dict[str, float]]:
        return [reward_of(self._found[i]) for i in range(self._count)], {"reward/verifier_errors": 0.0}


class Scorer:
    """Stands where the reward scorer does."""

    def scoring(self, groups: int, size: int) -> AbstractContextManager[Scoring]:
        return nullcontext(Scoring(groups * size))


class Policy:
    """Scores tokens as minus their number; keeps what it was asked to score."""

    def __init__(self) -> None:
        self.kept = 0
        self.scored: list[tuple[list[int], int]] = []

    def keep_weights(self) -> None:
        self.kept += 1

    def score_kept(self, sequences: list[Any]) -> Scores:
        self.scored += [(one.tokens.tolist(), one.prompt_length) for one in sequences]
        rows = [-one.tokens[one.prompt_length :].float() for one in sequences]
        return Scores(rows, [torch.zeros_like(row) for row in rows])


def _ahead(config: Config, environments: Environments | None = None) -> tuple[RunAhead, Desk, Policy]:
    desk, policy = Desk(), Policy()
    journal: Any = SimpleNamespace(
        phase=lambda name: nullcontext(), timeline=SimpleNamespace(count=lambda *a: None, span=lambda *a, **k: None)
    )
    stop: Any = SimpleNamespace(raise_if_asked=lambda: None)
    tasks: Any = Tasks()
    scorer: Any = Scorer()
    judges = Judges(scorer, environments)
    dispatcher: Any = desk
    dispatcher.cluster = SimpleNamespace(training=lambda: nullcontext(policy))
    return RunAhead(config, tasks, dispatcher, judges, journal, stop), desk, policy


def _names(desk: Desk) -> list[str]:
    return [ask.group for ask in desk.asked]


def test_engines_have_the_steps_that_the_lag_allows_and_no_more() -> None:
    ahead, desk, policy = _ahead(_config(lag=2))
    ahead.begin(0, Moment(0, 0, 0))
    assert _names(desk) == ["1/0", "1/1", "2/0", "2/1", "3/0", "3/1"]
    for step in range(1, STEPS + 1):
        for place in range(PROMPTS):
            desk.answer(f"{step}/{place}", 0, 5, 1)
        groups, _ = ahead.of_step(step)
        assert [group.task.index for group in groups] == [10 * step, 10 * step + 1]
        ahead.before_update(policy)
        with ahead.publishing(step):
            assert f"{step + 3}/0" not in _names(desk)
        assert (f"{step + 3}/0" in _names(desk)) == (step + 3 <= STEPS)
    assert len(_names(desk)) == STEPS * PROMPTS == len(set(_names(desk)))
    assert policy.kept == STEPS


def test_seeds_and_prompts_are_those_of_a_run_that_does_not_run_ahead() -> None:
    ahead, desk, _ = _ahead(_config(lag=1))
    ahead.begin(3, Moment(3, 0, 0))
    request = next(ask for ask in desk.asked if ask.group == "5/1").requests[1]
    assert request.tokens.tolist() == [5, 1]
    assert request.seed == request.own_seed == derived_seed(1, 5, 1, 1)


def test_every_part_is_scored_once_with_the_weights_that_sampled_it() -> None:
    ahead, desk, policy = _ahead(_config(lag=1))
    ahead.begin(0, Moment(0, 0, 0))
    for place in range(PROMPTS):
        desk.answer(f"1/{place}", 0, 1)
        desk.answer(f"2/{place}", 0, 4, 5, reason=CUT)
    ahead.of_step(1)
    with ahead.publishing(1):
        pass
    assert policy.scored == [([2, place, 4, 5], 2) for place in range(PROMPTS) for _ in range(SAMPLES)]
    policy.scored.clear()
    for place in range(PROMPTS):
        desk.answer(f"2/{place}", 1, 6, 1)
    (first, second), _ = ahead.of_step(2)
    for trajectory in (*first.trajectories, *second.trajectories):
        assert [segment.weights_version for segment in trajectory.segments] == [0, 1]
        assert trajectory.continuation.tolist() == [4, 5, 6, 1]
        # The rest is of the weights that learn from it now: they score it anyway.
        assert trajectory.sampling_logprobs is not None
        assert trajectory.sampling_logprobs.tolist() == pytest.approx([-4, -5, np.nan, np.nan], nan_ok=True)
    with ahead.publishing(2):
        pass
    assert policy.scored == []


def test_a_replacement_takes_the_place_of_its_group_and_comes_before_later_steps() -> None:
    ahead, desk, _ = _ahead(_config(lag=1, max_resamples=1))
    ahead.begin(0, Moment(0, 0, 0))
    desk.answer("2/0", 0, 1)
    desk.answer("2/1", 0, 7)
    # Step 2 is not waited for yet; its replacement is asked for at once.
    replacement = desk.asked[-1]
    assert (replacement.group, replacement.order) == ("2/2", (2, 2))
    assert replacement.requests[0].seed == derived_seed(1, 2, 2, 0)
    for place in range(PROMPTS):
        desk.answer(f"1/{place}", 0, 1)
    ahead.of_step(1)
    with ahead.publishing(1):
        pass
    desk.answer("2/2", 1, 1)
    groups, metrics = ahead.of_step(2)
    assert [group.task.index for group in groups] == [20, 2000]
    assert metrics["resampling/replaced_groups"] == 1


def _saved(step: int, place: int, sample: int, *, engine: int, ticket: int, version: int, reason: str = "") -> Any:
    segment = Segment(np.array([8, 1], np.int32), np.zeros(2, np.float32), version)
    return SavedAttempt(step, place, sample, 10 * step + place, (segment,), reason, engine, ticket)


def test_what_was_in_flight_goes_on_where_it_was_in_its_order() -> None:
    ahead, desk, _ = _ahead(_config(lag=1))
    saved = [
        _saved(4, 0, 0, engine=-1, ticket=-1, version=2, reason="stop"),
        _saved(4, 0, 1, engine=1, ticket=9, version=2),
        _saved(5, 1, 0, engine=1, ticket=4, version=3),
        _saved(5, 1, 1, engine=0, ticket=5, version=0),  # older than this lag allows
    ]
    ahead.begin(3, Moment(3, 1, 0), saved)
    desk.asked.sort(key=lambda ask: ask.order)
    told = [
        (ask.group, ask.engine, {k: (r.tokens.tolist(), r.done) for k, r in ask.requests.items()}) for ask in desk.asked
    ]
    assert told == [
        ("5/1", "engine 1", {0: ([5, 1, 8, 1], 2)}),
        ("4/0", "engine 1", {1: ([4, 0, 8, 1], 2)}),
        ("4/1", None, {0: ([4, 1], 0), 1: ([4, 1], 0)}),
        ("5/0", None, {0: ([5, 0], 0), 1: ([5, 0], 0)}),
        ("5/1", None, {1: ([5, 1], 0)}),
    ]
    desk.answer("4/0", 3, 1)
    desk.answer("4/1", 3, 1)
    groups, _ = ahead.of_step(4)
    assert [one.continuation.tolist() for one in groups[0].trajectories] == [[8, 1], [8, 1, 1]]


class Talk:
    """Environments that answer when the test says so."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, int, int], tuple[Call, Answered]] = {}

    def ask(self, call: Call, answered: Answered) -> None:
        self.calls[call.key.group, call.key.sample, call.key.turn] = call, answered

    def say(self, group: str, sample: int, turn: int, *tokens: int, reward: float | None = None) -> None:
        """Answer a call, with tokens or with the end."""
        _, answered = self.calls.pop((group, sample, turn))
        array = np.array(tokens, np.int32)
        answered(Answer(array) if tokens else Answer(None, "over", reward=reward))

    def check(self) -> None: ...

    def take_metrics(self) -> dict[str, float]:
        return {"environment/restarts": 0.0}


def test_conversations_go_on_by_themselves_and_from_where_they_were() -> None:
    talk = Talk()
    config = _config(lag=0, prompts_per_step=1)
    config.environment = EnvironmentConfig(name="guess")
    ahead, desk, policy = _ahead(config, talk)
    ahead.begin(0, Moment(0, 0, 0))
    assert desk.asked == [], "nobody has said yet what the prompts are"
    talk.say("1/0", 1, 0, 5, 6)
    assert [(ask.group, dict(ask.requests)[1].tokens.tolist()) for ask in desk.asked] == [("1/0", [5, 6])]
    desk.answer("1/0", 0, 7)
    talk.say("1/0", 1, 1, 8, 8)
    (second,) = (ask for ask in desk.asked if ask.group == "1/0/turn 2")
    assert second.requests[1].tokens.tolist() == [5, 6, 7, 8, 8]
    desk.answer("1/0/turn 2", 0, 9, reason=CUT)
    # A checkpoint: one attempt in the middle of its second turn, one that has not begun.
    desk.placed = lambda before: {("1/0/turn 2", 1): (0, 3)}  # type: ignore[attr-defined]
    saved = ahead._saved(Moment(0, 1, 0))
    assert [(one.sample, len(one.segments), one.finish_reason, one.engine) for one in saved] == [(1, 3, "", 0)]
    again = Talk()
    continued, desk, policy = _ahead(config, again)
    continued.begin(0, Moment(0, 1, 0), saved)
    assert list(again.calls) == [("1/0", 0, 0)], "that one begins"
    (going,) = desk.asked
    assert (going.group, going.engine) == ("1/0/turn 2", "engine 0")
    assert (going.requests[1].tokens.tolist(), going.requests[1].done) == ([5, 6, 7, 8, 8, 9], 1)
    desk.answer("1/0/turn 2", 0, 1)
    call, _ = again.calls["1/0", 1, 2]
    assert [turn.tolist() for turn in call.turns] == [[7], [9, 1]]
    assert [said.tolist() for said in call.answers] == [[5, 6], [8, 8]]
    again.say("1/0", 1, 2, reward=0.5)
    again.say("1/0", 0, 0, 5)
    desk.answer("1/0", 0, 2)
    again.say("1/0", 0, 1, reward=1.0)
    groups, metrics = continued.of_step(1)
    first, other = groups[0].trajectories
    assert (first.continuation.tolist(), other.continuation.tolist()) == ([2], [7, 8, 8, 9, 1])
    assert other.mask is not None
    assert other.mask.tolist() == [True, False, False, True, True]
    assert (other.ending, metrics["environment/restarts"]) == ("over", 0.0)
    continued.before_update(policy)  # type: ignore[arg-type]
