"""Expected time of one training step: the larger of arithmetic and memory traffic, plus communication that shows.

    step = rollout + score + update + publish      one after the other, as the loop runs them

Policy phases: a pipeline of p stages needs m + p - 1 turns of its slowest stage for m micro-batches, m + (p - 1) / v
with v chunks on each stage. Floating point operations per token: 2 for each parameter of a matrix forward, twice that
backward, once more forward where activations are recomputed; attention adds L q for scores and L v for their result
in each layer for sequences of L tokens under the causal mask (Kaplan et al. 2020, table 1, for the matrices).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_entropic.config.names import POLICY_LOSSES
from megatron_entropic.config.run import Config
from megatron_entropic.planning.communication import Direction, gradient_traffic, microbatch_traffic
from megatron_entropic.planning.hardware import Hardware
from megatron_entropic.planning.memory import RolloutMemory, overlaps, repeats_feed_forward
from megatron_entropic.planning.parameters import ParameterTable
from megatron_entropic.planning.schedule import Schedule

OPTIMIZER_BYTES_PER_ELEMENT = 32
"""Bytes AdamW moves: gradient, parameter, two moments read in float32, the last three and a bfloat16 copy written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step."""

    rollout_s: float
    score_s: float
    update_s: float
    publish_s: float

    @property
    def total_s(self) -> float:
        """Sum of the four phases, which run one after the other."""
        return self.rollout_s + self.score_s + self.update_s + self.publish_s


@dataclass(frozen=True)
class _Work:
    """Floating point operations of a token's forward pass."""

    layers: float
    head: float
    feed_forward: float
    """Operations of the feed-forward parts, which `layers` includes."""


def score_time_s(config: Config, table: ParameterTable, schedule: Schedule, hardware: Hardware) -> float:
    """Seconds of scoring all responses for their old log-probs, and of what else needs a pass without gradients.

    The KL penalty scores under the reference too, decoupled PPO before each epoch, a loss that ranks tokens of the
    whole optimizer step before each of these. With the denominator high_prob_tokens, tokens are counted once more
    before every optimizer step but the first.
    """
    algorithm, steps, passes = config.algorithm, schedule.optimizer_steps, 1.0
    if algorithm.proximal_logprobs == "each_epoch":
        passes += algorithm.epochs_per_rollout - 1
    if (entry := POLICY_LOSSES.get(algorithm.policy_loss)) and entry.plan:
        passes += algorithm.epochs_per_rollout
    if algorithm.kl.coefficient > 0:
        passes += 1
    if config.entropy_control.steers_alpha and config.entropy_control.denominator == "high_prob_tokens":
        passes += (algorithm.updates_per_rollout - 1) / steps
    policy = config.policy
    turns = schedule.microbatches * steps + (policy.pipeline_parallel - 1) / policy.virtual_pipeline_parallel
    return passes * turns * _turn_s(config, table, schedule, hardware, "forward")


def update_time_s(config: Config, table: ParameterTable, schedule: Schedule, hardware: Hardware) -> float:
    """Seconds of all optimizer steps of a training step."""
    policy = config.policy
    turns = schedule.microbatches + (policy.pipeline_parallel - 1) / policy.virtual_pipeline_parallel
    traffic_s = sum(traffic.time_s(hardware) for traffic in gradient_traffic(config, table, hardware))
    if overlaps(config):
        traffic_s *= hardware.exposed_gradient_share
    owned = max(
        sum(b.owned_elements(0) for b in table.buffers(policy, stage, overlap=overlaps(config)))
        for stage in {0, policy.pipeline_parallel - 1}
    )
    adam_s = owned * OPTIMIZER_BYTES_PER_ELEMENT / (hardware.decode_efficiency * hardware.memory_bytes_per_s)
    one = turns * _turn_s(config, table, schedule, hardware, "update") + traffic_s + adam_s
    return schedule.optimizer_steps * config.algorithm.epochs_per_rollout * one


def rollout_time_s(
    config: Config, table: ParameterTable, schedule: Schedule, memory: RolloutMemory, hardware: Hardware
) -> float:
    """Seconds in which the engines generate all responses of a training step.

    Engines share the responses equally and decode as many at once as cache and max_concurrent_sequences allow.

    Each decoding step reads the weights once and the cache of every running sequence. The last and longest responses
    decode alone, from the mean length to the greatest.
    """
    rollout = config.rollout
    per_engine = schedule.responses / rollout.engines
    context = schedule.mean_prompt_tokens + schedule.mean_response_tokens / 2
    running = max(1.0, min(rollout.max_concurrent_sequences, per_engine, memory.tokens / context))
    steps = per_engine * schedule.mean_response_tokens / running
    tail = max(0.0, rollout.max_response_tokens - schedule.mean_response_tokens)
    flop = 2 * table.active_elements / rollout.tensor_parallel
    prefill_rate = hardware.prefill_efficiency * hardware.flop_per_s(config.model.dtype)
    prefill_s = per_engine * schedule.mean_prompt_tokens * flop / prefill_rate

    def step_s(sequences: float) -> float:
        read = memory.weights + sequences * context * memory.kv_bytes_per_token
        reading_s = read / (hardware.decode_efficiency * hardware.memory_bytes_per_s)
        waiting_s = 0.0
        if rollout.tensor_parallel > 1:
            waiting_s = 2 * table.model.dimensions.num_layers * hardware.all_reduce_latency_s
        return max(reading_s, sequences * flop / prefill_rate) + waiting_s + hardware.decode_overhead_s

    return prefill_s + steps * step_s(running) + tail * step_s(1)


def _turn_s(
    config: Config, table: ParameterTable, schedule: Schedule, hardware: Hardware, direction: Direction
) -> float:
    """Seconds that the slowest stage needs for one micro-batch, its communication included."""
    policy = config.policy
    work = _work(table, schedule)
    layers, again, head = 1, 0.0, 1
    if direction == "update":
        layers = 4 if policy.recompute == "full" else 3
        again = work.feed_forward if policy.recompute == "selective" and repeats_feed_forward(config) else 0.0
        head = 4 if config.output_head == "recompute" else 3
    # The last stage has the output layer besides its layers.
    flop = schedule.tokens * ((layers * work.layers + again) / policy.pipeline_parallel + head * work.head)
    rate = hardware.training_efficiency * hardware.flop_per_s(config.model.dtype)
    ranks = policy.tensor_parallel * policy.context_parallel
    traffic = microbatch_traffic(config, table, hardware, schedule.tokens, direction)
    return flop / ranks / rate + sum(entry.time_s(hardware) for entry in traffic)


def _work(table: ParameterTable, schedule: Schedule) -> _Work:
    dimensions = table.model.dimensions
    head = dimensions.vocab_size * dimensions.hidden_size
    width = dimensions.size("query") + dimensions.size("attended")
    attention = schedule.mean_tokens * width * dimensions.num_layers
    return _Work(2 * (table.active_elements - head) + attention, 2 * head, 2 * _feed_forward_elements(table))


def _feed_forward_elements(table: ParameterTable) -> float:
    """Number of elements of the gated feed-forward parts' matrices, three in each part, that a token goes through."""
    model, dimensions = table.model, table.model.dimensions
    sparse = sum(dimensions.has_experts(layer) for layer in range(dimensions.num_layers))
    width = (dimensions.num_layers - sparse) * dimensions.ffn_hidden_size
    if model.experts is not None:
        width += sparse * (model.experts.per_token * model.feed_forward_width + model.experts.shared_ffn_hidden_size)
    return 3 * dimensions.hidden_size * width
