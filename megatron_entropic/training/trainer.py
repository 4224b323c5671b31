"""The loop.

             prompts                samples               rewards, advantages
    data/ ------------> rollout/ ------------> rewards/ ---------------------+
                           ^      vLLM engines                               |
                           | weights version k                               v
                      weight_sync/                                policy/score   old log-probs, entropy H
                           ^                                                 |
                           |                                                 v
                           +------ policy/update <--- alpha = clip(K_p e + K_i sum e), e = H - target
                                   1F1B, EntroPIC loss, optimizer step

Step k samples from weights version k - 1 and ends by publishing version k. Everything random in it is a function of
(seed, step, place in the step, sample), so a run that was stopped anywhere continues as if it had not been.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megatron_entropic.cluster.launch import launch
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.weight_sync import WeightPublisher
from megatron_entropic.config.run import Config
from megatron_entropic.training.lifecycle import SkipLimit, StopRequest, with_restarts
from megatron_entropic.training.preconditions import open_inputs
from megatron_entropic.training.rollouts import JudgedRollouts
from megatron_entropic.training.run_directory import RunDirectory
from megatron_entropic.training.sft import warm_start
from megatron_entropic.training.step import rollout_metrics, score_batch, training_batch, update_policy


def train(config: Config) -> Path:
    """Run `config` to its last step, continuing from the newest checkpoint of its directory; returns the directory.

    Raises:
        RunError: the run cannot go on. What it had completed is in its checkpoints.
        StopAsked: a signal asked it to end.
    """
    with StopRequest() as stop, RunDirectory(config) as run, ExitStack() as opened:
        if run.finished:
            return run.path
        run.progress.starting("reading model, data and verifier")
        inputs = opened.enter_context(open_inputs(config))
        scorer, evaluator, prompts = inputs.scorer, inputs.evaluator, inputs.prompts
        run.report_data(prompts.report.lines())

        def starting(name: str) -> None:
            stop.raise_if_asked()  # nothing is computed yet that would have to be saved
            run.progress.starting(name)

        def attempt() -> None:
            with launch(config, starting) as (policy, engines):
                stop.listen()  # Ray's own handlers would end the process
                starting("looking for a checkpoint to continue from")
                step = run.resume(policy)
                if step is None:
                    step = warm_start(policy, run, inputs.lessons)
                run.progress.starting("publishing the weights to the engines")
                weights = WeightPublisher(policy, engines, config.cluster)
                weights.publish(version=step)
                run.checkpoints.export(policy, step, resumed=True)
                run.progress.starting("the first step")
                rollouts = JudgedRollouts(config, prompts, engines, scorer, run, stop)
                skips = SkipLimit(config.train.max_skipped_steps)
                while step < config.train.steps:
                    step += 1
                    metrics = one_step(step, config, rollouts, policy, weights, run)
                    if evaluator.due(step):
                        metrics |= evaluator.after_step(step, engines, scorer, run)
                    run.record(step, metrics)
                    skips.observe(step, metrics)
                    stopping = stop.asked
                    if run.checkpoints.due(step) or stopping:
                        run.checkpoints.save(policy, step)
                    run.checkpoints.check(policy, wait=stopping or step == config.train.steps)
                    if stopping:
                        stop.raise_if_asked()
                    run.checkpoints.export(policy, step)
                run.checkpoints.finish_exports(policy)
                if config.checkpoint.export_hf:
                    policy.export_hf(run.export_dir)

        with_restarts(attempt, run, stop, config.cluster.max_restarts)
    return run.path


def one_step(
    step: int,
    config: Config,
    rollouts: JudgedRollouts,
    policy: PolicyGroup,
    weights: WeightPublisher,
    run: RunDirectory,
) -> dict[str, float]:
    """One rollout and its optimizer steps; returns what metrics.jsonl says of them."""
    with run.checkpoints.preserving(policy, step - 1):
        samples, reward_metrics = rollouts.of_step(step)
    with run.phase("reward"):
        batch = training_batch(samples, config)
    with run.phase("score"):
        scores, measured = score_batch(policy, samples, batch, config)
    with run.phase("update"):
        updated = update_policy(policy, batch, config, step)
    with run.phase("publish"):
        publish_metrics = weights.publish(version=step)
    run.keep_samples(step, samples)
    run.keep_rollouts(step, samples, batch, scores, {**measured, **updated})
    return {
        **rollout_metrics(samples, config),
        **reward_metrics,
        **measured,
        **updated,
        **run.step_time(tokens=sum(sequence.tokens.numel() for sequence in batch)),
        "weights/version": step - 1,
        **publish_metrics,
        **policy.memory_metrics(),
        **run.record_engine_restarts(rollouts.engines.new_losses()),
    }
