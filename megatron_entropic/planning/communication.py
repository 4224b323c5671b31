"""Bytes that a policy GPU sends, by kind of parallelism, for one micro-batch and for one optimizer step.

With n ranks and a tensor of S bytes a ring sends (n - 1)/n S in an all-gather or a reduce-scatter, and twice that in an
all-reduce, which is both (Thakur et al. 2005). Ranks are numbered as megatron-core does by default: tensor parallel
neighbours first, then context, data and pipeline parallel ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.planning.activations import expert_token_share, rank_tokens
from megatron_entropic.planning.compute import Direction
from megatron_entropic.planning.hardware import Hardware
from megatron_entropic.planning.parameters import PlannedModel
from megatron_entropic.planning.step import PlannedStep

Kind = Literal["tensor", "context", "expert", "pipeline", "data"]


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest GPU sends for one purpose."""

    kind: Kind
    operation: str
    ranks: int
    across_nodes: bool
    count: int
    """Number of collectives, or of messages."""
    sent_bytes: float
    members_per_node: int = 1
    """Ranks of the group on each node: a ring across nodes uses the ports of all of them."""

    def times(self, factor: int) -> Traffic:
        """The traffic of `factor` repetitions: count and bytes multiplied."""
        return replace(self, count=self.count * factor, sent_bytes=self.sent_bytes * factor)

    def time_s(self, hardware: Hardware) -> float:
        """Seconds at the link's rate, without latency."""
        return self.sent_bytes / hardware.link_bytes_per_s(self.across_nodes, self.members_per_node)


def microbatch_traffic(step: PlannedStep, direction: Direction) -> list[Traffic]:
    """Traffic of one micro-batch.

    `forward` is a pass without gradients; `update` is forward, backward and, with policy.recompute=full, a second
    forward of the layers.
    """
    found = chain.from_iterable(kind(step, direction) for kind in (_tensor, _context, _expert, _pipeline))
    return [traffic for traffic in found if traffic.ranks > 1]


def gradient_traffic(step: PlannedStep) -> list[Traffic]:
    """Traffic of one optimizer step, once for all its micro-batches: gradients, and parameters that others updated."""
    policy = step.policy
    per_stage = [list(_gradients(step, stage)) for stage in step.end_stages]
    found = max(per_stage, key=lambda rows: sum(row.sent_bytes for row in rows))
    tied = step.table.model.dimensions.tie_word_embeddings and not policy.lora.enabled
    if tied and policy.pipeline_parallel > 1:
        shard = next(s for s in step.table.stage(policy, 0).shards if s.part == "embedding")
        crosses = _crosses(policy, step.hardware, "pipeline")
        found.append(
            Traffic(
                "pipeline",
                "all-reduce of the tied embedding's gradient",
                2,
                crosses,
                1,
                step.gradient_bytes * shard.elements,
            )
        )
    return [traffic for traffic in found if traffic.ranks > 1]


def _tensor(step: PlannedStep, direction: Direction) -> Iterator[Traffic]:
    """Traffic of hidden states in and out of attention and of the feed-forward part, of embedding and output head.

    Without sequence parallelism two all-reduces forward and two backward in each layer (Shoeybi et al. 2019, section
    3). With it an all-gather and a reduce-scatter in place of each (Korthikanti et al. 2022, section 4.2), and the two
    inputs gathered once more for the gradients of the weights.
    """
    policy, model, hardware = step.policy, step.table.model, step.hardware
    ranks, layers = policy.tensor_parallel, _most_layers(model, policy)
    size = _hidden_bytes(step)
    # Shared experts gather and scatter as a dense feed-forward part does.
    shared = model.experts is not None and model.experts.shared_ffn_hidden_size > 0
    blocks = layers * (2 if shared or model.experts is None else 1)
    passes = 1 if direction == "forward" else 3 if policy.recompute == "full" else 2
    # Embedding and head are on different stages, unless there is one: the busiest has one of them or both.
    ends = 2 if policy.pipeline_parallel == 1 else 1
    halves = passes * blocks + ends * (1 if direction == "forward" else 2)
    if direction == "update" and policy.recompute == "selective" and step.repeats_feed_forward:
        halves += blocks // 2 if shared or model.experts is None else 0
    if policy.sequence_parallel:
        # Frozen weights need no gradient, for which their inputs would have to be there again.
        again = blocks if direction == "update" and not policy.lora.enabled else 0
        count, share, operation = 2 * halves + again, 1, "all-gather and reduce-scatter of hidden states"
    else:
        count, share, operation = halves, 2, "all-reduce of hidden states"
    sent = count * share * size * (ranks - 1) / ranks * (1 - hardware.hidden_tensor_share)
    yield Traffic("tensor", operation, ranks, _crosses(policy, hardware, "tensor"), count, sent)


def _context(step: PlannedStep, direction: Direction) -> Iterator[Traffic]:
    """Traffic of the keys and values of the other ranks' tokens in every layer, and of their gradients back."""
    policy, dimensions = step.policy, step.table.model.dimensions
    ranks, layers = policy.context_parallel, _most_layers(step.table.model, policy)
    heads = dimensions.num_query_groups / policy.tensor_parallel
    width = heads * (dimensions.head_dim + dimensions.value_head_dim)
    size = step.schedule.tokens / ranks * width * step.item_bytes
    passes = 1 if direction == "forward" else 4 if policy.recompute == "full" else 3
    crosses = _crosses(policy, step.hardware, "context")
    yield Traffic("context", "keys and values", ranks, crosses, passes * layers, passes * layers * size * (ranks - 1))


def _expert(step: PlannedStep, direction: Direction) -> Iterator[Traffic]:
    """Traffic of each token's copies to its experts and back; over tensor ranks too, since these share every expert.

    Experts are chosen evenly. megatron-core's all-to-all sends a copy for each of the k experts of a token, of which
    the share that stays inside the node goes over its links. Dispatchers that send a token once to each node that needs
    it (DeepEP, HybridEP) hand it on to ranks there: (n - 1) (1 - (1 - 1/n)^k) copies go to n - 1 other nodes.
    """
    policy, model, hardware = step.policy, step.table.model, step.hardware
    if model.experts is None:
        return
    layers = _most_layers(model, policy)
    exchanges = 2 * layers * (1 if direction == "forward" else 3 if step.repeats_feed_forward else 2)
    per_token, hidden = model.experts.per_token, _hidden_bytes(step)
    own = hidden / (policy.tensor_parallel if policy.sequence_parallel else 1)
    ranks = policy.expert_parallel
    nodes = -(-ranks * policy.expert_tensor_size // hardware.gpus_per_node)
    if step.sends_once_per_node:
        outside, inside = _reached(nodes, per_token), _reached(ranks, per_token)
    else:
        outside, inside = per_token * (nodes - 1) / nodes, per_token * (1 / nodes - 1 / ranks)
    shown = 1 - hardware.hidden_expert_share if direction == "update" else 1.0
    for across_nodes, copies, where in ((True, outside, "other nodes"), (False, inside, "the node")):
        if copies:
            name = f"all-to-all of tokens to experts on {where} and back"
            yield Traffic("expert", name, ranks, across_nodes, exchanges, shown * exchanges * copies * own)
    size = policy.expert_tensor_size
    gathered = per_token * hidden * expert_token_share(model, policy) * (size - 1) / size
    crosses = _crosses(policy, hardware, "tensor")
    operation = "all-gather and reduce-scatter of the experts' tokens"
    yield Traffic("tensor", operation, size, crosses, exchanges, exchanges * gathered)


def _reached(places: int, copies: int) -> float:
    """Expected number of other places, of `places` alike, that at least one of `copies` copies goes to."""
    return (places - 1) * (1 - (1 - 1 / places) ** copies)


def _pipeline(step: PlannedStep, direction: Direction) -> Iterator[Traffic]:
    """Traffic of hidden states to the next stage and of their gradients to the one before."""
    policy = step.policy
    size = _hidden_bytes(step) / (policy.tensor_parallel if policy.sequence_parallel else 1)
    # A stage between two others sends both ways, and so does every stage with several chunks.
    chunks = policy.virtual_pipeline_parallel
    both_ways = policy.pipeline_parallel > 2 or chunks > 1
    count = chunks * (2 if direction == "update" and both_ways else 1)
    crosses = _crosses(policy, step.hardware, "pipeline")
    yield Traffic("pipeline", "point to point", policy.pipeline_parallel, crosses, count, count * size)


def _gradients(step: PlannedStep, stage: int) -> Iterator[Traffic]:
    """Traffic of gradients; the distributed optimizer sums them by parts and gathers what each rank updated."""
    policy, hardware, item, summed = step.policy, step.hardware, step.item_bytes, step.gradient_bytes
    for buffer in step.buffers(stage):
        ranks, count = buffer.data_ranks, len(buffer.buckets)
        share = (ranks - 1) / ranks
        crosses = _crosses(policy, hardware, "data")
        # Replicas of experts are farther apart: between two of them lie all ranks that share the experts out.
        stride = policy.expert_tensor_size * policy.expert_parallel if buffer.expert else policy.tensor_parallel
        members = max(1, hardware.gpus_per_node // stride)
        if policy.distributed_optimizer:
            gradients, parameters = summed * buffer.padded_elements * share, item * buffer.padded_elements * share
            yield Traffic("data", "reduce-scatter of gradients", ranks, crosses, count, gradients, members)
            yield Traffic("data", "all-gather of parameters", ranks, crosses, count, parameters, members)
        else:
            sent = 2 * summed * buffer.elements * share
            yield Traffic("data", "all-reduce of gradients", ranks, crosses, count, sent, members)


def _most_layers(model: PlannedModel, policy: PolicyConfig) -> int:
    """Number of layers of the stage that has most."""
    return max(model.dimensions.pipeline_stages(policy).layers)


def _hidden_bytes(step: PlannedStep) -> float:
    """Bytes of all hidden states of a micro-batch's tokens on a context-parallel rank."""
    own_tokens = rank_tokens(step.policy, round(step.schedule.tokens))
    return own_tokens * step.table.model.dimensions.hidden_size * step.item_bytes


def _crosses(policy: PolicyConfig, hardware: Hardware, kind: Kind) -> bool:
    """Whether a group of ranks of this kind of parallelism reaches over several nodes."""
    span = {
        "tensor": policy.tensor_parallel,
        "context": policy.tensor_parallel * policy.context_parallel,
        "expert": policy.expert_tensor_size * policy.expert_parallel,
        "data": policy.tensor_parallel * policy.context_parallel * policy.data_parallel,
        "pipeline": policy.world_size,
    }[kind]
    return span > hardware.gpus_per_node
