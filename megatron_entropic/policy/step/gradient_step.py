"""One optimizer step over a list of sequences, whatever the loss: the machinery under update and warm start.

    sequences --align--> micro-batches --1F1B--> gradients and measurements --optimizer--> outcome

Every replica runs as many micro-batches as every other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_entropic.policy.batch.balance import sequence_costs
from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.megatron.parallel import ParallelState, sum_of_token_statistics
from megatron_entropic.policy.model.outputs import Output, OutputOptions, TokenStatistics
from megatron_entropic.policy.model.router_replay import with_choices
from megatron_entropic.policy.model.routing import Routing, has_experts
from megatron_entropic.policy.step.forward import pack_alike, run_forward, run_schedule
from megatron_entropic.policy.step.optimizer import PolicyOptimizer, StepOutcome
from megatron_entropic.types import Sequence

Share = Callable[[MicroBatch, TokenStatistics], tuple[torch.Tensor, torch.Tensor]]
"""Function of a micro-batch's share of the loss: (scalar with gradient, [k] float64 measurements that add up).

Where the output head has taken the loss already (`TokenStatistics.loss`), only the measurements count. Gradients are
summed over micro-batches and data-parallel ranks and divided by nothing: a share weights its tokens by global counts.
"""


class GradientStep:
    """Optimizer steps on one rank.

    Args:
        model: the chunks of this rank's pipeline stage, from `optimizer.wrap_data_parallel`.
        parallel: this rank's place.
        device: device of the model.
        tokens_per_microbatch: budget of one packed micro-batch.
        attention_weight: attention weight of the model, for batch/*.

    Attributes:
        routing: for a model with experts: where the tokens of the last step went.
    """

    def __init__(
        self,
        model: torch.nn.ModuleList,
        parallel: ParallelState,
        device: torch.device,
        tokens_per_microbatch: int,
        attention_weight: float = 0.0,
    ) -> None:
        self.model = model
        self.parallel = parallel
        self.device = device
        self.routing = Routing(model, parallel) if has_experts(model) else None
        self._tokens_per_microbatch = tokens_per_microbatch
        self._attention_weight = attention_weight

    def align(self, sequences: list[Sequence], *, replay: bool = False) -> list[MicroBatch]:
        """Pack this replica's sequences into as many micro-batches as every other replica runs (see `pack_alike`).

        Args:
            sequences: sequences of this replica.
            replay: whether to send tokens to the experts that the sequences carry.

        Raises:
            ValueError: with `replay`, a sequence carries none.
        """
        batch = pack_alike(sequences, self._tokens_per_microbatch, self.parallel, self.device)
        return [with_choices(micro_batch, self.parallel) for micro_batch in batch] if replay else batch

    def batch_metrics(self, batch: list[MicroBatch]) -> dict[str, float]:
        """Metrics of how well `batch`, from `align`, fills the ranks; equal on all of them."""
        return batch_metrics(batch, self._attention_weight, self.parallel, self.device)

    def measure(
        self, batch: list[MicroBatch], count: Callable[[torch.Tensor], torch.Tensor], options: OutputOptions
    ) -> float:
        """Sum `count(logprobs [R])` [] over micro-batches and replicas, globally, in a pass without gradients."""

        def collect(micro_batch: MicroBatch, statistics: TokenStatistics) -> torch.Tensor:
            return count(statistics.logprobs).double().reshape(1)

        return float(self._sums(run_forward(self.model, batch, collect, options), width=1))

    def run(
        self, batch: list[MicroBatch], share: Share, options: OutputOptions, optimizer: PolicyOptimizer, *, width: int
    ) -> tuple[torch.Tensor, StepOutcome]:
        """Compute the gradients of the sum of all shares, then take the optimizer step.

        Args:
            batch: micro-batches from `align`.
            share: called on the last stage for every micro-batch that holds sequences.
            options: statistics that the last stage computes.
            optimizer: optimizer that steps, or refuses on all ranks.
            width: k, the number of measurements a share returns.

        Returns:
            ([k] float64 measurements summed over micro-batches and replicas, the outcome), equal on every rank.
        """

        def loss_of(micro_batch: MicroBatch) -> Callable[[Output], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
            def loss(output: Output) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                statistics = TokenStatistics(*output)
                measured = torch.zeros(width, dtype=torch.float64, device=self.device)
                value = statistics.logprobs.sum() * 0.0
                if micro_batch.sequences:
                    value, measured = share(micro_batch, statistics)
                if statistics.loss is not None:
                    value = statistics.loss
                # A triple under calculate_per_token_loss is the one form that megatron-core does not divide by the
                # number of micro-batches; the count is for its own normalisation, which the policy does not use.
                return value, torch.zeros((), dtype=torch.int, device=value.device), measured

            return loss

        optimizer.zero_grad()
        if self.routing is not None:
            self.routing.begin_step(batch)
        collected = run_schedule(self.model, batch, loss_of, options, forward_only=False)
        return self._sums(collected, width), optimizer.step()

    def _sums(self, collected: list[torch.Tensor], width: int) -> torch.Tensor:
        local = torch.zeros(width, dtype=torch.float64, device=self.device)
        for values in collected:
            local = local + values
        return sum_of_token_statistics(local, self.parallel)


# How well an optimizer step fills the ranks: what was computed for padding, and how unequal replicas' work was.


def batch_metrics(
    batch: list[MicroBatch], attention_weight: float, parallel: ParallelState, device: torch.device
) -> dict[str, float]:
    """Metrics of this replica's micro-batches and those of all others, equal on all ranks.

    Args:
        batch: micro-batches of this replica.
        attention_weight: see `sequence_costs`.
        parallel: this rank's place.
        device: device of the policy.

    Returns:
        batch/padding_fraction: packed tokens that belong to no sequence, over all packed tokens;
        batch/shared_fraction: tokens of prompts that were not packed, because another sequence's prompt stood for them,
        over the tokens of all sequences;
        batch/imbalance: work of the busiest replica over the mean of all, minus 1;
        batch/microbatches: number of micro-batches of each replica.
    """
    replicas = torch.zeros(parallel.data_size, 4, dtype=torch.float64, device=device)
    if parallel.context_rank == 0:
        lengths = [sequence.tokens.numel() for micro_batch in batch for sequence in micro_batch.sequences]
        packed = sum(int(micro_batch.cu_seqlens[-1]) for micro_batch in batch)
        left_out = [tokens for micro_batch in batch for tokens in micro_batch.left_out]
        # As sequences are dealt: a prompt that is there already costs neither products nor attention.
        work, saved = (sum(sequence_costs(tokens, attention_weight)) for tokens in (lengths, left_out))
        own = [sum(lengths), packed, sum(left_out), work - saved]
        replicas[parallel.data_rank] = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(replicas, group=parallel.data_context_group)
    tokens, packed_tokens, shared_tokens, costs = replicas.unbind(1)
    return {
        "batch/padding_fraction": 1 - float((tokens.sum() - shared_tokens.sum()) / packed_tokens.sum()),
        "batch/shared_fraction": float(shared_tokens.sum() / tokens.sum()),
        "batch/imbalance": float(costs.max() / costs.mean()) - 1,
        "batch/microbatches": float(len(batch)),
    }
