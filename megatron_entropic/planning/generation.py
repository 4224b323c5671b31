"""Seconds in which engines answer all prompts of a training step.

`decoding` simulates the slowest engine; here is what it has to do, and what that costs. Engines share the responses
equally. Lengths are quantiles of a log-normal distribution, in random order; the slowest engine has the longest of all.
Sequences wait until the cache has room for another of mean length.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

from megatron_entropic.planning.decoding import DecodingEngine, EngineLoad, StepRates
from megatron_entropic.planning.memory import RolloutMemory
from megatron_entropic.planning.step import PlannedStep

MOST_SIMULATED = 512
"""Number of sequences of an engine that are simulated; of more, each stands for several of its length."""

_ACROSS_NODES = 3
"""Latency of a small all-reduce that leaves the node, as a multiple of one within: guess."""

TAIL_SHARE = 0.25
"""The tail of a generation begins when no sequence waits and less than this share of the most that ran is left."""


@dataclass(frozen=True)
class GenerationTime:
    """Seconds of one rollout."""

    total_s: float
    tail_s: float
    """Seconds of `total_s` in which the last and longest responses are alone."""


def generation_time(step: PlannedStep, memory: RolloutMemory) -> GenerationTime:
    """Time in which the engines generate all responses of a training step."""
    load = engine_load(step, memory)
    engine, tail_from_s = DecodingEngine(load), None
    most = min(load.at_once, len(load.lengths))
    engine.ask(1)
    while engine.waiting or engine.running:
        engine.admit()
        if tail_from_s is None and not engine.waiting and engine.running <= TAIL_SHARE * most:
            tail_from_s = engine.now_s
        engine.decode()
    return GenerationTime(engine.now_s, engine.now_s - (engine.now_s if tail_from_s is None else tail_from_s))


def engine_load(step: PlannedStep, memory: RolloutMemory) -> EngineLoad:
    """What the slowest engine does in a training step."""
    rollout, schedule = step.config.rollout, step.schedule
    per_engine = max(1, math.ceil(schedule.responses / rollout.engines))
    lengths = _lengths(step, min(per_engine, MOST_SIMULATED))
    weight = per_engine / len(lengths)
    room = memory.tokens / (schedule.mean_prompt_tokens + schedule.mean_response_tokens / 2)
    at_once = max(1, int(min(rollout.max_concurrent_sequences, room) / weight))
    return EngineLoad(
        lengths,
        weight,
        at_once,
        step_rates(step, memory),
        prompt_tokens=schedule.mean_prompt_tokens,
        prefill_token_s=_product_s(step, step.hardware.prefill_efficiency),
    )


def step_rates(step: PlannedStep, memory: RolloutMemory) -> StepRates:
    """Costs of a decoding step of one engine."""
    rollout, hardware, item = step.config.rollout, step.hardware, step.item_bytes
    ranks, dimensions, experts = rollout.tensor_parallel, step.table.model.dimensions, step.table.model.experts
    read_rate = hardware.decode_efficiency * hardware.memory_bytes_per_s
    sparse = dimensions.sparse_layers
    share = 0.0
    expert_bytes = 0.0
    if experts is not None:
        elements = 3 * dimensions.hidden_size * experts.ffn_hidden_size * experts.count * sparse
        expert_item = 1 if rollout.quantization == "fp8" else item
        expert_bytes, share = elements * expert_item / ranks, experts.per_token / experts.count
    fixed_s, sequence_s = hardware.decode_overhead_s + sparse * hardware.expert_decode_s, hardware.decode_sequence_s
    if ranks > 1:
        crosses = ranks > hardware.gpus_per_node
        reduced = 2 * 2 * dimensions.hidden_size * item * (ranks - 1) / ranks
        fixed_s += 2 * dimensions.num_layers * hardware.all_reduce_latency_s * (_ACROSS_NODES if crosses else 1)
        sequence_s += dimensions.num_layers * reduced / hardware.link_bytes_per_s(crosses, hardware.gpus_per_node)
    if rollout.enforce_eager:
        fixed_s += dimensions.num_layers * hardware.eager_layer_s
    # The embedding is looked up, not read, unless it is the output layer too.
    embedding = 0 if dimensions.tie_word_embeddings else dimensions.vocab_size * dimensions.hidden_size
    others = memory.weights - expert_bytes - embedding * item / ranks
    return StepRates(
        weights_s=max(0.0, others) / read_rate,
        experts_s=expert_bytes / read_rate,
        expert_share=share,
        product_s=_product_s(step, hardware.product_efficiency),
        cache_s=memory.kv_bytes_per_token / read_rate,
        fixed_s=fixed_s,
        sequence_s=sequence_s,
    )


def _product_s(step: PlannedStep, efficiency: float) -> float:
    """Seconds of one token's products on an engine's GPUs."""
    rollout = step.config.rollout
    rate = step.hardware.flop_per_s(step.dtype, float8=rollout.quantization == "fp8")
    return 2 * step.table.active_elements / rollout.tensor_parallel / (efficiency * rate)


def _lengths(step: PlannedStep, count: int) -> list[int]:
    """Response lengths of the slowest engine: quantiles of the distribution, the last one that of all responses."""
    schedule = step.schedule
    limit, mean = step.config.rollout.max_response_tokens, schedule.mean_response_tokens
    places = [(index + 0.5) / count for index in range(count - 1)] + [1 - 0.5 / max(1, schedule.responses)]
    if schedule.response_deviation == 0 or mean >= limit:
        return [max(1, round(min(mean, limit)))] * count
    width = math.sqrt(math.log1p((schedule.response_deviation / mean) ** 2))
    normal = NormalDist()
    shape = [math.exp(width * normal.inv_cdf(place)) for place in places]
    low, high = 0.0, 1e3 * limit
    # What the limit cuts off is missing from the mean: the distribution before the cut has a larger one.
    for _ in range(60):
        scale = (low + high) / 2
        found = sum(min(limit, scale * factor) for factor in shape) / count
        low, high = (scale, high) if found < mean else (low, scale)
    lengths = [max(1, round(min(limit, low * factor))) for factor in shape]
    random.Random(0).shuffle(lengths)
    return lengths
