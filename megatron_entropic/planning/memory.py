"""Memory of each policy GPU and each rollout GPU, by kind.

Weights, gradients and optimizer state are exact (tests compare them with real allocations); activations, output head
and vLLM's share are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from megatron_entropic.config.run import Dtype
from megatron_entropic.planning.activations import backward_bytes, divergence_bytes, head_bytes, layer_bytes
from megatron_entropic.planning.parameters import ParameterTable
from megatron_entropic.planning.schedule import in_flight
from megatron_entropic.planning.step import PlannedStep

GIB = 1 << 30
"""A GB of GPU memory here and in `rollout.kv_cache_gb`: 2**30 bytes."""

RUNTIME_BYTES = 4 * GIB
"""Estimate for what the allocator does not hand out: CUDA context 0.5 GB, NCCL channels 1 to 2 GB, fragmentation."""

ENGINE_WORKSPACE_BYTES = 3 * GIB
"""Estimate for vLLM's activations of one batch, sampling buffers and CUDA graphs, which come off the KV cache."""


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes of each GPU of one pipeline stage during an optimizer step."""

    stage: int
    weights: int
    frozen: int
    """Bytes of the weights of frozen models: the KL penalty's reference, the teacher."""
    float8: int
    """Bytes of 8-bit copies of the layers' matrices beside the weights (policy.fp8), as they are and transposed."""
    gradients: int
    """Bytes of gradients, in policy.gradient_dtype."""
    optimizer: int
    """Bytes of two moments and, for bfloat16 weights, of main parameters."""
    activations: int
    """Bytes of all micro-batches in flight, with the gradients of the layer in its backward pass."""
    head: int
    """Bytes of the output layer, on the last stage."""
    runtime: int

    @property
    def total(self) -> int:
        """Sum of all kinds, in bytes."""
        return sum(getattr(self, name) for name in MEMORY_KINDS)


MEMORY_KINDS = tuple(field.name for field in fields(StageMemory) if field.name != "stage")


@dataclass(frozen=True)
class RolloutMemory:
    """Bytes on one GPU of a vLLM engine."""

    weights: int
    workspace: int
    kv_cache: int
    """Bytes left for keys and values; negative if nothing is left."""
    kv_bytes_per_token: int
    """Bytes that one token's keys and values of all layers take on one GPU."""

    @property
    def tokens(self) -> int:
        """Number of tokens that an engine's cache holds."""
        return max(0, self.kv_cache // self.kv_bytes_per_token)


def optimizer_bytes_per_element(dtype: Dtype, state_dtype: Dtype = "float32") -> int:
    """Bytes of optimizer state for each parameter that a rank owns: two moments, and a main copy of bfloat16."""
    if state_dtype == "bfloat16":
        return 8
    return 8 if dtype == "float32" else 12


def stage_memory(step: PlannedStep, stage: int) -> StageMemory:
    """Peak memory of one pipeline stage's GPUs."""
    policy, dtype, item, buffers = step.policy, step.dtype, step.item_bytes, step.buffers(stage)
    weights = sum(b.padded_elements if policy.distributed_optimizer else b.elements for b in buffers) * item
    if policy.lora.enabled:
        # The buffers are the adapters'; the model's own weights lie in none.
        weights += step.table.stage(policy, stage).elements * item
    head = 0
    if stage == policy.pipeline_parallel - 1:
        model, tokens = step.table.model, step.schedule.largest_tokens
        head = head_bytes(model, policy, tokens, dtype=dtype, head=step.config.output_head)
        if step.config.algorithm.distillation.as_loss:
            head += divergence_bytes(model, step.frozen["teacher"].model, policy, tokens, dtype=dtype)
    return StageMemory(
        stage=stage,
        weights=weights,
        frozen=item * sum(step.frozen[name].stage(policy, stage).elements for name in step.config.frozen_copies),
        # Read in Transformer Engine: made in the first micro-batch of a step and kept, on Hopper both ways round.
        float8=0 if policy.fp8 == "off" else 2 * step.table.stage(policy, stage).elements_of("layers"),
        gradients=sum(buffer.padded_elements for buffer in buffers) * step.gradient_bytes,
        optimizer=sum(buffer.owned_elements(0) for buffer in buffers)
        * optimizer_bytes_per_element(dtype, step.config.optimizer.state_dtype),
        activations=_activation_bytes(step, stage),
        head=head,
        runtime=RUNTIME_BYTES,
    )


DRIVER_BYTES_PER_TOKEN = 17
"""Host bytes that the driver keeps of each token of a rollout: itself, log-probs of engine and policy, entropy, each of
4 bytes. Measured with benchmarks/driver_scale.py."""
AHEAD_BYTES_PER_TOKEN = 8
"""Of a rollout that was not scored yet: tokens and the engine's log-probs."""
STORE_BYTES_PER_TOKEN = 12
"""Most that Ray's object store on the driver's node holds of a token on its way to the ranks; measured there too."""


def driver_host_bytes(step: PlannedStep) -> tuple[int, int]:
    """Host bytes of (the driver's process, Ray's object store on its node) while a rollout is trained on.

    Of rollouts that run ahead, at most as many as the lag allows are whole beside it.
    """
    schedule = step.schedule
    tokens = schedule.responses * schedule.mean_tokens
    kept = DRIVER_BYTES_PER_TOKEN + step.config.rollout.lag * AHEAD_BYTES_PER_TOKEN
    return round(tokens * kept), round(tokens * STORE_BYTES_PER_TOKEN / schedule.optimizer_steps)


def teacher_host_bytes(step: PlannedStep) -> int:
    """Host bytes of the teacher's hidden states on a rank of the last stage; 0 unless it is part of the loss.

    They are those of an optimizer step's response tokens, a context-parallel rank's own (`policy/step/teacher.py`).
    """
    if not step.config.algorithm.distillation.as_loss:
        return 0
    schedule = step.schedule
    tokens = schedule.responses / schedule.optimizer_steps * schedule.mean_response_tokens
    hidden = step.frozen["teacher"].model.dimensions.hidden_size
    return round(tokens * hidden * step.item_bytes / (step.policy.data_parallel * step.policy.context_parallel))


def _activation_bytes(step: PlannedStep, stage: int) -> int:
    """Bytes that a stage holds when its first backward pass begins: micro-batches of its chunks (`in_flight`)."""
    policy, model, tokens = step.policy, step.table.model, step.schedule.largest_tokens
    chunks = policy.virtual_pipeline_parallel
    layers = model.dimensions.pipeline_stages(policy).of_stage(stage)
    sparse = [model.dimensions.has_experts(layer) for layer in layers]
    kinds = {
        experts: layer_bytes(model, policy, tokens, dtype=step.dtype, attention=step.attention, experts=experts)
        for experts in set(sparse)
    }
    alive = in_flight(policy.pipeline_parallel, stage, step.schedule.microbatches_at_most, chunks)
    # A micro-batch in flight is in one chunk, and chunks of a stage differ little.
    total = alive * sum(kinds[experts].saved for experts in sparse) / chunks
    if stage == policy.pipeline_parallel - 1:
        total += kinds[sparse[-1]].final
    # One layer at a time computes again what was not kept.
    total += max(layer.complete - layer.saved for layer in kinds.values())
    return round(total) + backward_bytes(model, policy, tokens, dtype=step.dtype)


def rollout_memory(step: PlannedStep, gpu_memory_bytes: int) -> RolloutMemory:
    """Memory that vLLM has on each of an engine's GPUs; on a CPU `rollout.kv_cache_gb` is the cache."""
    config, table, item = step.config, step.table, step.item_bytes
    dimensions, ranks = table.model.dimensions, config.rollout.tensor_parallel
    weights = engine_weight_elements(table, ranks) * item
    if config.rollout.quantization == "fp8":
        # Embedding and output layer stay as they are; scales of the others are some parts in ten thousand.
        copies = 1 if dimensions.tie_word_embeddings else 2
        kept = copies * dimensions.vocab_size * dimensions.hidden_size // ranks
        weights -= (item - 1) * max(0, engine_weight_elements(table, ranks) - kept)
    per_token = dimensions.cached_elements(ranks) * item
    if config.cluster.device == "cpu":
        cache = int(config.rollout.kv_cache_gb * GIB)
    else:
        cache = int(gpu_memory_bytes * config.rollout.gpu_memory_fraction) - weights - ENGINE_WORKSPACE_BYTES
    return RolloutMemory(weights, ENGINE_WORKSPACE_BYTES, cache, per_token)


def engine_weight_elements(table: ParameterTable, ranks: int) -> int:
    """Number of parameters on each of an engine's GPUs: matrices are cut, norms are whole."""
    norms = sum(prod(e.shape) for e in table.map.entries if e.layout.partition_dim is None)
    return -(-(table.elements - norms) // ranks) + norms


def sequences_that_fit(memory: RolloutMemory, tokens: float) -> int:
    """Number of sequences of `tokens` tokens that an engine's cache holds at once."""
    return int(memory.tokens // tokens)
