"""The whole plan of one configuration as data; `report` turns it into tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_entropic.config.run import Config
from megatron_entropic.planning.communication import Traffic, gradient_traffic, microbatch_traffic
from megatron_entropic.planning.feasibility import gpus_in_use, layout_problems, memory_problems
from megatron_entropic.planning.hardware import Hardware, hardware_of
from megatron_entropic.planning.host_memory import checkpoint_host_bytes
from megatron_entropic.planning.memory import GIB, RolloutMemory, StageMemory, rollout_memory, stage_memory
from megatron_entropic.planning.parameters import ParameterTable, StageParameters
from megatron_entropic.planning.publishing import Publication, publication
from megatron_entropic.planning.roofline import StepTime, rollout_time_s, score_time_s, update_time_s
from megatron_entropic.planning.schedule import Schedule, make_schedule


@dataclass(frozen=True)
class Numbers:
    """Everything that a layout which divides the model implies."""

    schedule: Schedule
    stages: tuple[StageParameters, ...]
    memory: tuple[StageMemory, ...]
    checkpoint_host_bytes: int
    """Host memory of the fullest policy node while a checkpoint is being written."""
    rollout: RolloutMemory
    traffic: tuple[Traffic, ...]
    """Of one optimizer step: all micro-batches, then the gradients."""
    publication: Publication
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """What one configuration needs of `gpus` GPUs."""

    config: Config
    table: ParameterTable
    gpus: int
    gpu_memory_gb: float
    hardware: Hardware
    problems: tuple[str, ...]
    """Everything that is wrong; empty if the configuration can run."""
    numbers: Numbers | None
    """None if the layout does not divide the model."""


def make_plan(
    config: Config,
    table: ParameterTable,
    *,
    gpu_memory_gb: float,
    gpus: int | None = None,
    known_problems: Sequence[str] = (),
) -> Plan:
    """Work a configuration out.

    Args:
        config: need not be able to run.
        table: of the model; plans of one model share it.
        gpu_memory_gb: of each GPU, in units of 2**30 bytes; above 100 its bandwidth is an H200's too.
        gpus: that there are; None: as many as the configuration asks for.
        known_problems: what the checks of the configuration alone have found.
    """
    hardware = hardware_of(gpu_memory_gb)
    gpus = gpus_in_use(config) if gpus is None else gpus
    problems = [*known_problems, *layout_problems(config, table.model, gpus)]
    numbers = None
    if divides(config, table):
        numbers = _numbers(config, table, hardware, gpu_memory_gb)
        problems += memory_problems(config, numbers.memory, numbers.rollout, gpu_memory_gb)
    return Plan(config, table, gpus, gpu_memory_gb, hardware, tuple(problems), numbers)


def divides(config: Config, table: ParameterTable) -> bool:
    """Whether every rank gets an equal share of the model, so that it can be counted."""
    return not table.model.dimensions.layout_problems(config.policy)


def publication_time_s(config: Config, published: Publication, hardware: Hardware) -> float:
    """Seconds of a publication, over the network if the GPUs are more than a node's."""
    return published.time_s(hardware, across_nodes=gpus_in_use(config) > hardware.gpus_per_node)


def _numbers(config: Config, table: ParameterTable, hardware: Hardware, gpu_memory_gb: float) -> Numbers:
    schedule = make_schedule(config)
    rollout = rollout_memory(config, table, int(gpu_memory_gb * GIB))
    published = publication(config, table)
    microbatch = microbatch_traffic(config, table, hardware, schedule.tokens, "update")
    return Numbers(
        schedule=schedule,
        stages=table.stages(config.policy),
        memory=tuple(stage_memory(config, table, schedule, stage) for stage in range(config.policy.pipeline_parallel)),
        checkpoint_host_bytes=checkpoint_host_bytes(config, table, hardware.gpus_per_node),
        rollout=rollout,
        traffic=(
            *(traffic.times(schedule.microbatches) for traffic in microbatch),
            *gradient_traffic(config, table, hardware),
        ),
        publication=published,
        time=StepTime(
            rollout_s=rollout_time_s(config, table, schedule, rollout, hardware),
            score_s=score_time_s(config, table, schedule, hardware),
            update_s=update_time_s(config, table, schedule, hardware),
            publish_s=publication_time_s(config, published, hardware),
        ),
    )
