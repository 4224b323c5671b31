"""Statistics of response tokens from hidden states, on the last stage, by one of three output heads.

    logits       a shard of logits [R, V/tp] lives from forward to backward; its gradient replaces it in place
    recompute    blocks of logits, computed in forward and again in backward; any loss
    fused_loss   blocks of logits, whose gradient is taken in forward; a loss that is a sum over tokens

Nothing upcasts logits on the way: megatron's Float16Module, which would, does not wrap this model, and the statistics
take bfloat16 logits as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.model.outputs import Output, OutputOptions
from megatron_entropic.tensor_parallel import (
    fused_logprob_and_entropy,
    fused_policy_loss,
    fused_reverse_kl,
    logprob_and_entropy,
)

LOSS_SCALE = 1.0
"""Gradient that reaches the loss in the backward pass.

The policy's loss carries its normalisers itself, and megatron-core multiplies it by nothing
(`optimizer.wrap_data_parallel`; no grad_scale_func is set).
"""


class OutputHead:
    """The output layer's weight shard and the computation of statistics from it.

    Args:
        output_layer: megatron's ColumnParallelLinear; used as a module by the `logits` head only.
        group: tensor-parallel.
        vocab_size: token ids that exist; weight rows beyond are padding.
        sequence_parallel: hidden states come as this rank's part of the tokens.
        context_group: context-parallel; None where there is one rank.
    """

    def __init__(
        self,
        output_layer: Any,
        group: dist.ProcessGroup,
        vocab_size: int,
        sequence_parallel: bool,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._output_layer = output_layer
        self._group = group
        self._vocab_size = vocab_size
        self._sequence_parallel = sequence_parallel
        self._context_group = context_group
        if sequence_parallel:
            _leave_gathering_to_the_head(output_layer)

    def run(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, micro_batch: MicroBatch, options: OutputOptions
    ) -> Output:
        """Compute statistics of the micro-batch's R response tokens, equal on all tensor and context parallel ranks.

        Args:
            hidden_states: [T, 1, H] of this rank's tokens, or [T/tp, 1, H] with sequence parallelism.
            weight: [V/tp, H] weight of the output layer, the embedding's where they are tied.
            micro_batch: micro-batch whose rows and targets are taken.
            options: which statistics, and which head. Without gradients `fused_loss` is `recompute`.
        """
        if options.hidden:
            return self._hidden(hidden_states, micro_batch)
        output = self._of_own_tokens(hidden_states, weight, micro_batch, options)
        if options.teacher is not None:
            output = self._with_divergences(output, hidden_states, weight, micro_batch, options)
        if self._context_group is None:
            return output
        assert micro_batch.owned is not None
        per_token = (output.logprobs, output.entropies, output.divergences)
        own = torch.stack([values for values in per_token if values is not None])
        gathered = gather_tokens(own, micro_batch.owned, micro_batch.response_tokens, self._context_group)
        rows = iter(gathered)
        logprobs, entropies, divergences = (None if values is None else next(rows) for values in per_token)
        assert logprobs is not None
        return Output(logprobs, entropies, output.loss, divergences)

    def _hidden(self, hidden_states: torch.Tensor, micro_batch: MicroBatch) -> Output:
        """Hidden states at this rank's targets, [r, H], the same on all tensor parallel ranks."""
        if self._sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=self._group)
        chosen = hidden_states.squeeze(1).index_select(0, micro_batch.rows)
        return Output(chosen.new_zeros(0), None, None, hidden=chosen)

    def _with_divergences(
        self,
        output: Output,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        micro_batch: MicroBatch,
        options: OutputOptions,
    ) -> Output:
        """Add the divergences from the teacher at this rank's targets, and their part of a loss that exists already."""
        teacher = options.teacher
        assert teacher is not None
        stored = options.head == "logits"  # then the output layer gives its weight's gradient to autograd
        divergences = fused_reverse_kl(
            hidden_states.squeeze(1),
            weight,
            teacher.hidden(micro_batch),
            teacher.weight,
            group=self._group,
            temperature=options.temperature,
            vocab_size=self._vocab_size,
            sequence_parallel=self._sequence_parallel,
            rows=micro_batch.rows,
            main_grad=None if stored else _gradient_buffer(weight),
        )
        loss = output.loss
        if loss is not None:
            if divergences.numel():  # without response tokens there is no loss to ask for
                loss = loss + teacher.loss(micro_batch)(divergences)
            divergences = divergences.detach()
        return output._replace(loss=loss, divergences=divergences)

    def _of_own_tokens(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, micro_batch: MicroBatch, options: OutputOptions
    ) -> Output:
        if options.head == "logits":
            return self._from_logits(hidden_states, weight, micro_batch, options)
        shared: dict[str, Any] = {
            "group": self._group,
            "temperature": options.temperature,
            "vocab_size": self._vocab_size,
            "need_entropy": options.entropy,
            "sequence_parallel": self._sequence_parallel,
            "rows": micro_batch.rows,
            "main_grad": _gradient_buffer(weight),
        }
        hidden = hidden_states.squeeze(1)
        if options.head == "recompute" or options.token_loss is None or not torch.is_grad_enabled():
            logprobs, entropies = fused_logprob_and_entropy(
                hidden, weight, micro_batch.targets, entropy_gradient=options.entropy_gradient, **shared
            )
            return Output(logprobs, entropies, None)
        # Without response tokens, of no sequence or of others' parts of sequences, there is no loss to ask for.
        token_loss = options.token_loss(micro_batch) if micro_batch.targets.numel() else _no_loss
        loss, logprobs, entropies = fused_policy_loss(
            hidden, weight, micro_batch.targets, token_loss, gradient_scale=LOSS_SCALE, **shared
        )
        return Output(logprobs, entropies, loss)

    def _from_logits(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, micro_batch: MicroBatch, options: OutputOptions
    ) -> Output:
        if self._sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self._group
            )
        logits, _bias = self._output_layer(hidden_states.index_select(0, micro_batch.rows), weight=weight)
        logprobs, entropies = logprob_and_entropy(
            logits.squeeze(1),
            micro_batch.targets,
            group=self._group,
            temperature=options.temperature,
            need_entropy=options.entropy,
            entropy_gradient=options.entropy_gradient,
            vocab_size=self._vocab_size,
        )
        return Output(logprobs, entropies, None)


def _gradient_buffer(weight: torch.Tensor) -> torch.Tensor | None:
    """Megatron's buffer of the weight's gradient, where it is in float32, in which the fused heads add."""
    buffer = getattr(weight, "main_grad", None) if torch.is_grad_enabled() else None
    return buffer if buffer is not None and buffer.dtype == torch.float32 else None


def _no_loss(logprobs: torch.Tensor, entropies: torch.Tensor | None, tokens: slice) -> torch.Tensor:
    return logprobs.sum() * 0.0


def _leave_gathering_to_the_head(output_layer: Any) -> None:
    """Let the output layer gather no tokens: the head does, to select rows before the large matrix product.

    The gather's backward sums the input gradients of all tensor ranks while it scatters them, so the layer must neither
    gather nor sum.
    """
    output_layer.sequence_parallel = False
    output_layer.disable_grad_reduce = True
    assert not output_layer.allreduce_dgrad


# What context-parallel ranks tell each other beside keys and values: the statistics of their response tokens.
#
# Every rank of the group gets the statistics of all R response tokens of a micro-batch, computes the same loss of them
# and differentiates it for its own tokens only. Summed over the group, gradients are those of the whole loss, and a
# loss that looks at several tokens of a sequence needs to know nothing of the cut.


def gather_tokens(values: torch.Tensor, owned: torch.Tensor, count: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather the values of all ranks' tokens, bit for bit the same on every rank, by one all-reduce.

    Args:
        values: [k, r] values of this rank's tokens.
        owned: [r] int64, which of the `count` tokens they are; each token is one rank's.
        count: tokens of all ranks.
        group: context-parallel group.

    Returns:
        [k, count]. Its gradient reaches this rank's tokens and is not summed over ranks.
    """
    gathered: torch.Tensor = _GatherTokens.apply(values, owned, count, group)
    return gathered


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, owned: torch.Tensor, count: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(owned)
        # The other ranks add zeros, which changes nothing.
        gathered = values.new_zeros(values.shape[0], count)
        gathered[:, owned] = values
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (owned,) = ctx.saved_tensors
        return gradients[0][:, owned], None, None, None
