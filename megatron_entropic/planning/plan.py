"""The whole plan of one configuration as data; `report` turns it into tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_entropic.config.algorithm import FROZEN_KEYS
from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import Config
from megatron_entropic.planning.communication import Traffic, gradient_traffic, microbatch_traffic
from megatron_entropic.planning.generation import engine_load, generation_time
from megatron_entropic.planning.hardware import Hardware, Machine
from megatron_entropic.planning.memory import (
    GIB,
    MEMORY_KINDS,
    RolloutMemory,
    StageMemory,
    optimizer_bytes_per_element,
    rollout_memory,
    sequences_that_fit,
    stage_memory,
)
from megatron_entropic.planning.parameters import ParameterTable, PlannedModel, StageParameters
from megatron_entropic.planning.roofline import StepTime, score_time_s, switch_time_s, update_time_s
from megatron_entropic.planning.schedule import Lengths, make_schedule
from megatron_entropic.planning.step import PlannedStep


@dataclass(frozen=True)
class Numbers:
    """Everything that a layout which divides the model implies."""

    step: PlannedStep
    stages: tuple[StageParameters, ...]
    memory: tuple[StageMemory, ...]
    checkpoint_host_bytes: int
    """Host memory of the fullest policy node while a checkpoint is being written, in bytes."""
    rollout: RolloutMemory
    traffic: tuple[Traffic, ...]
    """Traffic of one optimizer step: all micro-batches, then the gradients."""
    publication: Publication
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """Everything that one configuration needs of `gpus` GPUs."""

    config: Config
    table: ParameterTable
    gpus: int
    gpu_memory_gb: float
    hardware: Hardware
    problems: tuple[str, ...]
    """Everything that is wrong; empty if the configuration can run."""
    numbers: Numbers | None
    """None if the layout does not divide the model."""
    lengths_given: bool = False
    """Whether the lengths of sequences are somebody's, not assumptions."""


def make_plan(
    config: Config,
    table: ParameterTable,
    machine: Machine,
    *,
    lengths: Lengths | None = None,
    known_problems: Sequence[str] = (),
) -> Plan:
    """Work out the plan of a configuration.

    Args:
        config: the configuration; it need not be able to run.
        table: the parameters of its model; plans of one model share it.
        machine: the GPUs that there are.
        lengths: lengths of prompts and responses; None: shares of their limits (`assumed_lengths`).
        known_problems: what the checks of the configuration alone have found.
    """
    gpus = gpus_in_use(config) if machine.gpus is None else machine.gpus
    problems = [*known_problems, *layout_problems(config, table.model, gpus), *frozen_problems(config, table)]
    numbers = None
    if divides(config, table):
        step = PlannedStep(config, table, make_schedule(config, lengths), machine.hardware)
        numbers = _numbers(step, int(machine.gpu_memory_gb * GIB))
        problems += memory_problems(config, numbers.memory, numbers.rollout, machine.gpu_memory_gb)
    return Plan(
        config, table, gpus, machine.gpu_memory_gb, machine.hardware, tuple(problems), numbers, lengths is not None
    )


def divides(config: Config, table: ParameterTable) -> bool:
    """Whether every rank gets an equal share of the model, so that it can be counted."""
    tables = (table, *table.frozen(config.algorithm).values())
    return not any(one.model.dimensions.layout_problems(config.policy) for one in tables)


def publication_time_s(step: PlannedStep, published: Publication) -> float:
    """Seconds of a publication, over the network if the GPUs are more than a node's."""
    across_nodes = gpus_in_use(step.config) > step.hardware.gpus_per_node
    return published.time_s(step.hardware, across_nodes=across_nodes, colocated=step.config.cluster.colocate)


def _numbers(step: PlannedStep, gpu_memory_bytes: int) -> Numbers:
    rollout = rollout_memory(step, gpu_memory_bytes)
    generation = generation_time(step, rollout)
    published = publication(step)
    microbatch = [one.times(step.schedule.microbatches) for one in microbatch_traffic(step, "update")]
    time = StepTime(
        rollout_s=generation.total_s,
        score_s=score_time_s(step),
        update_s=update_time_s(step),
        publish_s=publication_time_s(step, published),
        switch_s=switch_time_s(step),
        tail_s=generation.tail_s,
    )
    if lag := step.config.rollout.lag:
        time = replace(time, ahead=time.with_lag(step.config, engine_load(step, rollout), lag))
    return Numbers(
        step=step,
        stages=step.table.stages(step.policy),
        memory=tuple(stage_memory(step, stage) for stage in range(step.policy.pipeline_parallel)),
        checkpoint_host_bytes=checkpoint_host_bytes(step),
        rollout=rollout,
        traffic=(*microbatch, *gradient_traffic(step)),
        publication=published,
        time=time,
    )


# What cannot work: layouts that do not divide the model, GPUs that are missing, memory that does not suffice.


def gpus_of(config: Config) -> tuple[int, int]:
    """Numbers of policy and of rollout GPUs; with `cluster.colocate` these are some of the former (`gpus_in_use`)."""
    return config.policy.world_size, config.rollout.engines * config.rollout.tensor_parallel


def gpus_in_use(config: Config) -> int:
    """Number of GPUs that the run takes; an engine that shares the GPU of a policy rank takes none of its own."""
    policy_gpus, rollout_gpus = gpus_of(config)
    return max(policy_gpus, rollout_gpus) if config.cluster.colocate else policy_gpus + rollout_gpus


def layout_problems(config: Config, model: PlannedModel, gpus: int) -> Iterator[str]:
    """Yields why the model cannot be laid out on `gpus` GPUs; nothing can be computed for a layout that does not
    divide.
    """
    policy, rollout, dimensions = config.policy, config.rollout, model.dimensions
    for problem in dimensions.layout_problems(policy):
        yield f"policy.{problem}"
    if dimensions.num_attention_heads % rollout.tensor_parallel:
        yield (
            f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the attention heads "
            f"({dimensions.num_attention_heads})"
        )
    if config.max_sequence_tokens > dimensions.max_position_embeddings:
        yield (
            f"data.max_prompt_tokens + rollout.max_response_tokens = {config.max_sequence_tokens} tokens, but the "
            f"model's positions end at {dimensions.max_position_embeddings}"
        )
    policy_gpus, rollout_gpus = gpus_of(config)
    used = gpus_in_use(config)
    if used != gpus:
        together = "on the same GPUs (cluster.colocate) are" if config.cluster.colocate else "are"
        yield (
            f"{policy_gpus} policy GPUs (tensor {policy.tensor_parallel} x pipeline {policy.pipeline_parallel} x "
            f"context {policy.context_parallel} x data {policy.data_parallel}) and {rollout_gpus} rollout GPUs "
            f"({rollout.engines} engines x {rollout.tensor_parallel}) {together} {used}, not {gpus}"
        )


def frozen_problems(config: Config, table: ParameterTable) -> Iterator[str]:
    """Yields why frozen models cannot be held on the policy's ranks."""
    for name, frozen in table.frozen(config.algorithm).items():
        for problem in frozen.model.dimensions.layout_problems(config.policy) if frozen is not table else ():
            yield f"{FROZEN_KEYS[name]}, {frozen.model.name}, has the policy's layout, and policy.{problem}"


def memory_problems(
    config: Config, stages: Sequence[StageMemory], rollout: RolloutMemory, gpu_memory_gb: float
) -> Iterator[str]:
    """Sentences that say which GPUs would run out of memory, with the kinds that fill them."""
    for stage in stages:
        if stage.total > gpu_memory_gb * GIB:
            yield (
                f"stage {stage.stage} needs {stage.total / GIB:.1f} GB of {gpu_memory_gb:g} GB on each GPU: "
                f"{memory_kinds(stage)}"
            )
    if sequences_that_fit(rollout, config.max_sequence_tokens) < 1:
        yield (
            f"an engine's KV cache holds {rollout.tokens:,} tokens, fewer than one sequence of "
            f"{config.max_sequence_tokens:,}: of {gpu_memory_gb:g} GB x rollout.gpu_memory_fraction="
            f"{config.rollout.gpu_memory_fraction:g} weights take {rollout.weights / GIB:.1f} GB and vLLM's workspace "
            f"{rollout.workspace / GIB:.1f} GB"
        )


def memory_kinds(stage: StageMemory) -> str:
    """Names and GiB of the kinds of a stage's memory that are not 0, largest first."""
    sizes = sorted(((getattr(stage, kind), kind) for kind in MEMORY_KINDS), reverse=True)
    return ", ".join(f"{kind} {size / GIB:.1f}" for size, kind in sizes if size)


# Host memory that a checkpoint takes of a node, until its files are written.

WHOLE_BYTES_PER_PARAMETER = 27
"""Host bytes that `fully_reshardable` takes for each parameter of a rank's stage, whatever the number of replicas.
Measured with benchmarks/checkpoint_memory.py: 3,143 MB on each of four ranks that replicate 116.5 million parameters.
"""


def checkpoint_host_bytes(step: PlannedStep) -> int:
    """Host bytes of a checkpoint on the fullest node, nodes being filled with policy ranks one after the other.

    A rank copies its part of the optimizer state, the first replica also the weights. With rollouts that run ahead each
    rank has two more copies of its weights beside it (`policy/state/kept_weights.py`).
    """
    policy, config, ranks_per_node = step.policy, step.config, step.hardware.gpus_per_node
    keeps = config.rollout.lag > 0 and config.rollout.split_staleness and not config.cluster.colocate
    copies_bytes = 2 * step.item_bytes if keeps else 0
    of_stage = [_stage_bytes(step, stage) for stage in range(policy.pipeline_parallel)]
    of_rank = [
        _rank_bytes(policy, of_stage[stage], place) + copies_bytes * step.trained(stage).elements
        for stage in range(policy.pipeline_parallel)
        for place in range(policy.stage_ranks)
    ]
    first_ranks = range(0, len(of_rank), ranks_per_node)
    return max(sum(of_rank[first : first + ranks_per_node]) for first in first_ranks)


@dataclass(frozen=True)
class _StageBytes:
    """Bytes that ranks of a stage copy."""

    dense: int
    """Bytes of the weights that are not experts'."""
    experts: int
    """Bytes of a rank's experts."""
    optimizer: int
    """Bytes of a rank's part of the optimizer state."""
    optimizer_of_written: int | None
    """Bytes of optimizer state for each byte of written weights, where every replica has all of it; else None."""


def _stage_bytes(step: PlannedStep, stage: int) -> _StageBytes:
    policy, item, parameters = step.policy, step.item_bytes, step.trained(stage)
    if policy.distributed_optimizer and step.config.checkpoint.format == "fully_reshardable":
        return _StageBytes(0, 0, WHOLE_BYTES_PER_PARAMETER * parameters.elements, None)
    dense, experts = parameters.elements - parameters.expert_elements, parameters.expert_elements
    # What a checkpoint holds is in float32, whatever the moments are kept in.
    state = optimizer_bytes_per_element(step.dtype)
    if not policy.distributed_optimizer:
        return _StageBytes(dense * item, experts * item, 0, state // item)
    kept = sum(buffer.owned_elements(0) for buffer in step.buffers(stage))
    return _StageBytes(dense * item, experts * item, kept * state, None)


def _rank_bytes(policy: PolicyConfig, of_stage: _StageBytes, place: int) -> int:
    """Bytes that the rank at a place of its stage copies; tensor ranks lie next to each other, replicas do not."""
    written = of_stage.dense if place < policy.tensor_parallel else 0
    if place < policy.expert_parallel * policy.expert_tensor_size:
        written += of_stage.experts
    return written + of_stage.optimizer + written * (of_stage.optimizer_of_written or 0)


# What one publication of weights to the engines moves: `weight_sync.plan` in numbers.

BUCKET_BYTES = 512 * 2**20
"""Size of the policy's buckets on GPUs (`policy.publish`); a test compares."""


@dataclass(frozen=True)
class Publication:
    """Bytes and messages of one publication of weights to the engines."""

    engine_bytes: int
    """Bytes received by each engine."""
    tensors: int
    """Number of tensors that each engine loads."""
    buckets: int
    collectives: int
    """Number of gathers, sends and broadcasts."""
    gathered_bytes: int
    """Bytes sent by each GPU to those that hold the rest of a bucket, summed over buckets, busiest stage."""
    forwarded_bytes: int
    """Bytes sent to the first stage by all others."""

    def time_s(self, hardware: Hardware, *, across_nodes: bool, colocated: bool = False) -> float:
        """Seconds of gathering a bucket while another is broadcast, and of what engines do with the weights.

        The broadcast goes at the rate of rank 0's port, at the efficiency of published transports end to end.
        Colocated, it is a collective of the policy's ranks like any other, and an engine finds the bucket on its GPU.
        """
        inside, outside = hardware.link_bytes_per_s(False), hardware.link_bytes_per_s(across_nodes)
        moved_s = self.gathered_bytes / inside + self.forwarded_bytes / outside
        rate = outside if colocated else hardware.publish_efficiency * hardware.network_bytes_per_s
        sent_s = self.engine_bytes / rate
        loaded_s = self.tensors * hardware.publish_tensor_s + self.buckets * hardware.publish_bucket_s
        return hardware.publish_s + max(moved_s, sent_s) + loaded_s


def publication(step: PlannedStep) -> Publication:
    """The publication of a step's weights; the layout must divide the model."""
    policy, plan = step.policy, step.table.publish_plan(step.policy, step.dtype, BUCKET_BYTES)
    per_stage = [
        sum(b.shard_bytes * (plan.gather_ranks(b) - 1) for b in plan.buckets if b.owner_stage == stage)
        for stage in range(policy.pipeline_parallel)
    ]
    return Publication(
        engine_bytes=plan.bytes,
        tensors=sum(len(item.entry.hf_names) for bucket in plan.buckets for item in bucket.items),
        buckets=len(plan.buckets),
        collectives=sum(len(plan.collectives(bucket)) for bucket in plan.buckets),
        gathered_bytes=max(per_stage),
        forwarded_bytes=sum(bucket.bytes for bucket in plan.buckets if bucket.owner_stage > 0),
    )
