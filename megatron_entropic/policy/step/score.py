"""The score pass: log-probabilities and entropies of responses under the current weights, without gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch

from megatron_entropic.policy.batch.microbatch import MicroBatch, pack
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.model.outputs import OutputOptions, TokenStatistics
from megatron_entropic.policy.model.routing import Routing
from megatron_entropic.policy.step.forward import pack_alike, run_forward
from megatron_entropic.types import Scores, Sequence


class Scored(NamedTuple):
    """Statistics of one micro-batch, still on the device."""

    micro_batch: MicroBatch
    logprobs: torch.Tensor
    """Log-probs of the response tokens, [R]."""
    entropies: torch.Tensor
    """Entropies at the response tokens, [R], nats."""


def score(
    model: torch.nn.ModuleList,
    micro_batches: list[MicroBatch],
    state: ParallelState,
    *,
    temperature: float,
    record: Routing | None = None,
) -> Scores | None:
    """Score the response tokens of packed sequences; every rank of the replica calls it with the same micro-batches.

    Args:
        model: the chunks of this rank's pipeline stage, wrapped for data parallelism or not.
        micro_batches: micro-batches from `microbatch.pack`.
        state: this rank's place.
        temperature: temperature of softmax(logits / temperature), of which the statistics are.
        record: routing of the model: the scores say which experts each token went to, too.

    Returns:
        On the last stage (all its tensor and context ranks alike) float32 CPU tensors in the order of the sequences
        given to `pack`; None on other stages.
    """
    was_training = model.training
    model.eval()
    try:
        with record.recording() if record else nullcontext():
            scored = run_forward(model, micro_batches, _scored, OutputOptions(temperature=temperature))
    finally:
        model.train(was_training)
    experts = record.recorded(micro_batches) if record else []
    return _in_callers_order(scored, experts) if state.is_last_stage else None


def score_sequences(
    model: torch.nn.ModuleList,
    sequences: list[Sequence],
    state: ParallelState,
    *,
    temperature: float,
    tokens_per_microbatch: int,
    record: Routing | None = None,
) -> Scores | None:
    """Score sequences that are not packed yet, as `score` does; they may be none. Called by all ranks together."""
    if not sequences and not state.replicas_meet:
        return Scores([], []) if state.is_last_stage else None
    if state.replicas_meet:
        micro_batches = pack_alike(sequences, tokens_per_microbatch, state, next(model.parameters()).device)
    else:
        micro_batches = pack(sequences, tokens_per_microbatch, state.packing)
    return score(model, micro_batches, state, temperature=temperature, record=record)


def _scored(micro_batch: MicroBatch, statistics: TokenStatistics) -> Scored:
    assert statistics.entropies is not None
    return Scored(micro_batch, statistics.logprobs, statistics.entropies)


def _in_callers_order(scored: list[Scored], experts: list[torch.Tensor]) -> Scores:
    """Scores on the CPU in the caller's order."""
    # By one copy at the end of the pass: one for each micro-batch would make the host wait as often.
    columns = (torch.cat([of.logprobs for of in scored]), torch.cat([of.entropies for of in scored]))
    parts = torch.stack(columns).cpu().split([of.logprobs.numel() for of in scored], dim=1)
    logprobs: dict[int, torch.Tensor] = {}
    entropies: dict[int, torch.Tensor] = {}
    for (micro_batch, *_), part in zip(scored, parts, strict=True):
        # Copies, since a view is pickled with all of the memory that it looks at.
        values = zip(micro_batch.indices, micro_batch.split(part[0]), micro_batch.split(part[1]), strict=True)
        for index, of_logprobs, of_entropies in values:
            logprobs[index], entropies[index] = of_logprobs.clone(), of_entropies.clone()
    order = sorted(logprobs)
    return Scores([logprobs[i] for i in order], [entropies[i] for i in order], experts)
