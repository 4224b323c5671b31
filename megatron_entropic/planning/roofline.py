"""Expected time of one training step.

    step = rollout + score + update + publish + switch         one after the other, as the loop runs them
    step = as `ahead` simulates it                             with rollout.lag

Policy phases: a pipeline of p stages needs m + p - 1 turns of its slowest stage for m micro-batches, m + (p - 1) / v
with v chunks on each stage. A turn is what `compute` and `communication` say of it. Where engines share the policy's
GPUs, these switch between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_entropic.config.names import POLICY_LOSSES
from megatron_entropic.config.run import Config
from megatron_entropic.planning.ahead import AheadTime, Learning, ahead_time
from megatron_entropic.planning.communication import gradient_traffic, microbatch_traffic
from megatron_entropic.planning.compute import Direction, device_s, divergence_s, host_s
from megatron_entropic.planning.decoding import EngineLoad
from megatron_entropic.planning.memory import stage_memory
from megatron_entropic.planning.step import PlannedStep


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step."""

    rollout_s: float
    score_s: float
    update_s: float
    publish_s: float
    switch_s: float = 0.0
    """Seconds in which GPUs that policy and engines share go from one to the other."""
    tail_s: float = 0.0
    """Seconds of `rollout_s` in which only the longest responses still run."""
    ahead: AheadTime | None = None
    """The step with engines that work on later steps while the policy learns (rollout.lag); None: without a lag."""

    @property
    def total_s(self) -> float:
        """Seconds from one step to the next: the phases' sum, or with engines that run ahead what is simulated."""
        if self.ahead is not None:
            return self.ahead.step_s
        return self.rollout_s + self.score_s + self.update_s + self.publish_s + self.switch_s

    def with_lag(self, config: Config, load: EngineLoad, lag: int) -> AheadTime:
        """The step of `config` with another lag, of engines with this load."""
        learning = Learning(
            learn_s=self.score_s + self.update_s,
            publish_s=self.publish_s,
            rescore_s=self.score_s if lag and config.rollout.split_staleness else 0.0,
            switch_s=self.switch_s,
            colocated=config.cluster.colocate,
        )
        return ahead_time(load, learning, lag)


def _adam_bytes(step: PlannedStep) -> int:
    """Bytes that AdamW moves for an element: gradient read, moments and parameter read and written, a copy.

    With 16-bit moments the precision-aware optimizer reads the gradient where it is summed.
    """
    if step.config.optimizer.state_dtype == "bfloat16":
        return step.gradient_bytes + 2 * (2 + 2 + 4) + 2
    return 4 + 2 * (4 + 4 + 4) + 4


def score_time_s(step: PlannedStep) -> float:
    """Seconds of scoring all responses for their old log-probs, and of what else needs a pass without gradients.

    The KL penalty scores under the reference too, a teacher that gives advantages under its own weights, decoupled PPO
    before each epoch, a loss that ranks tokens of the whole optimizer step before each of these. With the denominator
    high_prob_tokens, tokens are counted once more before every optimizer step but the first.
    """
    algorithm, control, schedule = step.config.algorithm, step.config.entropy_control, step.schedule
    steps, passes = schedule.optimizer_steps, 1.0
    if algorithm.proximal_logprobs == "each_epoch":
        passes += algorithm.epochs_per_rollout - 1
    if (entry := POLICY_LOSSES.get(algorithm.policy_loss)) and entry.plan:
        passes += algorithm.epochs_per_rollout
    if control.steers_alpha and control.denominator == "high_prob_tokens":
        passes += (algorithm.updates_per_rollout - 1) / steps
    policy = step.policy
    turns = schedule.microbatches * steps + (policy.pipeline_parallel - 1) / policy.virtual_pipeline_parallel
    seconds = passes * _turn_s(step, "forward")
    for name, frozen in step.frozen.items():
        if name == "reference" or algorithm.distillation.as_advantage:
            seconds += _turn_s(step.of(frozen), "forward")
    return turns * seconds


def update_time_s(step: PlannedStep) -> float:
    """Seconds of all optimizer steps of a training step."""
    policy, schedule, hardware = step.policy, step.schedule, step.hardware
    turns = schedule.microbatches + (policy.pipeline_parallel - 1) / policy.virtual_pipeline_parallel
    traffic_s = sum(traffic.time_s(hardware) for traffic in gradient_traffic(step))
    if step.overlaps:
        traffic_s *= hardware.exposed_gradient_share
    ends = {0, policy.pipeline_parallel - 1}
    owned = max(sum(buffer.owned_elements(0) for buffer in step.buffers(stage)) for stage in ends)
    adam_s = owned * _adam_bytes(step) / (hardware.memory_efficiency * hardware.memory_bytes_per_s)
    turn_s = _turn_s(step, "update")
    if step.config.algorithm.distillation.as_loss:
        # The teacher's pass before the step; the blocks of both models' logits, computed twice and differentiated once.
        teacher = step.frozen["teacher"]
        turn_s += _turn_s(step.of(teacher), "forward") + divergence_s(step, teacher)
    one = turns * turn_s + traffic_s + adam_s
    return schedule.optimizer_steps * step.config.algorithm.epochs_per_rollout * one


def switch_time_s(step: PlannedStep) -> float:
    """Seconds that colocation costs a step: engines sleep and wake, what policy.offload names moves out and back."""
    if not step.config.cluster.colocate:
        return 0.0
    memory, hardware = stage_memory(step, 0), step.hardware
    sizes = {"optimizer": memory.optimizer, "gradients": memory.gradients, "parameters": memory.weights + memory.frozen}
    # Gradient buffers are thrown away and made again, not copied.
    moved = sum(sizes[part] for part in step.policy.offloaded_parts if part != "gradients")
    return hardware.switch_s + 2 * moved / hardware.host_link_bytes_per_s


def _turn_s(step: PlannedStep, direction: Direction) -> float:
    """Seconds that the slowest stage needs for one micro-batch, its communication included.

    Python runs ahead of the device, but for messages between stages it waits.
    """
    traffic = microbatch_traffic(step, direction)
    within = sum(entry.time_s(step.hardware) for entry in traffic if entry.kind != "pipeline")
    between = sum(entry.time_s(step.hardware) for entry in traffic if entry.kind == "pipeline")
    busy_s = device_s(step, direction) + within
    return max(busy_s, host_s(step, direction)) + between
