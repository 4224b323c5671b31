"""The training loop.

              tasks                trajectories            rewards, advantages
    data/ ------------> rollout/ ------------> rewards/ ---------------------+
                           ^      vLLM engines                               |
                           | weights version k                               v
                      weight_sync/                                policy/score   old log-probs, entropy H
                           ^                                                 |
                           |                                                 v
                           +------ policy/update <--- alpha = clip(K_p e + K_i sum e), e = H - target
                                   1F1B, EntroPIC loss, optimizer step

Step k samples from weights version k - 1 and ends by publishing version k; with `rollout.lag` L engines work on the
steps k .. k + L meanwhile, and its tokens are from the versions k - 1 - L .. k - 1. Everything random in it is a
function of (seed, step, place in the step, sample), so a run that was stopped anywhere continues as if it had not been.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.cluster.launch import launch
from megatron_entropic.config.run import Config
from megatron_entropic.training.lifecycle import SkipLimit, StopRequest, attempts
from megatron_entropic.training.preconditions import Inputs, open_inputs
from megatron_entropic.training.rollouts import Rollouts
from megatron_entropic.training.run_ahead import open_rollouts
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

        def starting(name: str) -> None:
            stop.raise_if_asked()  # nothing is computed yet that would have to be saved
            run.journal.progress.starting(name)

        starting("reading model, data and verifier")
        inputs = opened.enter_context(open_inputs(config))
        run.journal.report_data(inputs.tasks.report.lines())

        for attempt in attempts(run.journal, stop, config.cluster.max_restarts + config.cluster.spare_nodes):
            with attempt, launch(config, starting) as cluster:
                stop.listen()  # Ray's own handlers would end the process
                if config.cluster.spare_nodes:
                    run.journal.progress.log(cluster.describe_nodes())
                starting("looking for a checkpoint to continue from")
                step = run.resume(cluster)
                if step is None:
                    step = warm_start(cluster, run, inputs.lessons, stop)
                starting("publishing the weights to the engines")
                cluster.publish(version=step)
                run.checkpoints.export(cluster, step, resumed=True)
                starting("the first step")
                loop(step, config, cluster, inputs, run, stop)
    return run.path


def loop(step: int, config: Config, cluster: Cluster, inputs: Inputs, run: RunDirectory, stop: StopRequest) -> None:
    """Run every step after `step`, with its evaluations, checkpoints and exports."""
    skips = SkipLimit(config.train.max_skipped_steps)
    with open_rollouts(step, config, cluster, inputs, run, stop) as (rollouts, sampler):
        while step < config.train.steps:
            step += 1
            metrics = one_step(step, config, rollouts, cluster, run)
            if inputs.evaluator.due(step):
                metrics |= inputs.evaluator.after_step(step, sampler, inputs.scorer, run)
            run.journal.record(step, metrics)
            skips.observe(step, metrics)
            stopping = stop.asked
            if run.checkpoints.due(step) or stopping:
                run.checkpoints.save(cluster, step, rollouts)
            run.checkpoints.check(cluster, wait=stopping or step == config.train.steps)
            if stopping:
                stop.raise_if_asked()
            run.checkpoints.export(cluster, step)
    run.checkpoints.finish_exports(cluster)
    if config.checkpoint.export_hf:
        with cluster.training() as policy:
            policy.export_hf(run.export_dir)


def one_step(step: int, config: Config, rollouts: Rollouts, cluster: Cluster, run: RunDirectory) -> dict[str, float]:
    """Run one rollout and its optimizer steps; returns the step's metrics for metrics.jsonl."""
    journal = run.journal
    with run.checkpoints.preserving(cluster, step - 1, rollouts):
        groups, reward_metrics = rollouts.of_step(step)
    with journal.phase("reward"):
        batch = training_batch(groups, config.algorithm.advantage)
    with journal.phase("score"), cluster.training() as policy:
        batch, scores, measured = score_batch(policy, batch, config, version=step - 1)
    with journal.phase("update"), cluster.training() as policy:
        rollouts.before_update(policy)
        updated = update_policy(policy, batch, config.algorithm, seed=config.run.seed, step=step)
    with journal.phase("publish"), rollouts.publishing(step):
        publish_metrics = cluster.publish(version=step)
    journal.keep(step, batch, scores, {**measured, **updated})
    return {
        **rollout_metrics(groups),
        **reward_metrics,
        **measured,
        **updated,
        **journal.step_time(tokens=sum(sequence.tokens.numel() for sequence in batch.sequences)),
        "weights/version": step - 1,
        **publish_metrics,
        **cluster.policy.memory_metrics(),
        **journal.record_engine_restarts(cluster.engines.new_losses()),
        **cluster.node_metrics(),
    }
