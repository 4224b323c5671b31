"""Weights that turn per-token losses into one loss: L = sum_t w_t * l_t.

A weight depends on its own sequence's length and on counts over the WHOLE optimizer step (all micro-batches, all data
parallel ranks), never on what else is in the micro-batch. So the sum over micro-batches and ranks is the same however
sequences are distributed, unequal lengths included. Modes, with N tokens in S sequences, sequence s holding n_s:

    token-mean               1 / N                 every token counts the same (DAPO)
    seq-mean-token-sum       1 / S                 long responses count more
    seq-mean-token-mean      1 / (S n_s)           every response counts the same (GRPO as published)
    seq-mean-token-sum-norm  1 / (S n_max)         n_max = the response budget, a constant (Dr. GRPO, arXiv 2503.20783)

Names as in verl; its older versions divide the last mode by n_max only and let it grow with the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import Aggregation


def token_weights(
    mode: Aggregation,
    response_lengths: Tensor,
    *,
    global_tokens: float,
    global_sequences: float,
    max_response_tokens: int,
    tokens: int | None = None,
) -> Tensor:
    """Weights of all response tokens of one micro-batch.

    Args:
        mode: one of the four above.
        response_lengths: [n] int, response tokens of each sequence of this micro-batch.
        global_tokens: N, response tokens of the whole optimizer step.
        global_sequences: S, sequences of the whole optimizer step; one with an empty response counts.
        max_response_tokens: n_max, the response budget.
        tokens: sum of the lengths, where the caller knows it; lengths on a GPU would have to be waited for.

    Returns:
        [sum of lengths] float32, sequence after sequence. Over the whole step and with l = 1 everywhere, the weights of
        "token-mean" sum to 1, as do those of "seq-mean-token-mean" when no response is empty.

    Raises:
        ValueError: the mode is unknown, or a count that the mode divides by is not positive.
    """
    lengths = response_lengths.to(torch.float64)
    if mode == "token-mean":
        per_sequence = torch.full_like(lengths, 1.0 / _positive("global_tokens", global_tokens))
    else:
        per_sequence = _sequence_weights(mode, lengths, global_sequences, max_response_tokens)
    return per_sequence.repeat_interleave(response_lengths, output_size=tokens).to(torch.float32)


def high_prob_token_weights(
    mode: Aggregation,
    high_prob: Tensor,
    response_lengths: Tensor,
    *,
    global_high_prob_tokens: float | Tensor,
    global_sequences: float,
    max_response_tokens: int,
) -> Tensor:
    """Weights of the EntroPIC term under `denominator: high_prob_tokens`: the same modes, over those tokens only.

    As in the published code, the mask replaces the response mask: N and n_s count high-probability tokens. The term's
    effective coefficient is then alpha * N / N_high ("token-mean"), larger than the paper's alpha.

    Args:
        mode: one of the four above.
        high_prob: [T] bool, T = sum of lengths, from `entropic_term`.
        response_lengths: [n] int.
        global_high_prob_tokens: high-probability tokens of the whole optimizer step under the current weights. Read by
            "token-mean" only, a number or a tensor [] where a GPU has just counted them; 0 is taken as 1, in case a
            token has crossed tau since an earlier pass.
        global_sequences: S.
        max_response_tokens: n_max.

    Returns:
        [T] float32, 0 on all other tokens: a step without any high-probability token has a finite, zero adjustment.

    Raises:
        ValueError: the mode is unknown, the shapes disagree, or another count that the mode divides by is not positive.
    """
    # Lengths on a GPU are not looked at: the host would wait for everything that the GPU still has to do.
    if response_lengths.device.type == "cpu" and high_prob.shape != (int(response_lengths.sum()),):
        raise ValueError(
            f"{int(response_lengths.sum())} response tokens but a high-probability mask of {tuple(high_prob.shape)}"
        )
    response_lengths = response_lengths.to(high_prob.device)
    sequence = sequence_of_tokens(response_lengths, high_prob.numel())
    nothing = torch.zeros(response_lengths.numel(), dtype=torch.float64, device=high_prob.device)
    counts = nothing.index_add(0, sequence, high_prob.double())
    if mode == "token-mean":
        everywhere = torch.as_tensor(global_high_prob_tokens, dtype=torch.float64, device=high_prob.device)
        per_sequence = (1.0 / everywhere.clamp(min=1.0)).expand_as(counts)
    else:
        per_sequence = _sequence_weights(mode, counts, global_sequences, max_response_tokens)
    return per_sequence[sequence].to(torch.float32).masked_fill(~high_prob, 0.0)


def sequence_of_tokens(lengths: Tensor, tokens: int) -> Tensor:
    """Number of each token's sequence, [tokens] int64; `lengths` [n] int add up to `tokens`."""
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths, output_size=tokens)


def _sequence_weights(mode: str, counts: Tensor, global_sequences: float, max_response_tokens: int) -> Tensor:
    """Weight of one token of each sequence in the three sequence-wise modes, [n] float64."""
    sequences = _positive("global_sequences", global_sequences)
    if mode == "seq-mean-token-sum":
        return torch.full_like(counts, 1.0 / sequences)
    if mode == "seq-mean-token-mean":
        return 1.0 / (sequences * counts.clamp(min=1.0))
    if mode == "seq-mean-token-sum-norm":
        return torch.full_like(counts, 1.0 / (sequences * _positive("max_response_tokens", max_response_tokens)))
    raise ValueError(
        f"unknown aggregation {mode!r}: token-mean, seq-mean-token-sum, seq-mean-token-mean or seq-mean-token-sum-norm"
    )


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, not {value}")
    return float(value)
