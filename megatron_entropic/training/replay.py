"""One recorded step computed again: score and update in this process alone, without Ray, engines or other ranks.

    RUN/rollouts/step_N.parquet  --samples-->  training batch  --> score --> update
    RUN/checkpoints/step_(N-1)   --weights, optimizer, controller-->  ^

What comes out is compared with what the run had. A run of one rank with the same dtype gives the same numbers; sums of
several ranks are added in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from pydantic import ValidationError

from megatron_entropic.algorithms import find_policy_loss
from megatron_entropic.checkpoints.run_checkpoints import checkpoint_path, complete_checkpoints, verify_checkpoint
from megatron_entropic.config.algorithm import FrozenName
from megatron_entropic.config.run import Config
from megatron_entropic.errors import UserError
from megatron_entropic.files.paths import directory_problem
from megatron_entropic.observability.progress import quiet
from megatron_entropic.observability.records import RecordedStep, read_rollouts, recorded_steps, rollouts_path
from megatron_entropic.observability.settings_history import RunPart, read_parts
from megatron_entropic.policy.megatron.platform import Rendezvous
from megatron_entropic.policy.policy import Policy
from megatron_entropic.training.step import score_batch, training_batch, update_policy
from megatron_entropic.types import Scores, Sequence

ONE_RANK = {
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "virtual_pipeline_parallel": 1,
    "first_stage_layers": None,
    "last_stage_layers": None,
    "data_parallel": 1,
    "context_parallel": 1,
    "expert_parallel": 1,
    "expert_tensor_parallel": None,
    "sequence_parallel": False,
}


@dataclass(frozen=True)
class Replay:
    """A step as it was recorded and as it is computed now."""

    step: int
    state: str
    """Place that weights, optimizer and controller came from."""
    metrics: dict[str, tuple[float, float]]
    """Metrics by name: (recorded, computed now)."""
    largest_difference: dict[str, float]
    """Largest absolute difference of old_logprobs, entropies and advantages, over all tokens."""


def replay(run_dir: Path, step: int, checkpoint: Path | None = None, *, begin: Callable[[str], None] = quiet) -> Replay:
    """Compute a recorded step again.

    Args:
        step: number of the step, whose rollouts were kept.
        checkpoint: checkpoint to start from instead of that of the step before.
        begin: called with words for each part that begins.

    Raises:
        UserError: the step was not recorded, or there is no state to start from; says which there are.
        CheckpointError: the checkpoint is damaged.
    """
    begin("reading the recorded step")
    recorded = _read(run_dir, step)
    part = _part_of(run_dir, step)
    config = _config_of_one_rank(run_dir, part)
    directory = checkpoint or _state_before(run_dir, step, warm_start=config.warm_start.steps > 0)
    if directory is not None:
        begin("comparing the checkpoint with its checksums")
        verify_checkpoint(directory)
    begin("building the policy")
    policy = Policy(config, Rendezvous.alone(), device=config.cluster.device)
    try:
        if directory is not None:
            begin("loading the checkpoint")
            policy.load_checkpoint(directory)
        begin(f"score and update of {len(recorded.responses):,} responses")
        return _compare(recorded, config, _OneRank(policy), state=str(directory or config.model.hf_dir))
    finally:
        policy.close()


class _OneRank:
    """Policy of one rank in this process, which has all scores itself."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def score(self, sequences: list[Sequence], *, frozen: FrozenName | None = None) -> Scores:
        scores = self._policy.score(sequences, frozen=frozen)
        assert scores is not None, "the only rank reports"
        return scores

    def update(self, minibatch: list[Sequence]) -> dict[str, float]:
        return self._policy.update(minibatch)


def _compare(recorded: RecordedStep, config: Config, policy: _OneRank, *, state: str) -> Replay:
    batch = training_batch(recorded.groups(), config.algorithm.advantage)
    batch, scores, measured = score_batch(policy, batch, config, version=recorded.step - 1)
    updated = update_policy(policy, batch, config.algorithm, seed=config.run.seed, step=recorded.step)
    computed = {**measured, **updated}
    advantages = [sequence.advantages for sequence in batch.sequences if sequence.advantages is not None]
    return Replay(
        step=recorded.step,
        state=state,
        metrics={name: (recorded.metrics[name], computed[name]) for name in recorded.metrics if name in computed},
        largest_difference={
            "old_logprobs": _largest([response.old_logprobs for response in recorded.trained], scores.logprobs),
            "entropies": _largest([response.entropies for response in recorded.trained], scores.entropies),
            "advantages": _largest([response.advantages for response in recorded.trained], advantages),
        },
    )


def _largest(recorded: list[np.ndarray], computed: list[torch.Tensor]) -> float:
    pairs = zip(recorded, computed, strict=True)
    return max(float(np.abs(before - now.cpu().numpy()).max(initial=0.0)) for before, now in pairs)


def _read(run_dir: Path, step: int) -> RecordedStep:
    path = rollouts_path(run_dir, step)
    if problem := directory_problem(run_dir):
        raise UserError(f"{run_dir}: {problem}")
    if not path.exists():
        kept = ", ".join(map(str, recorded_steps(run_dir))) or "none"
        raise UserError(
            f"{run_dir}: the rollouts of step {step} were not kept (kept: {kept}); see train.record_steps and "
            "logging.rollouts_every_steps and rollouts_keep_last"
        )
    return read_rollouts(path)


def _part_of(run_dir: Path, step: int) -> RunPart:
    """Settings that the step was computed under."""
    parts = [part for part in read_parts(run_dir) if part.first_step <= step]
    if parts:
        return parts[-1]
    path = run_dir / "config.yaml"
    try:
        return RunPart(1, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{run_dir}: not a run directory: {error}") from error


def _config_of_one_rank(run_dir: Path, part: RunPart) -> Config:
    try:
        config = Config.model_validate(part.config)
    except ValidationError as error:
        raise UserError(f"{run_dir}: its configuration is not one of this version: {error}") from error
    try:
        find_policy_loss(config.algorithm.policy_loss)
    except UserError as error:
        hint = f"; the run was started in {part.directory}: start replay there" if part.directory else ""
        raise UserError(f"{error}{hint}") from error
    return config.model_copy(update={"policy": config.policy.model_copy(update=ONE_RANK)})


def _state_before(run_dir: Path, step: int, *, warm_start: bool) -> Path | None:
    """Checkpoint to start from; None where the run started with the weights of model.hf_dir."""
    root = run_dir / "checkpoints"
    wanted = checkpoint_path(root, step - 1)
    complete = complete_checkpoints(root)
    if wanted in complete:
        return wanted
    if step == 1 and not warm_start:
        return None
    names = ", ".join(path.name for path in complete) or "none"
    raise UserError(
        f"{run_dir}: no checkpoint of step {step - 1} (there are: {names}); train.record_steps keeps it, --checkpoint "
        "takes another one, from which the numbers will differ"
    )
