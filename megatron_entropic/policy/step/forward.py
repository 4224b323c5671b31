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
from megatron_entropic.policy.model.outputs import OutputOptions, TokenStatistics
from megatron_entropic.types import Sequence

Collect = Callable[[MicroBatch, TokenStatistics], Any]


def run_forward(
    model: torch.nn.ModuleList, micro_batches: list[MicroBatch], collect: Collect, options: OutputOptions
) -> list[Any]:
    """Run one pass without gradients.

    Returns what `collect` returned for each micro-batch, in order, on the last stage, else [].
    """

    def output_function(micro_batch: MicroBatch) -> Callable[..., Any]:
        # megatron-core passes non_loss_data=True when it collects instead of differentiating.
        return lambda output, non_loss_data: collect(micro_batch, TokenStatistics(*output))

    with torch.no_grad():
        return run_schedule(model, micro_batches, output_function, options, forward_only=True)


def run_schedule(
    model: torch.nn.ModuleList,
    micro_batches: list[MicroBatch],
    output_function: Callable[[MicroBatch], Callable[..., Any]],
    options: OutputOptions,
    *,
    forward_only: bool,
) -> list[Any]:
    """Run megatron-core's schedule over all micro-batches; with backward, gradients accumulate in the model's buffers.

    Args:
        model: the chunks of this rank's stage.
        micro_batches: micro-batches of this replica.
        output_function: micro-batch -> what megatron-core calls with the output of the last stage. Without backward its
            result is collected; with it a triple of loss, a count, and what is collected.
        options: statistics that the last stage computes.
        forward_only: whether there is no backward pass.

    Returns:
        What was collected for each micro-batch, in order, on the last stage, else [].
    """
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
