"""One optimizer step: counts, steering, forward and backward of all micro-batches, step, controller, metrics.

    global counts, plan --> steering --> 1F1B over micro-batches --> clip and step, or refuse --> controller advances

What the controller asks for is fixed before the first backward pass and the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_entropic.algorithms import Steering
from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.model.outputs import OutputOptions, TeacherOutput, TokenStatistics
from megatron_entropic.policy.step.alphas import SOLVED_BINS, prompt_alpha_metrics
from megatron_entropic.policy.step.batch_plan import Marks, plan_marks
from megatron_entropic.policy.step.control import EntropyControl, EntropyMeasurement, MicrobatchLocalControl
from megatron_entropic.policy.step.gradient_step import GradientStep
from megatron_entropic.policy.step.loss import (
    SUMS,
    MicrobatchLoss,
    Normalizers,
    count_high_prob,
    global_counts,
    local_normalizers,
)
from megatron_entropic.policy.step.loss_fields import LossSettings, TokenFields, token_fields
from megatron_entropic.policy.step.optimizer import PolicyOptimizer, StepOutcome
from megatron_entropic.policy.step.score import score
from megatron_entropic.policy.step.teacher import TeacherStates
from megatron_entropic.tensor_parallel import TokenLoss
from megatron_entropic.types import Sequence

LOCAL_SUMS = ("alpha", "alpha_unclipped", "integral", "microbatches")
"""Names of what `feedback: microbatch_local` measures besides SUMS."""


class PolicyUpdate:
    """The update step of one rank.

    Args:
        machinery: gradient step of this rank.
        settings: settings of the loss.
        options: temperature of the rollout, of whose softmax(logits / temperature) all statistics are, and the output
            head; `fused_loss` needs a loss that adds up over tokens.
        control: None when the controller is off: then no entropy is computed and the loss is the base loss.
        replay: whether to send tokens to the experts that the sequences carry.
        teacher: chunks of the teacher whose divergence the loss has; None: it has none.
    """

    def __init__(
        self,
        machinery: GradientStep,
        settings: LossSettings,
        options: OutputOptions,
        control: EntropyControl | MicrobatchLocalControl | None,
        *,
        replay: bool = False,
        teacher: torch.nn.ModuleList | None = None,
    ) -> None:
        self._machinery = machinery
        self._settings = settings
        self._options = options
        self._replay = replay
        self._teacher = teacher
        self._replicated = control if isinstance(control, EntropyControl) else None
        self._local = control if isinstance(control, MicrobatchLocalControl) else None

    def step(self, sequences: list[Sequence], optimizer: PolicyOptimizer, *, freshly_scored: bool) -> dict[str, float]:
        """Take one optimizer step.

        Args:
            sequences: this replica's part of the mini-batch, with advantages and old_logprobs, and rollout_logprobs or
                reference_logprobs where the configured loss reads them.
            optimizer: to step.
            freshly_scored: old_logprobs are those of the current weights, so high-probability tokens can be counted
                without another forward pass.

        Returns:
            Metrics, equal on all ranks: loss/policy, loss/entropic, loss/kl, loss/entropy, with a teacher in the loss
            loss/distillation and distillation/kl (mean KL(policy || teacher) of a token, nats), ratio/clip_fraction,
            ratio/mean, grad_norm, learning_rate, optimizer/skipped, response/tokens, entropy/high_prob_fraction,
            entropy/actuated_fraction (pi > tau and A != 0), entropy/nonzero_advantage_fraction, entropy/kept_fraction
            (tokens whose policy loss the controller left in), entropy/negative_weight_fraction (tokens that are pushed
            against their advantage), entropy/weight_max (largest 1 + |alpha| N / N_high), entropy/actuated_solved_1 to
            _5 (actuated_fraction among tokens of prompts of which [0, 20 %) .. [80, 100 %] of the responses are right),
            those of the controller and batch/*.

        Raises:
            ValueError: a sequence lacks what the loss reads, or entropy control has no usable measurement.
            RuntimeError: the controller's replicas differ between ranks.
        """
        for sequence in sequences:
            token_fields([sequence], self._settings, torch.device("cpu"))
        batch = self._machinery.align(sequences, replay=self._replay)
        steering = self._replicated.steering_for_step() if self._replicated else Steering()
        if steering.reads_success and any(sequence.success is None for sequence in sequences):
            raise ValueError("the controller reads how often each prompt was solved, and sequences carry no success")
        tau = self._settings.tau if steering.tau is None else steering.tau
        counts = self._counts(sequences, batch, tau, freshly_scored)
        marks = self._marks(sequences, batch, optimizer)
        bonus = steering.entropy_coefficient != 0.0
        measures = self._local is not None or (self._replicated is not None and self._replicated.measures_updates)
        width = len(SUMS) + (len(LOCAL_SUMS) if self._local else 0)

        def loss_of(micro_batch: MicroBatch) -> MicrobatchLoss:
            return MicrobatchLoss(self._fields(micro_batch, marks), self._settings, counts, steering)

        def token_loss(micro_batch: MicroBatch) -> TokenLoss:
            loss = loss_of(micro_batch)
            return lambda logprobs, entropies, own: loss.of_tokens(logprobs, entropies, micro_batch.places(own))

        def share(micro_batch: MicroBatch, statistics: TokenStatistics) -> tuple[torch.Tensor, torch.Tensor]:
            if self._local:
                return self._local_share(self._fields(micro_batch, marks), statistics, self._local, len(sequences))
            return loss_of(micro_batch).share(statistics.logprobs, statistics.entropies, statistics.divergences)

        options = replace(
            self._options,
            entropy=measures or bonus,
            entropy_gradient=bonus,
            token_loss=token_loss,
            teacher=self._teacher_output(batch, loss_of),
        )
        sums, outcome = self._machinery.run(batch, share, options, optimizer, width=width)
        measured = dict(zip((*SUMS, *LOCAL_SUMS), sums.tolist(), strict=False))
        if self._replicated:
            measurement = EntropyMeasurement(measured["entropy"], measured["tokens"]) if measures else None
            has_advantage = measured["nonzero_advantage"] > 0
            self._replicated.commit(measurement, stepped=outcome.stepped, has_advantage=has_advantage)
        metrics = self._metrics(measured, outcome, optimizer)
        metrics |= self._alpha_metrics(sequences, steering, counts, measured)
        return metrics | self._machinery.batch_metrics(batch)

    def _teacher_output(
        self, batch: list[MicroBatch], loss_of: Callable[[MicroBatch], MicrobatchLoss]
    ) -> TeacherOutput | None:
        """What the last stage needs of the teacher; None on others, and without one. All ranks call it together."""
        if self._teacher is None:
            return None
        states = TeacherStates(self._teacher, batch, self._machinery.parallel)
        if not self._machinery.parallel.is_last_stage:
            return None

        def loss(micro_batch: MicroBatch) -> Callable[[torch.Tensor], torch.Tensor]:
            own = loss_of(micro_batch)
            return lambda divergences: own.of_divergences(divergences, micro_batch.places(slice(None)))

        return TeacherOutput(states.weight, states.of, loss)

    def _fields(self, micro_batch: MicroBatch, marks: Marks | None) -> TokenFields:
        own = None if marks is None else [marks[index] for index in micro_batch.indices]
        return token_fields(micro_batch.sequences, self._settings, self._machinery.device, own)

    def _marks(self, sequences: list[Sequence], batch: list[MicroBatch], optimizer: PolicyOptimizer) -> Marks | None:
        machinery, settings = self._machinery, self._settings
        return plan_marks(
            sequences,
            settings.loss,
            settings.algorithm,
            lambda: score(machinery.model, batch, machinery.parallel, temperature=self._options.temperature),
            machinery.parallel,
            machinery.device,
            optimizer.steps_taken,
        )

    def _counts(
        self, sequences: list[Sequence], batch: list[MicroBatch], tau: float, freshly_scored: bool
    ) -> Normalizers:
        machinery, settings = self._machinery, self._settings
        if not settings.high_prob_denominator or self._local:
            return global_counts(sequences, machinery.parallel, machinery.device)
        if freshly_scored:
            scored = [sequence.old_logprobs for sequence in sequences if sequence.old_logprobs is not None]
            own = float(sum(count_high_prob(logprobs, tau) for logprobs in scored))
            return global_counts(sequences, machinery.parallel, machinery.device, own)
        options = replace(self._options, entropy=False)
        everywhere = machinery.measure(batch, lambda logprobs: count_high_prob(logprobs, tau), options)
        counts = global_counts(sequences, machinery.parallel, machinery.device)
        return Normalizers(counts.tokens, counts.sequences, everywhere)

    def _alpha_metrics(
        self, sequences: list[Sequence], steering: Steering, counts: Normalizers, measured: dict[str, float]
    ) -> dict[str, float]:
        """Metrics of what alpha does to the weights of tokens, and of alpha where prompts have their own."""
        metrics = {
            f"entropy/actuated_solved_{number}": measured[f"actuated_solved_{number}"] / tokens
            for number in range(1, SOLVED_BINS + 1)
            if (tokens := measured[f"tokens_solved_{number}"])
        }
        if not self._replicated or not self._replicated.steers_alpha:
            return metrics
        metrics["entropy/negative_weight_fraction"] = measured["negative_weight"] / measured["tokens"]
        own = {}
        if steering.prompt_alpha:
            own = prompt_alpha_metrics(sequences, steering, self._machinery.parallel, self._machinery.device)
        largest = max(abs(value) for value in (own.values() if own else [steering.alpha]))
        spread = counts.tokens / max(counts.high_prob_tokens, 1.0) if self._settings.high_prob_denominator else 1.0
        change = min(largest * spread, self._settings.weight_limit or math.inf)
        return metrics | own | {"entropy/weight_max": 1.0 + change}

    def _local_share(
        self,
        fields: TokenFields,
        statistics: TokenStatistics,
        control: MicrobatchLocalControl,
        minibatch_sequences: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert statistics.entropies is not None
        alpha = control.alpha(statistics.entropies, fields.lengths.numel(), minibatch_sequences)
        normalizers = local_normalizers(fields, minibatch_sequences, self._machinery.parallel.data_size)
        own_loss = MicrobatchLoss(fields, self._settings, normalizers, Steering(alpha=alpha))
        loss, sums = own_loss.share(statistics.logprobs, statistics.entropies, statistics.divergences)
        own = [alpha, control.controller.alpha_unclipped, control.controller.integral, 1.0]
        return loss, torch.cat([sums, torch.tensor(own, dtype=torch.float64, device=sums.device)])

    def _metrics(
        self, measured: dict[str, float], outcome: StepOutcome, optimizer: PolicyOptimizer
    ) -> dict[str, float]:
        tokens = measured["tokens"]
        metrics = {
            "loss/policy": measured["policy_loss"],
            "loss/entropic": measured["entropic_loss"],
            "loss/kl": measured["kl_loss"],
            "loss/entropy": measured["entropy_loss"],
            "ratio/clip_fraction": measured["clipped"] / tokens,
            "ratio/mean": measured["ratio"] / tokens,
            "entropy/high_prob_fraction": measured["high_prob"] / tokens,
            "entropy/actuated_fraction": measured["actuated"] / tokens,
            "entropy/kept_fraction": measured["kept"] / tokens,
            "entropy/nonzero_advantage_fraction": measured["nonzero_advantage"] / tokens,
            "response/tokens": tokens,
            "grad_norm": outcome.gradient_norm,
            "learning_rate": optimizer.learning_rate,
            "optimizer/skipped": float(not outcome.stepped),
        }
        if self._teacher is not None:
            metrics["loss/distillation"] = measured["distillation_loss"]
            metrics["distillation/kl"] = measured["divergence"] / tokens
        if self._replicated:
            return metrics | self._replicated.metrics()
        if self._local:
            return metrics | _local_metrics(measured, self._local)
        return metrics


def _local_metrics(measured: dict[str, float], control: MicrobatchLocalControl) -> dict[str, float]:
    """Metrics of the control: means over all micro-batches of all replicas, which each had an alpha of their own."""
    controller = control.controller
    mean = {name: measured[name] / measured["microbatches"] for name in LOCAL_SUMS[:3]}
    entropy = measured["entropy"] / measured["tokens"]
    return {
        "entropy/mean": entropy,
        "entropy/target": controller.target,
        "entropy/error": entropy - controller.target,
        "entropy/proportional": controller.kp * (entropy - controller.target),
        "entropy/integral_term": controller.ki * mean["integral"],
        "entropy/alpha": mean["alpha"],
        "entropy/alpha_unclipped": mean["alpha_unclipped"],
        "entropy/integral": mean["integral"],
    }
