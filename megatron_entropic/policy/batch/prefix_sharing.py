"""Prompts that are computed once for all the responses to them that lie in one micro-batch.

The first sequence of a prompt is laid whole. Another one of the same prompt leaves its prompt out, but for the last
token, whose logits predict its first response token, and attends to the rows of the first one's prompt:

    sequences   p0 p1 p2 a0 a1 | p0 p1 p2 b0
    laid        p0 p1 p2 a0 a1 | p2 b0          the second segment goes on from the Prefix (start 0, length 2)
    positions   0  1  2  3  4  | 2  3

Every token sees what it saw before, so log-probs, entropies and gradients are the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.policy.batch.balance import data_parallel_shards, sequence_costs
from megatron_entropic.types import Sequence

LEVEL = 1.05
"""Work of the busiest replica over the mean of all that a deal of whole prompts may have."""
FINEST = 16
"""Parts in which a replica gets its sequences where larger ones are not level."""


def shares_prefixes(policy: PolicyConfig, dimensions: ModelDimensions, *, on_cpu: bool) -> bool:
    """Whether the policy computes prompts once: as `policy.prefix_sharing` says, where it can.

    Attention to another segment's prefix is ours, for CPUs: Transformer Engine's takes whole segments. Context
    parallelism cuts segments, and layers with experts count and replay the tokens of whole sequences.
    """
    able = on_cpu and policy.context_parallel == 1 and dimensions.experts is None
    return able and policy.prefix_sharing == "auto"


def shared_tokens(sequence: Sequence) -> int:
    """Number of tokens that a sequence leaves out where its prompt is there already."""
    return max(sequence.prompt_length - 1, 0)


def by_prompt(sequences: Listing[Sequence]) -> list[list[int]]:
    """Indices of the sequences of each prompt, in the order in which prompts first appear."""
    units: dict[bytes, list[int]] = {}
    for index, sequence in enumerate(sequences):
        prompt = sequence.tokens[: sequence.prompt_length].cpu().numpy().tobytes()
        units.setdefault(prompt, []).append(index)
    return list(units.values())


def prompt_owners(sequences: Listing[Sequence]) -> dict[int, int]:
    """For each sequence that leaves out its prompt, by index: the index of the one that lays it."""
    return {
        index: unit[0] for unit in by_prompt(sequences) for index in unit[1:] if shared_tokens(sequences[index]) > 0
    }


def laid_tokens(sequences: Listing[Sequence]) -> int:
    """Number of tokens of sequences that lie in one micro-batch."""
    left_out = sum(shared_tokens(sequences[index]) for index in prompt_owners(sequences))
    return sum(sequence.tokens.numel() for sequence in sequences) - left_out


def within(unit: list[int], sequences: Listing[Sequence], budget: int) -> list[list[int]]:
    """Cut a unit into as few runs as its order allows of at most `budget` laid tokens each, or of one sequence."""
    runs: list[list[int]] = []
    room = 0
    for index in unit:
        alone = sequences[index].tokens.numel()
        if runs and (after := alone - shared_tokens(sequences[index])) <= room:
            runs[-1].append(index)
            room -= after
        else:
            runs.append([index])
            room = budget - alone
    return runs


def deal(sequences: Listing[Sequence], attention_weight: float, replicas: int, *, shared: bool) -> list[list[int]]:
    """Deal sequences to data-parallel replicas, so that their work is close.

    Args:
        sequences: sequences to deal.
        attention_weight: see `balance.attention_weight`.
        replicas: number of replicas.
        shared: whether a replica computes each prompt once. Sequences of a prompt then stay together, as far as that
            leaves enough parts to deal.

    Returns:
        For each replica the indices of its sequences, ascending (see `data_parallel_shards`).
    """
    costs = sequence_costs([sequence.tokens.numel() for sequence in sequences], attention_weight)
    if not shared or replicas == 1:
        return data_parallel_shards(costs, replicas)
    units, tokens = by_prompt(sequences), laid_tokens(sequences)
    parts_per_replica = 1
    while True:
        budget = -(-tokens // (parts_per_replica * replicas))
        parts = [part for unit in units for part in within(unit, sequences, budget)]
        once = sequence_costs([shared_tokens(sequences[part[0]]) for part in parts], attention_weight)
        loads = [sum(costs[i] for i in part) - (len(part) - 1) * o for part, o in zip(parts, once, strict=True)]
        shards = data_parallel_shards(loads, replicas)
        busiest = max(sum(loads[part] for part in shard) for shard in shards)
        if parts_per_replica == FINEST or busiest * replicas <= LEVEL * sum(loads):
            return [sorted(index for part in shard for index in parts[part]) for shard in shards]
        parts_per_replica *= 2
