"""The forward step that scoring and updating share, and megatron-core's pipeline schedule around it.

    micro-batches -> schedule (none, 1F1B or interleaved over stages) -> forward step -> model -> (log-probs, entropies)

Hidden states pass from stage to stage; the statistics appear on the last one, where the caller's function gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_entropic.policy.batch.microbatch import MicroBatch, pack
from megatron_entropic.policy.megatron.parallel import ParallelState, largest
from megatron_entropic.policy.model.outputs import Output, OutputOptions, TokenStatistics
from megatron_entropic.types import Sequence

LossFunction = Callable[[MicroBatch, TokenStatistics], tuple[torch.Tensor, Any]]
"""Function that returns (loss, anything to collect).

Gradients are summed over micro-batches and data-parallel ranks and divided by nothing: a loss function weights its
tokens by global counts.
"""
CollectFunction = Callable[[MicroBatch, TokenStatistics], Any]


def run_forward(
    model: torch.nn.ModuleList, micro_batches: list[MicroBatch], collect: CollectFunction, options: OutputOptions
) -> list[Any]:
    """Run one pass without gradients.

    Returns what `collect` returned for each micro-batch, in order, on the last stage, else [].
    """

    def output_function(micro_batch: MicroBatch) -> Callable[..., Any]:
        # megatron-core passes non_loss_data=True when it collects instead of differentiating.
        return lambda output, non_loss_data: collect(micro_batch, TokenStatistics(*output))

    with torch.no_grad():
        return _run_schedule(model, micro_batches, output_function, options, forward_only=True)


def run_forward_backward(
    model: torch.nn.ModuleList, micro_batches: list[MicroBatch], loss: LossFunction, options: OutputOptions
) -> list[Any]:
    """Run forward and backward over all micro-batches; gradients accumulate in the model's buffers.

    Returns what `loss` returned beside each loss, in order, on the last stage, else [].
    """

    def output_function(micro_batch: MicroBatch) -> Callable[..., Any]:
        def megatron_loss(output: Output) -> tuple[torch.Tensor, torch.Tensor, Any]:
            value, collected = loss(micro_batch, TokenStatistics(*output))
            # A triple under calculate_per_token_loss is the one form that megatron-core does not divide by the
            # number of micro-batches; the count is for its own normalisation, which the policy does not use.
            return value, torch.zeros((), dtype=torch.int, device=value.device), collected

        return megatron_loss

    return _run_schedule(model, micro_batches, output_function, options, forward_only=False)


def _run_schedule(
    model: torch.nn.ModuleList,
    micro_batches: list[MicroBatch],
    output_function: Callable[[MicroBatch], Callable[..., Any]],
    options: OutputOptions,
    *,
    forward_only: bool,
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = next(model.parameters()).device

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        micro_batch = next(batches).to(device)
        return chunk(micro_batch=micro_batch, options=options), output_function(micro_batch)

    chunks = list(model)
    iterators = [iter(micro_batches) for _ in chunks]
    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(micro_batches),
        # Interleaved, all micro-batches have this length; otherwise stages tell each other (variable_seq_lengths).
        seq_length=int(micro_batches[0].cu_seqlens[-1]),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return collected


# Micro-batches of which every replica runs equally many, because replicas meet in collectives within them.


def pack_alike(
    sequences: list[Sequence], tokens_per_microbatch: int, parallel: ParallelState, device: torch.device
) -> list[MicroBatch]:
    """Pack this replica's sequences into a number of micro-batches that all replicas agree on; called by all ranks.

    A replica with too few sequences gets micro-batches without any: they run through the model and every collective
    like the others.
    """
    own = pack(sequences, tokens_per_microbatch, parallel.packing)
    count = largest(len(own), device)
    if count == len(own):
        return own
    return pack(sequences, tokens_per_microbatch, parallel.packing, at_least=count)
