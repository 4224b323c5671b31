"""Fifty recorded optimizer steps, and what our own trainer makes of them.

`recorded_steps.safetensors` holds, for steps 1 to 50 of a run of `examples/trl/countdown.py` with control, eight
responses each: the policy's logits [8, 6, 19], the sampled tokens, the mask, and the advantages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_entropic.algorithms import find_policy_loss
from megatron_entropic.config.algorithm import AlgorithmConfig, EntropyControlConfig
from megatron_entropic.policy.step import control
from megatron_entropic.policy.step.loss import MicrobatchLoss, Normalizers
from megatron_entropic.policy.step.loss_fields import LossSettings, token_fields
from megatron_entropic.types import Scores, Sequence

SETTINGS: dict[str, Any] = {"target": 0.5, "kp": 2.0, "ki": 0.2, "tau": 0.7}
"""Gains at which alpha is off its limits on most of the steps."""
PROMPT_LENGTH = 2


@dataclass(frozen=True)
class RecordedStep:
    """One optimizer step: 8 responses of at most 6 tokens."""

    logits: Tensor
    """[B, R, V] float32 at the rollout's temperature."""
    tokens: Tensor
    """[B, R] int64."""
    mask: Tensor
    """[B, R] bool; each row is True, then False."""
    advantages: Tensor
    """[B] float32."""

    def statistics(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the tokens and entropies, [B, R] each."""
        logprobs = torch.log_softmax(logits, dim=-1)
        return (
            logprobs.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1),
            -(logprobs.exp() * logprobs).sum(-1),
        )


@dataclass(frozen=True)
class Outcome:
    """What a trainer made of one step."""

    entropy: float
    alpha: float
    gradient: Tensor
    """Of the logits, [B, R, V]."""


def recorded_steps() -> list[RecordedStep]:
    """The steps of the file, in order."""
    columns = load_file(Path(__file__).with_name("recorded_steps.safetensors"))
    return [
        RecordedStep(
            columns["logits"][index].float(),
            columns["tokens"][index].long(),
            columns["mask"][index],
            columns["advantages"][index],
        )
        for index in range(len(columns["logits"]))
    ]


def our_trainer(monkeypatch: pytest.MonkeyPatch, feedback: str) -> list[Outcome]:
    """The recorded steps through our trainer's control and loss, as one replica of the policy."""
    monkeypatch.setattr(control, "verify_equal", lambda *arguments: None)
    section = EntropyControlConfig(**SETTINGS, ratio_clip="ppo")
    device = torch.device("cpu")
    mine = control.EntropyControl(section, feedback, None, device)  # type: ignore[arg-type]
    algorithm = AlgorithmConfig()
    settings = LossSettings(
        algorithm=algorithm,
        loss=find_policy_loss("clipped"),
        max_response_tokens=6,
        correction="none",
        staleness_correction="none",
        correction_level="token",
        correction_cap=2.0,
        tau=section.tau,
        ratio_clip=section.ratio_clip,
        high_prob_denominator=False,
    )
    outcomes = []
    for step in recorded_steps():
        logits = step.logits.clone().requires_grad_()
        logprobs, entropies = step.statistics(logits)
        lengths = step.mask.sum(1).tolist()
        sequences = [
            Sequence(
                tokens=torch.cat([torch.zeros(PROMPT_LENGTH, dtype=torch.int64), step.tokens[row, :length]]),
                prompt_length=PROMPT_LENGTH,
                advantages=step.advantages[row].expand(length).clone(),
                old_logprobs=logprobs[row, :length].detach(),
            )
            for row, length in enumerate(lengths)
        ]
        scores = Scores(
            [sequence.old_logprobs for sequence in sequences],  # type: ignore[misc]
            [entropies[row, :length].detach() for row, length in enumerate(lengths)],
        )
        sums = control.measured_entropy(sequences, scores, feedback, 2.0).tolist()
        mine.scored(control.EntropyMeasurement(*sums))
        steering = mine.steering_for_step()
        counts = Normalizers(tokens=sum(lengths), sequences=len(lengths))
        loss = MicrobatchLoss(token_fields(sequences, settings, device), settings, counts, steering)
        loss.share(logprobs[step.mask], None)[0].backward()
        measurement = control.EntropyMeasurement(*sums) if mine.measures_updates else None
        mine.commit(measurement, stepped=True, has_advantage=bool(step.advantages.ne(0).any()))
        assert logits.grad is not None
        outcomes.append(Outcome(mine.controller.entropy, steering.alpha, logits.grad))
    return outcomes


def assert_same(name: str, theirs: list[Outcome], ours: list[Outcome], *, first: int = 0) -> None:
    """Hold H, alpha and gradients of two trainers against each other; `first` is the first step that both steer."""
    assert len(theirs) == len(ours) == 50
    pairs = list(zip(theirs, ours, strict=True))[first:]
    worst = {
        "H": max(abs(a.entropy - b.entropy) for a, b in pairs),
        "alpha": max(abs(a.alpha - b.alpha) for a, b in pairs),
        "gradient": max(float((a.gradient - b.gradient).abs().max()) for a, b in pairs),
    }
    largest = max(float(b.gradient.abs().max()) for _, b in pairs)
    # Shown by pytest -rP: the figures of docs/plugins.
    import sys

    sys.stdout.write(f"{name}: largest differences over {len(pairs)} steps {worst}, largest gradient {largest:.3g}\n")
    chosen = [f"{number}: {theirs[number - 1].alpha:.7f}" for number in (1, 2, 5, 10, 20, 30, 40, 50)]
    sys.stdout.write(f"{name}: alpha of step {', '.join(chosen)}\n")
    assert len({round(b.alpha, 4) for _, b in pairs}) > 30, "the recording exercises the controller"
    assert worst["H"] < 1e-6
    assert worst["alpha"] < 1e-5
    assert worst["gradient"] < 1e-5 * largest
