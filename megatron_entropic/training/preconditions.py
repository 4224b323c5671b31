"""Everything a run reads, opened before anything is started, with one list of all that is wrong.

`train` starts from what this returns and `train --check` stops after it, so the two cannot disagree.

    model       headers of all weight files, shapes against config.json; those of frozen models likewise; tokenizers
    modules     losses, verifiers and controllers given as module:attribute
    data        benchmarks, prompts with ground truths as the verifier sees them, warm start
    output      the checkpoint to continue from; the libraries of TensorBoard and W&B
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_entropic.algorithms import build_controller, find_policy_loss
from megatron_entropic.checkpoints.open_weights import open_weights
from megatron_entropic.checkpoints.peft_adapter import PeftAdapter
from megatron_entropic.checkpoints.run_checkpoints import (
    complete_checkpoints,
    read_state,
    refuse_fewer_steps,
    refuse_unwanted_resume,
)
from megatron_entropic.config.algorithm import FROZEN_KEYS
from megatron_entropic.config.load import ConfigError
from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.config.run import Config, RewardConfig, RunConfig
from megatron_entropic.data import TaskDataset, load_checked_tokenizer
from megatron_entropic.data.tokenizer import check_same_tokens, stop_token_ids
from megatron_entropic.environments.host import EnvironmentHost
from megatron_entropic.errors import Problems, RunError, UserError
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.observability.metrics import check_sinks
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.training.evaluator import Evaluator
from megatron_entropic.training.sft import warm_start_sequences
from megatron_entropic.types import Sequence


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a run is made from, read and checked."""

    scorer: RewardScorer
    evaluator: Evaluator
    tasks: TaskDataset
    lessons: list[list[Sequence]]
    """Sequences of each supervised step."""
    environments: EnvironmentHost | None
    """What answers the policy's turns; None: a response is one turn."""


@contextmanager
def open_inputs(config: Config) -> Iterator[Inputs]:
    """Read everything a start reads; verifier processes end with the block.

    Raises:
        ConfigError: listing everything that cannot be used, of all inputs.
        RunError: the machine refused something, such as a process.
    """
    problems = Problems()
    attempt = problems.attempt
    with ExitStack() as closing:
        attempt(lambda: check_resumable(config.run, config.train.steps, config.policy.lora))
        attempt(lambda: check_adapter(config))
        attempt(lambda: check_sinks(config.logging))
        attempt(lambda: open_weights(config.model.hf_dir, config.model.megatron_dir))
        frozen = {FROZEN_KEYS[name]: path for name, path in config.algorithm.frozen_dirs.items() if path is not None}
        for path in frozen.values():
            attempt(partial(open_weights, path))
        attempt(lambda: find_policy_loss(config.algorithm.policy_loss))
        if config.entropy_control.enabled:
            attempt(lambda: build_controller(config.entropy_control))
        longest = config.rollout.max_response_tokens
        reward = with_answers_kept(config)
        scorer = attempt(lambda: closing.enter_context(RewardScorer(reward, max_response_tokens=longest)))
        if scorer is not None:
            attempt(scorer.check_usable)
        environments = attempt(lambda: open_environments(config, closing))
        attempt(lambda: stop_token_ids(config.model.hf_dir, config.rollout.stop))
        tokenizer = attempt(lambda: load_checked_tokenizer(config.model.hf_dir))
        if tokenizer is None:
            raise ConfigError("what the run reads", problems.messages)
        for key, path in frozen.items():
            attempt(partial(check_same_tokens, tokenizer, path, key))
        evaluator = attempt(lambda: Evaluator(config, tokenizer))
        tasks = attempt(
            lambda: TaskDataset(
                config.data,
                tokenizer,
                seed=config.run.seed,
                check_truths=None if scorer is None or _gives_reward(environments) else scorer.truth_problems,
                benchmarks=None if evaluator is None else evaluator.problems,
            )
        )
        lessons = attempt(lambda: warm_start_sequences(config, tokenizer))
        if problems.messages or scorer is None or evaluator is None or tasks is None or lessons is None:
            raise ConfigError("what the run reads", problems.messages)
        yield Inputs(scorer, evaluator, tasks, lessons, environments)


def _gives_reward(environments: EnvironmentHost | None) -> bool:
    """Whether no verifier is asked."""
    return environments is not None and environments.gives_reward


def _shown_adapters(shape: dict[str, Any] | None) -> str:
    if shape is None:
        return "policy.lora.rank=0"
    return ", ".join(f"policy.lora.{key}={_listed(value)}" for key, value in shape.items())


def _listed(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else f"{value:g}"


def check_adapter(config: Config) -> None:
    """Refuse a directory of an adapter to begin with that is not there or does not fit.

    Raises:
        UserError: everything that is wrong with it.
    """
    lora = config.policy.lora
    if lora.enabled and lora.adapter_dir is not None:
        PeftAdapter(lora.adapter_dir, ParameterMap(read_dimensions(config.model.hf_dir)), lora)


def open_environments(config: Config, closing: ExitStack) -> EnvironmentHost | None:
    """Start the processes of environments, which end with `closing`; None without an environment.

    Raises:
        UserError, RunError: as `EnvironmentHost`.
    """
    if config.environment.section is None:
        return None
    return closing.enter_context(EnvironmentHost(config.environment, config.model.hf_dir))


def with_answers_kept(config: Config) -> RewardConfig:
    """The section `reward`, with a file in the run's folder for a judge's answers unless it names one.

    What a run asked for once it never asks for again, so that continuing it gives what it would have given.
    """
    judge = config.reward.judge
    if judge.cache_file is not None:
        return config.reward
    kept = judge.model_copy(update={"cache_file": (config.run.output_dir / "judge.sqlite").absolute()})
    return config.reward.model_copy(update={"judge": kept})


def check_resumable(run: RunConfig, steps: int, lora: LoraConfig | None = None) -> None:
    """Refuse an output folder whose checkpoints cannot be continued from, judged by the sizes of their files.

    Raises:
        UserError: `run.resume=never` and there is one; there are some and none is whole; more steps are done than
            `steps`; the newest was written with other adapters than `lora`.
    """
    complete = complete_checkpoints(run.output_dir / "checkpoints")
    refuse_unwanted_resume(run.resume, complete[-1] if complete else None)
    found = []
    for directory in reversed(complete):
        try:
            saved = read_state(directory)["state"].get("lora")
            refuse_fewer_steps(steps, directory)
            if lora is not None and saved != lora.shape:
                raise UserError(
                    f"{directory}: written with {_shown_adapters(saved)}, and the configuration asks for "
                    f"{_shown_adapters(lora.shape)}: continue with the same, or choose another run.output_dir"
                )
            return
        except RunError as error:
            found.append(str(error))
    if found:
        raise UserError("no checkpoint can be resumed from:\n  " + "\n  ".join(found))
