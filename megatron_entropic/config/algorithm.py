"""The sections of the configuration that say what is learned: advantages, losses, entropy control."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from megatron_entropic.config.base import Count, Section, off_is_a_word
from megatron_entropic.config.names import ADVANTAGES, CONTROLLERS, GUARDS, OFF, POLICY_LOSSES, controller_entry

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def _nats_or_multiple(value: float | str) -> float | str:
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?x", value):
        raise ValueError(f"expected nats, or a multiple of the first measured entropy such as 0.7x, not {value!r}")
    if isinstance(value, float) and not value >= 0:
        raise ValueError(f"expected nats >= 0, not {value:g}")
    return value


Entropy = Annotated[float | str, AfterValidator(_nats_or_multiple)]
"""Nats per token, or a multiple of the first measured entropy such as `0.7x`."""


class KlConfig(Section):
    """KL penalty in the loss against a frozen reference."""

    coefficient: float = Field(0.0, ge=0)
    estimator: Literal["k1", "k2", "k3"] = "k3"
    reference_hf_dir: Path | None = Field(None, description="None: the model the run started from.")


FrozenName = Literal["reference", "teacher"]
"""What a frozen model beside the policy is for: the KL penalty, or distillation."""


FROZEN_KEYS: dict[FrozenName, str] = {
    "reference": "algorithm.kl.reference_hf_dir",
    "teacher": "algorithm.distillation.teacher_hf_dir",
}
"""Key that names each frozen model's directory."""


class DistillationConfig(Section):
    """On-policy distillation: a frozen teacher judges every token of the policy's own responses."""

    teacher_hf_dir: Path | None = Field(
        None,
        description="Hugging Face directory of the teacher: the policy's token ids, any shape that the policy's layout "
        "divides. null: no distillation.",
    )
    term: Literal["advantage", "loss"] = Field(
        "advantage",
        description="advantage: log pi_teacher - log pi of each sampled token is added to its advantage. loss: "
        "KL(pi || pi_teacher) over the whole vocabulary is added to the loss, with gradient.",
    )
    coefficient: float = Field(1.0, gt=0, description="Weight of the teacher's term.")
    reward_weight: float = Field(1.0, ge=0, description="Weight of the rewards' advantages. 0: the teacher alone.")

    @property
    def as_advantage(self) -> bool:
        """Whether there is a teacher whose log-probs become advantages."""
        return self.teacher_hf_dir is not None and self.term == "advantage"

    @property
    def as_loss(self) -> bool:
        """Whether there is a teacher whose divergence is part of the loss."""
        return self.teacher_hf_dir is not None and self.term == "loss"


class LossOptionsConfig(Section):
    """Numbers that single policy losses read; see docs/algorithm.md."""

    ce_gppo_beta_low: float = Field(
        0.75, ge=0, description="Weight of clipped tokens with A < 0. Published recipes: 0.75 (7B), 0.5 (1.5B)."
    )
    ce_gppo_beta_high: float = Field(1.0, ge=0, description="Weight of clipped tokens with A > 0.")
    steer_weight_min: float = Field(0.8, ge=0, description="Of the token that would change entropy most.")
    steer_weight_max: float = Field(1.2, ge=0, description="Of the token that would change entropy least.")
    covariance_fraction: float = Field(
        2e-4, gt=0, le=1, description="Share of all tokens that clip_cov and kl_cov treat, at least one token."
    )
    clip_cov_low: float = Field(1.0, description="clip_cov draws from tokens whose covariance lies between these two.")
    clip_cov_high: float = 5.0
    kl_cov_coefficient: float = Field(1.0, ge=0, description="Of |log pi - log pi_old| on kl_cov's tokens.")


class AlgorithmConfig(Section):
    """Advantages, policy loss, aggregation."""

    advantage: str = Field("grpo", description=f"{', '.join(ADVANTAGES)}.")
    policy_loss: str = Field(
        "clipped",
        description=f"{', '.join(POLICY_LOSSES)}, or module:function.",
    )
    loss_options: LossOptionsConfig = LossOptionsConfig()
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(
        3.0, gt=1, description="Lower bound c of the dual clip for A < 0; null switches it off."
    )
    aggregation: Aggregation = "token-mean"
    optimizer_steps_per_rollout: Count = Field(1, ge=1, description="Mini-batches into which a rollout is split.")
    epochs_per_rollout: Count = Field(1, ge=1, description="How often each rollout is used, in a new order each time.")
    proximal_logprobs: Literal["score_pass", "each_epoch"] = Field(
        "score_pass",
        description="Which policy the ratio compares with: the one before the first update of a rollout, or "
        "(decoupled PPO, with rollout.importance_correction) the one before each epoch, scored anew.",
    )
    kl: KlConfig = KlConfig()
    distillation: DistillationConfig = DistillationConfig()

    @property
    def frozen_dirs(self) -> dict[FrozenName, Path | None]:
        """Directories of the frozen models that are held beside the policy; None: the model the run started from."""
        found: dict[FrozenName, Path | None] = {}
        if self.kl.coefficient > 0:
            found["reference"] = self.kl.reference_hf_dir
        if self.distillation.teacher_hf_dir is not None:
            found["teacher"] = self.distillation.teacher_hf_dir
        return found

    @property
    def updates_per_rollout(self) -> int:
        """Number of optimizer steps of one rollout, over all its epochs."""
        return self.optimizer_steps_per_rollout * self.epochs_per_rollout


class TargetScheduleConfig(Section):
    """How entropy_control.target moves, in optimizer steps."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    end: Entropy = Field(0.1, description="Reached after `steps`: nats, or a multiple of the first measured entropy.")
    steps: Count = Field(1000, ge=1)


class GainScheduleConfig(Section):
    """A factor on K_p and K_i that moves from 1, in optimizer steps."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    end: float = Field(1.0, ge=0, description="The factor after `steps`.")
    steps: Count = Field(1000, ge=1)


class RivalsConfig(Section):
    """Numbers that controllers other than p and pi read; see docs/algorithm.md."""

    alpha: float = Field(0.0, ge=-1, le=1, description="constant: the alpha that never changes; probe: its mean.")
    probe_amplitude: float = Field(0.7, gt=0, le=1, description="probe: how far alpha goes to either side of `alpha`.")
    probe_half_period: Count = Field(10, ge=1, description="probe: optimizer steps on one side.")
    unsolved_gain: float = Field(
        2.0, ge=0, description="unsolved: alpha of a prompt is -min(limit, gain x wrong share)."
    )
    unsolved_limit: float | None = Field(
        None, gt=0, description="unsolved: largest |alpha|; null: 1 with denominator all_tokens, else 1.5."
    )
    cascade_alpha: float = Field(-1.0, ge=-1, lt=0, description="cascade: the alpha that never changes.")
    cascade_kp: float = Field(0.5, ge=0, description="cascade: K_p of tau, per relative error (H - target) / first H.")
    cascade_ki: float = Field(0.01, ge=0, description="cascade: K_i of tau, per relative error and optimizer step.")
    cascade_tau: tuple[float, float] = Field((0.5, 0.98), description="cascade: bounds of tau, which begins at `tau`.")
    bonus: float = Field(0.001, description="entropy_bonus: coefficient c of -c H in the loss.")
    aec_step: float = Field(1e-4, ge=0, description="aec: how far the coefficient moves each optimizer step.")
    aec_limit: float = Field(0.005, ge=0, description="aec: largest coefficient.")
    entrocraft_upper: tuple[float, float] = Field(
        (0.7, 0.5), description="entrocraft: entropy above which only positive samples count, at first and at last."
    )
    entrocraft_lower: tuple[float, float] = Field(
        (0.6, 0.4), description="entrocraft: entropy below which only negative samples count, at first and at last."
    )
    entrocraft_steps: Count = Field(1000, ge=1, description="entrocraft: optimizer steps of the linear anneal.")
    dmmpt_probability: float = Field(
        0.99, gt=0, le=1, description="dmmpt: positive tokens at least this likely are dropped while H < target."
    )
    repo_zeta: float = Field(0.01, gt=0, description="repo_r: first zeta.")
    repo_bounds: tuple[float, float] = Field((1e-4, 1.0), description="repo_r: least and largest |zeta|.")
    adapo_clip: float = Field(0.2, gt=0, description="adapo: first upper clip.")
    adapo_bounds: tuple[float, float] = Field((0.1, 1.0), description="adapo: least and largest upper clip.")
    adapo_factor: float = Field(1.1, gt=1, description="adapo: change of the upper clip an optimizer step.")
    aer_rho: float = Field(
        0.6, gt=0, le=1, description="aer: share of right responses from which on there is no bonus."
    )
    aer_eta: float = Field(0.01, ge=0, description="aer: change of the coefficient per nat and optimizer step.")
    aer_limit: float = Field(0.05, ge=0, description="aer: largest coefficient.")
    fade_suppression: float = Field(
        0.5, ge=0, le=1, description="fade: by how much wrong responses count more, and right ones less, at H = 0."
    )


class GuardsConfig(Section):
    """Numbers of entropy_control.guard and reanchor; x is the smoothed H as a multiple of the first steps' H."""

    top: float | None = Field(
        None,
        gt=0,
        description="x above which alpha is raised. null: 1.12 for a ceiling, 1 for one over unsolved, 1.2 for a band.",
    )
    bottom: float | None = Field(None, ge=0, description="x below which a band lowers alpha. null: 0.4.")
    gain: float | None = Field(
        None, ge=0, description="Of alpha per unit of x outside. null: 10 for a ceiling, else 8."
    )
    integral_gain: float | None = Field(
        None, ge=0, description="The same per optimizer step. null: 0.5 for a ceiling, else 0."
    )
    jump: float = Field(
        0.35,
        gt=0,
        description="A change of H between two measurements beyond this share of the anchor is put down to the data, "
        "and the anchor moves with it. Raise it where single steps move entropy that far.",
    )


class EntropyControlConfig(Section):
    """EntroPIC (arXiv 2511.15248): alpha = clip(K_p e + K_i sum(e), -1, 1), e = H - target; and its rivals."""

    controller: Annotated[str, BeforeValidator(off_is_a_word)] = Field(
        "pi", description=f"{OFF}, {', '.join(CONTROLLERS)}, or module:Class."
    )
    options: dict[str, float] = Field({}, description="Name: number, for a controller given as module:Class to read.")
    target: Entropy = Field(
        0.1,
        description="Token-mean entropy of softmax(logits / rollout.temperature): nats, or a multiple of the first "
        "measured entropy, such as 0.7x.",
    )
    target_schedule: TargetScheduleConfig = TargetScheduleConfig()
    kp: float = Field(1.0, ge=0, description="K_p, per nat.")
    ki: float = Field(0.01, ge=0, description="K_i, per nat and optimizer step; unused by controller p.")
    gain_schedule: GainScheduleConfig = GainScheduleConfig()
    tau: float = Field(0.95, ge=0, lt=1, description="A token is high-probability if its current probability > tau.")
    denominator: Literal["all_tokens", "high_prob_tokens"] = "all_tokens"
    ratio_clip: Literal["none", "ppo"] = "none"
    feedback: Literal["auto", "score_pass", "previous_step", "sampling", "microbatch_local"] = Field(
        "auto",
        description="Where H comes from. auto: score_pass with one optimizer step a scoring pass, else previous_step. "
        "sampling: minus the mean log-prob of the tokens as they were sampled, which with rollout.lag is old news. "
        "microbatch_local reproduces the published code: alpha per rank and micro-batch, nothing reduced.",
    )
    measure: Literal["tokens", "responses", "first_turn"] = Field(
        "tokens",
        description="What H is a mean of. tokens: all that the policy wrote. responses: the means of responses, so "
        "that long ones count as much as short ones. first_turn: what it wrote before an environment's first reply.",
    )
    anti_windup: Literal["conditional", "clamp", "none"] = Field(
        "conditional",
        description="conditional: the integral stands still while alpha is saturated in the direction of e. "
        "clamp: |K_i sum(e)| stays within alpha's limit of 1.",
    )
    start: Literal["immediately", "integral_at_crossing", "at_crossing"] = Field(
        "immediately",
        description="at_crossing: alpha is initial_alpha until H first crosses its target. integral_at_crossing: "
        "only the integral waits for it.",
    )
    integral_limit: float | None = Field(None, gt=0, description="Limit of |sum of errors|, in nats.")
    integral_leak: float = Field(0.0, ge=0, lt=1, description="Fraction of the integral forgotten per optimizer step.")
    dead_band: float = Field(0.0, ge=0, description="Errors smaller than this count as 0, in nats.")
    initial_alpha: float = Field(
        0.0, ge=-1, le=1, description="pi: where the integral's part of alpha begins, such as the b / g of `tune`."
    )
    guard: Annotated[str, BeforeValidator(off_is_a_word)] = Field(
        OFF,
        description=f"Override of alpha where entropy leaves what the run began with: {OFF}, {', '.join(GUARDS)}, or "
        "module:Class.",
    )
    guards: GuardsConfig = GuardsConfig()
    reanchor: Annotated[Literal["off", "detected", "measured"], BeforeValidator(off_is_a_word)] = Field(
        "off",
        description="detected: a target such as 0.7x follows jumps of the data, a multiple of the first entropy as it "
        "would have been on the new data. measured: the same, and what the update itself did is measured, by one more "
        "forward pass a step.",
    )
    weight_limit: float | None = Field(
        None,
        gt=0,
        description="Bound of a token's |alpha| N / N_high, by which its weight differs from 1; 1 keeps weights from "
        "becoming negative with denominator high_prob_tokens. null: none.",
    )
    rivals: RivalsConfig = RivalsConfig()

    @property
    def enabled(self) -> bool:
        """Whether anything is controlled at all."""
        return self.controller != OFF

    @property
    def steers_alpha(self) -> bool:
        """Whether the loss may have EntroPIC's term."""
        return controller_entry(self.controller).steers_alpha

    @property
    def guard_numbers(self) -> tuple[float, float, float, float]:
        """Numbers of the guard: top, bottom, gain, integral gain; those of a band for one of somebody's own."""
        own, entry = self.guards, GUARDS.get(self.guard, GUARDS["band"])
        # Unsolved prompts raise entropy by as much as they are unsolved, so the tighter ceiling costs less there.
        top = 1.0 if (self.guard, self.controller) == ("ceiling", "unsolved") else entry.top
        return (
            top if own.top is None else own.top,
            entry.bottom if own.bottom is None else own.bottom,
            entry.gain if own.gain is None else own.gain,
            entry.integral_gain if own.integral_gain is None else own.integral_gain,
        )

    @property
    def fixed_target(self) -> float | None:
        """The target in nats where it is known before the run and never moves."""
        fixed = self.target_schedule.kind == "constant" and isinstance(self.target, float)
        return float(self.target) if fixed else None
