"""Seconds that a policy GPU computes on one micro-batch: products, tensors that pass through memory, Python.

    device = products / their rate + attention / its rate + bytes through memory / its rate + output head
    turn   = max(device, host)

Floating point operations per token: 2 for each parameter of a matrix forward, twice that backward, once more forward
where activations are recomputed; attention adds L q for scores and L v for their result in each layer for sequences of
L tokens under the causal mask (Kaplan et al. 2020, table 1, for the matrices).

Bytes: a tensor that is kept for backward is written and read forward, read again backward, and its gradient is written
and read: 5 passes; a forward pass alone writes and reads it. The same kernels' products with short sums are slow for
this reason: their results take longer to write than to compute. A parameter is read forward and backward, and its
gradient read and written, once a micro-batch: many experts on a rank with few tokens each cost time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.planning.activations import layer_bytes, rank_tokens
from megatron_entropic.planning.parameters import ParameterTable
from megatron_entropic.planning.step import PlannedStep

Direction = Literal["forward", "update"]

_FORWARD_PASSES = 2
_UPDATE_PASSES = 5
_FORWARD_HOST_SHARE = 1 / 3
"""Share of a layer's Python that a forward pass runs: guess, as backward has twice the products."""


@dataclass(frozen=True)
class Work:
    """Floating point operations of a token's forward pass through the whole model."""

    layers: float
    """Operations of the layers' matrices."""
    attention: float
    head: float
    feed_forward: float
    """Operations of the feed-forward parts, which `layers` includes."""
    adapters: float = 0.0
    """Operations of the adapters' matrices."""


def work(table: ParameterTable, mean_tokens: float, lora: LoraConfig | None = None) -> Work:
    """Operations of a token of a sequence of `mean_tokens` tokens, with the adapters of `lora`."""
    dimensions = table.model.dimensions
    head = dimensions.vocab_size * dimensions.hidden_size
    width = dimensions.size("query") + dimensions.size("attended")
    return Work(
        layers=2 * (table.active_elements - head),
        attention=mean_tokens * width * dimensions.num_layers,
        head=2 * head,
        feed_forward=2 * _feed_forward_elements(table),
        adapters=0.0 if lora is None or not lora.enabled else 2 * table.trained(lora).elements,
    )


def device_s(step: PlannedStep, direction: Direction) -> float:
    """Seconds of the slowest stage's GPU on one micro-batch, communication not included."""
    return max(_stage_s(step, direction, stage) for stage in step.end_stages)


def divergence_s(step: PlannedStep, teacher: ParameterTable) -> float:
    """Seconds of the last stage's GPU on the divergence of one micro-batch from the teacher (`fused_reverse_kl`)."""
    policy, dimensions, hardware = step.policy, step.table.model.dimensions, step.hardware
    width = 8 * dimensions.hidden_size + 4 * teacher.model.dimensions.hidden_size
    rate = hardware.product_efficiency * hardware.flop_per_s(step.dtype)
    done = step.schedule.tokens * dimensions.vocab_size * width
    return done / (rate * policy.tensor_parallel * policy.context_parallel)


def host_s(step: PlannedStep, direction: Direction) -> float:
    """Seconds of a rank's Python on one micro-batch, which a GPU cannot be faster than."""
    if step.config.cluster.device == "cpu":
        return 0.0
    dimensions, hardware = step.table.model.dimensions, step.hardware
    sparse = dimensions.sparse_layers
    seconds = sparse * hardware.expert_layer_host_s + (dimensions.num_layers - sparse) * hardware.layer_host_s
    share = _FORWARD_HOST_SHARE
    if direction == "update":
        share = 1 + (_FORWARD_HOST_SHARE if step.policy.recompute == "full" else 0)
    most = max(dimensions.pipeline_stages(step.policy).layers)
    return share * seconds * most / dimensions.num_layers


def _stage_s(step: PlannedStep, direction: Direction, stage: int) -> float:
    """Seconds of a GPU of one stage on one micro-batch."""
    hardware, dimensions = step.hardware, step.table.model.dimensions
    share = dimensions.pipeline_stages(step.policy).layers[stage] / dimensions.num_layers
    is_last = stage == step.policy.pipeline_parallel - 1
    memory_rate = hardware.memory_efficiency * hardware.memory_bytes_per_s
    return _product_s(step, direction, share, is_last) + _memory_bytes(step, direction, stage) / memory_rate


def _product_s(step: PlannedStep, direction: Direction, share: float, is_last: bool) -> float:
    """Seconds of the products of a share of the layers, and of the output layer."""
    hardware, policy, dtype = step.hardware, step.policy, step.dtype
    done = work(step.table, step.schedule.mean_tokens, policy.lora)
    layers, again, head, weights = 1, 0.0, 1, 0
    if direction == "update":
        layers = 4 if policy.recompute == "full" else 3
        # Gradients of weights are a third of a step's products, which adapters leave out.
        weights = 1 if policy.lora.enabled else 0
        again = done.feed_forward if policy.recompute == "selective" and step.repeats_feed_forward else 0.0
        head = 4 if step.config.output_head == "recompute" else 3
    wide = hardware.product_efficiency * hardware.flop_per_s(dtype)
    narrow = hardware.product_efficiency * hardware.flop_per_s(dtype, float8=policy.fp8 != "off")
    attention = hardware.attention_efficiency * hardware.flop_per_s(dtype)
    own_products = (layers - weights) * done.layers + layers * done.adapters + again
    per_token = share * (own_products / narrow + layers * done.attention / attention)
    if is_last:
        per_token += (head - weights) * done.head / wide
    return step.schedule.tokens * per_token / (policy.tensor_parallel * policy.context_parallel)


def _memory_bytes(step: PlannedStep, direction: Direction, stage: int) -> float:
    """Bytes that a stage reads and writes: activations, parameters with their gradients, logits."""
    policy, model, dtype, item = step.policy, step.table.model, step.dtype, step.item_bytes
    dimensions, tokens = model.dimensions, round(step.schedule.tokens)
    update, again = direction == "update", policy.recompute == "full"
    passes = _FORWARD_PASSES if not update else _UPDATE_PASSES + (_FORWARD_PASSES if again else 0)
    sparse = dimensions.sparse_layers
    # What frozen weights let autograd forget is written and read all the same.
    # What is kept in 8 bits was computed, and is read to be rounded, in 16.
    layout = policy.without_adapters.model_copy(update={"fp8": "off"})
    kept = sum(
        count * layer_bytes(model, layout, tokens, dtype=dtype, attention=step.attention, experts=experts).complete
        for experts, count in ((True, sparse), (False, dimensions.num_layers - sparse))
        if count
    )
    share = dimensions.pipeline_stages(policy).layers[stage] / dimensions.num_layers
    logits = 0.0
    if stage == policy.pipeline_parallel - 1:
        columns = dimensions.padded_vocab_size(policy.tensor_parallel) / policy.tensor_parallel
        logits = item * rank_tokens(policy, tokens) * columns
    gradients = 0 if policy.lora.enabled else 2 * step.gradient_bytes
    touched = item if not update else (3 if again else 2) * item + gradients
    return passes * (share * kept + logits) + touched * step.table.stage(policy, stage).elements


def _feed_forward_elements(table: ParameterTable) -> float:
    """Number of elements of the gated feed-forward parts' matrices, three in each part, that a token goes through."""
    model, dimensions = table.model, table.model.dimensions
    sparse = dimensions.sparse_layers
    width = (dimensions.num_layers - sparse) * dimensions.ffn_hidden_size
    if model.experts is not None:
        width += sparse * (model.experts.per_token * model.feed_forward_width + model.experts.shared_ffn_hidden_size)
    return 3 * dimensions.hidden_size * width
