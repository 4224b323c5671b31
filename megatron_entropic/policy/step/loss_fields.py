"""Inputs of the loss: its settings, and the constants of a micro-batch's response tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_entropic.algorithms import (
    PolicyLoss,
    corrections,
    find_policy_loss,
    importance_ratios,
    importance_weights,
)
from megatron_entropic.config.algorithm import AlgorithmConfig
from megatron_entropic.config.run import Config
from megatron_entropic.errors import UserError
from megatron_entropic.policy.batch.host_copies import to_device
from megatron_entropic.types import Sequence


@dataclass(frozen=True)
class LossSettings:
    """Settings of the loss, from several sections of the configuration."""

    algorithm: AlgorithmConfig
    loss: PolicyLoss
    max_response_tokens: int
    correction: str
    """Correction for the rollout: none, tis or mis."""
    staleness_correction: str
    """Correction for weights that are older than the policy's: none, tis or mis."""
    correction_level: str
    correction_cap: float
    tau: float
    ratio_clip: str
    high_prob_denominator: bool
    weight_limit: float | None = None
    """Bound of |alpha| times a token's weight in EntroPIC's term, as a multiple of its own in the policy loss."""
    divergence_coefficient: float = 0.0
    """Weight of KL(policy || teacher) in the loss; 0 without a teacher, or with one that gives advantages."""

    @property
    def adds_up_over_tokens(self) -> bool:
        """Whether each token's loss depends on nothing but the token and what is known before the forward pass.

        The high-probability denominator of a sequence depends on the log-probabilities of all its tokens.
        """
        return not (self.high_prob_denominator or self.loss.whole_sequences)

    @classmethod
    def from_config(cls, config: Config) -> LossSettings:
        """Collect the settings from a configuration.

        Raises:
            UserError: there is no such policy loss.
        """
        control = config.entropy_control
        try:
            loss = find_policy_loss(config.algorithm.policy_loss)
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(
            algorithm=config.algorithm,
            loss=loss,
            max_response_tokens=config.rollout.max_response_tokens,
            correction=config.rollout.importance_correction,
            staleness_correction=config.rollout.staleness_correction,
            correction_level=config.rollout.importance_level,
            correction_cap=config.rollout.importance_cap,
            tau=control.tau,
            ratio_clip=control.ratio_clip,
            high_prob_denominator=control.steers_alpha and control.denominator == "high_prob_tokens",
            weight_limit=control.weight_limit,
            divergence_coefficient=(
                config.algorithm.distillation.coefficient if config.algorithm.distillation.as_loss else 0.0
            ),
        )


@dataclass(frozen=True)
class TokenFields:
    """Constants of a micro-batch's response tokens, sequence after sequence; T = sum of `lengths`."""

    lengths: Tensor
    """Number of response tokens of each sequence, [n] int64."""
    old_logprobs: Tensor
    """Log-probs before the update, [T] float32."""
    advantages: Tensor
    """Advantages, [T] float32."""
    correction: Tensor | None = None
    """Weights of the rollout correction, [T] float32; None without one."""
    reference_logprobs: Tensor | None = None
    """Log-probs of the frozen reference, [T] float32; None without KL penalty."""
    marks: Tensor | None = None
    """Marks from the policy loss's plan, [T] float32; None for a loss without one."""
    success: Tensor | None = None
    """Share of right responses of each token's prompt, [T] float32; None where a sequence carries none."""

    def select(self, tokens: slice | Tensor) -> TokenFields:
        """The constants of some of the tokens; `lengths` remain those of the whole micro-batch."""
        return replace(
            self,
            old_logprobs=self.old_logprobs[tokens],
            advantages=self.advantages[tokens],
            correction=None if self.correction is None else self.correction[tokens],
            reference_logprobs=None if self.reference_logprobs is None else self.reference_logprobs[tokens],
            marks=None if self.marks is None else self.marks[tokens],
            success=None if self.success is None else self.success[tokens],
        )


def token_fields(
    sequences: Seq[Sequence], settings: LossSettings, device: torch.device, marks: Seq[Tensor] | None = None
) -> TokenFields:
    """Concatenate the fields that the loss reads from the sequences of one micro-batch.

    Args:
        sequences: sequences of the micro-batch.
        settings: settings of the loss.
        device: device of the result.
        marks: marks of each sequence, for a policy loss with a plan.

    Raises:
        ValueError: a sequence lacks a field that the configured loss needs, or a field is not [R].
    """
    return TokenFields(
        lengths=to_device(torch.tensor([s.response_length for s in sequences], dtype=torch.int64), device),
        old_logprobs=_column(sequences, "old_logprobs", device),
        advantages=_column(sequences, "advantages", device),
        correction=_correction(sequences, settings, device),
        reference_logprobs=(
            _column(sequences, "reference_logprobs", device) if settings.algorithm.kl.coefficient > 0 else None
        ),
        marks=None if marks is None else to_device(torch.cat(list(marks)), device),
        success=_success(sequences, device),
    )


def _correction(sequences: Seq[Sequence], settings: LossSettings, device: torch.device) -> Tensor | None:
    """Product of the weights of all `corrections`, [T] float32; None without any."""
    weights = None
    for one in corrections(settings.correction, settings.staleness_correction):
        _column(sequences, one.below, device)
        ratios = [
            importance_ratios(getattr(s, one.above).float(), getattr(s, one.below).float(), settings.correction_level)
            for s in sequences
        ]
        factor = importance_weights(torch.cat(ratios), one.method, settings.correction_cap)
        weights = factor if weights is None else weights * factor
    return None if weights is None else to_device(weights, device)


def _success(sequences: Seq[Sequence], device: torch.device) -> Tensor | None:
    """Success of each token's prompt, [T] float32."""
    known = [sequence.success for sequence in sequences if sequence.success is not None]
    if len(known) < len(sequences):
        return None
    lengths = torch.tensor([sequence.response_length for sequence in sequences])
    return to_device(torch.tensor(known, dtype=torch.float32).repeat_interleave(lengths), device)


def _column(sequences: Seq[Sequence], name: str, device: torch.device) -> Tensor:
    parts = []
    for index, sequence in enumerate(sequences):
        part = getattr(sequence, name)
        if part is None or part.shape != (sequence.response_length,):
            found = "nothing" if part is None else f"shape {tuple(part.shape)}"
            raise ValueError(f"sequence {index}: {name} needs [{sequence.response_length}], got {found}")
        parts.append(part.to(dtype=torch.float32))
    return to_device(torch.cat(parts), device)
