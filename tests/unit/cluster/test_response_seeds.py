"""The seeds of a step's attempts: by place in the step, so that a task that comes twice is sampled anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trajectories import reward_of, task_of

from megatron_entropic.cluster.sampling import DealtOut, Sampler
from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.config.run import Config
from megatron_entropic.environments.conversation import Answer, Answered, Call, Environments
from megatron_entropic.training.rollouts import JudgedRollouts
from megatron_entropic.types import GenerationRequest, Response, Segment, Task, Trajectory, derived_seed


def _config(engines: int = 1, **rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_dir": Path("model")},
            "data": {"train_files": [Path("train.parquet")]},
            "rollout": {"engines": engines, "samples_per_prompt": 2, **rollout},
            "evaluation": {"benchmarks": {"held": "held.parquet"}, "samples_per_prompt": 2},
        }
    )


def _task(index: int) -> Task:
    return task_of(index, [1, index])


def _response(request: GenerationRequest) -> Response:
    # The engine's answer is a function of prompt and seed: what came out tells which seed went in.
    return Response(Segment(np.array([request.seed], np.int32), np.zeros(1, np.float32), 0), "stop")


class Engines:
    """Stand where the engine group does, and answer at once, the last request first."""

    def __init__(self, count: int) -> None:
        self.names = [f"engine {number}" for number in range(count)]
        self.asked: list[dict[str, list[list[int]]]] = []

    def stream(
        self, requests: dict[str, list[GenerationRequest]], sampling: object, take: Callable[..., None], **_: object
    ) -> dict[str, Any]:
        self.asked.append({name: [one.tokens.tolist() for one in asked] for name, asked in requests.items()})
        for name, asked in requests.items():
            take(name, [(number, _response(asked[number])) for number in reversed(range(len(asked)))])
        return {}


class Tokenizer:
    """Writes tokens as numbers."""

    def decode(self, row: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, row))


class Countdown:
    """Environments that answer the task's index, as many turns of a conversation as its sample has, and 1 more."""

    def ask(self, call: Call, answered: Answered) -> None:
        over = len(call.turns) == call.key.sample + 1
        tokens = call.task.tokens if not call.turns else np.array([call.task.index], np.int32)
        answered(Answer(None, "over", reward=float(call.key.sample)) if over else Answer(tokens))

    def check(self) -> None: ...

    def take_metrics(self) -> dict[str, float]:
        return {}


def _sampler(config: Config, engines: Engines | None = None, environments: Environments | None = None) -> Sampler:
    engines = engines or Engines(config.rollout.engines)

    @contextmanager
    def rollout() -> Iterator[Engines]:
        yield engines

    cluster: Any = SimpleNamespace(engines=engines, rollout=rollout, version=0)
    tokenizer: Any = Tokenizer()
    return Sampler(config, DealtOut(cluster), tokenizer, environments)


def _plain(trajectories: list[Trajectory]) -> list[tuple[int, int, str]]:
    return [(one.task.index, one.sample_index, one.text) for one in trajectories]


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_a_task_that_comes_twice_within_a_step_is_sampled_anew(engines: int) -> None:
    sampler = _sampler(_config(engines))
    tasks = [_task(3), _task(5), _task(3), _task(3)]
    found = _plain(sampler.generate(tasks, step=7))
    assert [(index, sample) for index, sample, _ in found] == [(i, k) for i in (3, 5, 3, 3) for k in range(2)]
    assert len({text for *_, text in found}) == len(found)
    # The number of engines and repetition change nothing; the step does.
    alone = _sampler(_config(1))
    assert _plain(alone.generate(tasks, step=7)) == found == _plain(sampler.generate(tasks, step=7))
    assert _plain(alone.generate(tasks, step=8)) != found


def test_places_of_replacements_are_those_after_the_step_s_own() -> None:
    sampler = _sampler(_config())
    together = _plain(sampler.generate([_task(1), _task(2), _task(9)], step=4))
    assert _plain(sampler.generate([_task(9)], step=4, first_place=2)) == together[4:]


def test_seeds_of_an_evaluation_belong_to_its_problems() -> None:
    sampler = _sampler(_config())
    whole = _plain(sampler.answer_benchmark("held", [_task(0), _task(1)]))
    assert _plain(sampler.answer_benchmark("held", [_task(1)])) == whole[2:]


def test_conversations_go_on_turn_by_turn_on_the_engine_that_has_their_prefix() -> None:
    engines, config = Engines(2), _config(2)
    config.environment = EnvironmentConfig(name="guess")
    taken: list[tuple[int, float]] = []

    def take(position: int, trajectory: Trajectory) -> None:
        assert trajectory.verdict is not None
        taken.append((position, trajectory.verdict.reward))

    found = _sampler(config, engines, Countdown()).generate([_task(3), _task(5)], 7, take)
    first, second = engines.asked
    assert first == {"engine 0": [[1, 3]] * 2, "engine 1": [[1, 5]] * 2}
    said = [segment.tokens.tolist() for segment in found[1].segments]
    assert said[1] == [3]
    assert second == {
        "engine 0": [[1, 3, *said[0], 3]],
        "engine 1": [[1, 5, *found[3].segments[0].tokens.tolist(), 5]],
    }, "those that are over are not asked, and engines keep their groups"
    assert [len(one.segments) for one in found] == [1, 3, 1, 3]
    assert sorted(taken) == [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)]
    assert [position for position, _ in taken[:2]] != [0, 1], "as they come"
    again = _sampler(config, Engines(1), Countdown()).generate([_task(3), _task(5)], 7)
    assert [one.continuation.tolist() for one in again] == [one.continuation.tolist() for one in found]


class _Tasks:
    """Two tasks for the step and as many replacements as are asked for."""

    def at_step(self, step: int, count: int) -> list[Task]:
        return [_task(i % 2) for i in range(count)]

    def replacements(self, step: int, earlier: int, count: int, seen: set[int]) -> list[Task]:
        return [_task(10 * (earlier + 1) + i) for i in range(count)]


class _Scorer:
    """Judges every response wrong, so that every group is replaced in every round; keeps what was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextmanager
    def scoring(self, groups: int, group_size: int) -> Iterator[Any]:
        rewards = [reward_of(0.0)] * groups * group_size
        yield SimpleNamespace(
            add=lambda position, trajectory: self.texts.append(trajectory.text),
            finish=lambda: (rewards, {"reward/verifier_errors": 0.0}),
        )


def test_no_seed_comes_twice_over_all_rounds_of_dynamic_sampling() -> None:
    config = _config(max_resamples=3, prompts_per_step=4)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        yield

    journal: Any = SimpleNamespace(phase=phase)
    stop: Any = SimpleNamespace(raise_if_asked=lambda: None)
    tasks: Any = _Tasks()
    scorer: Any = _Scorer()
    groups, metrics = JudgedRollouts(config.rollout, tasks, _sampler(config), scorer, journal, stop).of_step(2)
    assert metrics["resampling/rounds"] == 3
    assert [len(group.trajectories) for group in groups] == [2] * 4
    assert len(scorer.texts) == 4 * 8 == len(set(scorer.texts))


def test_every_response_has_a_seed_of_its_own() -> None:
    seeds = [derived_seed(1, step, prompt, sample) for step in range(20) for prompt in range(20) for sample in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed(1, 2, 3, 4) == derived_seed(1, 2, 3, 4) != derived_seed(2, 2, 3, 4)
