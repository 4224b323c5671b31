"""The seeds of a step's responses: by place in the step, so that a problem that comes twice is sampled anew."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic.cluster import engine_group
from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.config.run import Config
from megatron_entropic.training.rollouts import JudgedRollouts
from megatron_entropic.types import GenerationRequest, Prompt, Sample


def _config(engines: int = 1, **rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_dir": Path("model")},
            "data": {"train_files": [Path("train.parquet")]},
            "rollout": {"engines": engines, "samples_per_prompt": 2, **rollout},
            "evaluation": {"benchmarks": {"held": "held.parquet"}, "samples_per_prompt": 2},
        }
    )


def _prompt(index: int) -> Prompt:
    return Prompt(index=index, tokens=[1, index], text=f"problem {index}", ground_truth="1")


def _sample(request: GenerationRequest) -> Sample:
    # The engine's answer is a function of prompt and seed: what came out tells which seed went in.
    return Sample(request.prompt, request.sample_index, [request.seed], [0.0], "stop", 0)


def _group(config: Config, monkeypatch: pytest.MonkeyPatch) -> EngineGroup:
    """An `EngineGroup` whose actors answer at once, without Ray."""
    group = EngineGroup.__new__(EngineGroup)
    remote = SimpleNamespace(generate=SimpleNamespace(remote=lambda requests, _: list(map(_sample, requests))))
    group.__dict__ |= {"_config": config, "before_rollout": lambda: None, "_actors": [remote] * config.rollout.engines}

    def receive(answers: dict[str, list[Sample]], take: Callable[..., None], **_: object) -> dict[str, Any]:
        for name, samples in answers.items():
            take(name, list(enumerate(samples)))
        return {}

    monkeypatch.setattr(engine_group, "receive_streams", receive)
    return group


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_a_problem_that_comes_twice_within_a_step_is_sampled_anew(
    engines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = _group(_config(engines), monkeypatch)
    prompts = [_prompt(3), _prompt(5), _prompt(3), _prompt(3)]
    samples = group.generate(prompts, step=7)
    assert [sample.prompt.index for sample in samples] == [3, 3, 5, 5, 3, 3, 3, 3]
    assert len({tuple(sample.response_tokens) for sample in samples}) == len(samples)
    # The number of engines and repetition change nothing; the step does.
    alone = _group(_config(1), monkeypatch)
    assert alone.generate(prompts, step=7) == samples == group.generate(prompts, step=7)
    assert alone.generate(prompts, step=8) != samples


def test_places_of_replacements_are_those_after_the_step_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _group(_config(), monkeypatch)
    together = group.generate([_prompt(1), _prompt(2), _prompt(9)], step=4)
    assert group.generate([_prompt(9)], step=4, first_place=2) == together[4:]


def test_seeds_of_an_evaluation_belong_to_its_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _group(_config(), monkeypatch)
    whole = group.answer_benchmark("held", [_prompt(0), _prompt(1)])
    assert group.answer_benchmark("held", [_prompt(1)]) == whole[2:]


class _Prompts:
    """Two prompts for the step and as many replacements as are asked for."""

    tokenizer = None

    def at_step(self, step: int, count: int) -> list[Prompt]:
        return [_prompt(i % 2) for i in range(count)]

    def replacements(self, step: int, earlier: int, count: int, seen: set[int]) -> list[Prompt]:
        return [_prompt(10 * (earlier + 1) + i) for i in range(count)]


class _Scorer:
    """Judges every response wrong, so that every group is replaced in every round."""

    @contextmanager
    def scoring(self, count: int) -> Any:
        yield SimpleNamespace(add=lambda position, sample: None, finish=lambda: {"reward/verifier_errors": 0.0})


def test_no_seed_comes_twice_over_all_rounds_of_dynamic_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(max_resamples=3, prompts_per_step=4)
    group = _group(config, monkeypatch)
    asked: list[int] = []
    generate = group.generate

    def recording(*arguments: Any, **options: Any) -> list[Sample]:
        samples = generate(*arguments, **options | {"arrived": lambda _: None})
        for sample in samples:
            asked.extend(sample.response_tokens)
            sample.verifier_status = "ok"
        return samples

    monkeypatch.setattr(group, "generate", recording)

    @contextmanager
    def phase(name: str) -> Any:
        yield

    run: Any = SimpleNamespace(phase=phase)
    stop: Any = SimpleNamespace(raise_if_asked=lambda: None)
    prompts: Any = _Prompts()
    scorer: Any = _Scorer()
    samples, metrics = JudgedRollouts(config, prompts, group, scorer, run, stop).of_step(2)
    assert metrics["resampling/rounds"] == 3
    assert len(samples) == 8
    assert len(asked) == 4 * 8 == len(set(asked))
