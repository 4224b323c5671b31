"""What cannot work: layouts that do not divide the model, GPUs that are missing, memory that does not suffice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_entropic.config.run import Config
from megatron_entropic.planning.memory import GIB, MEMORY_KINDS, RolloutMemory, StageMemory, sequences_that_fit
from megatron_entropic.planning.models import PlannedModel


def gpus_of(config: Config) -> tuple[int, int]:
    """(policy GPUs, rollout GPUs); with `cluster.colocate` the second are some of the first, see `gpus_in_use`."""
    return config.policy.world_size, config.rollout.engines * config.rollout.tensor_parallel


def gpus_in_use(config: Config) -> int:
    """GPUs that the run takes; an engine that shares the GPU of a policy rank takes none of its own."""
    policy_gpus, rollout_gpus = gpus_of(config)
    return max(policy_gpus, rollout_gpus) if config.cluster.colocate else policy_gpus + rollout_gpus


def layout_problems(config: Config, model: PlannedModel, gpus: int) -> Iterator[str]:
    """Why the model cannot be laid out so on `gpus` GPUs; nothing can be computed for a layout that divides nothing."""
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


def memory_problems(
    config: Config, stages: Sequence[StageMemory], rollout: RolloutMemory, gpu_memory_gb: float
) -> Iterator[str]:
    """Which GPUs would run out of memory, with the kinds that fill them."""
    for stage in stages:
        if stage.total > gpu_memory_gb * GIB:
            yield (
                f"stage {stage.stage} needs {stage.total / GIB:.1f} GB of {gpu_memory_gb:g} GB on each GPU: "
                f"{_kinds(stage)}"
            )
    if sequences_that_fit(rollout, config.max_sequence_tokens) < 1:
        yield (
            f"an engine's KV cache holds {rollout.tokens:,} tokens, fewer than one sequence of "
            f"{config.max_sequence_tokens:,}: of {gpu_memory_gb:g} GB x rollout.gpu_memory_fraction="
            f"{config.rollout.gpu_memory_fraction:g} weights take {rollout.weights / GIB:.1f} GB and vLLM's workspace "
            f"{rollout.workspace / GIB:.1f} GB"
        )


def _kinds(stage: StageMemory) -> str:
    """The kinds that count, largest first."""
    sizes = sorted(((getattr(stage, kind), kind) for kind in MEMORY_KINDS), reverse=True)
    return ", ".join(f"{kind} {size / GIB:.1f}" for size, kind in sizes if size)
