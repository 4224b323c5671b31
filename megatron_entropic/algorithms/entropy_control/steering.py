"""What a controller can ask of the loss of one optimizer step, for all tokens or for each prompt by its success."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PromptAlpha:
    """An alpha of each prompt, by the share s of its responses that are right, on top of the step's own alpha.

    alpha_i = clip(alpha - min(limit, gain (1 - s_i)), low, high)
    """

    gain: float
    limit: float
    """Largest part of alpha that a prompt's failures give."""
    low: float
    high: float

    def at(self, alpha: float, success: Tensor) -> Tensor:
        """Alphas in the shape of `success`, shares in [0, 1]; `alpha` is the step's own."""
        unsolved = (self.gain * (1.0 - success)).clamp(max=self.limit)
        return (alpha - unsolved).clamp(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Focus:
    """Weights of the policy loss by the sign of A and the success s of the prompt, e from 1 (explore) to 0 (exploit).

    focus      e (1 - s) + (1 - e) 4 s (1 - s)          hard prompts, then those that are solved half of the time
    A > 0      focus (1 - suppression (1 - e))          balance, then suppression of what fails
    A < 0      focus (1 + suppression (1 - e))
    """

    explore: float
    suppression: float

    def at(self, success: Tensor, advantages: Tensor) -> Tensor:
        """Weights in the shape of `success`."""
        hard, medium = 1.0 - success, 4.0 * success * (1.0 - success)
        focus = self.explore * hard + (1.0 - self.explore) * medium
        return focus * (1.0 - self.suppression * (1.0 - self.explore) * advantages.sign())


@dataclass(frozen=True, slots=True)
class Steering:
    """Wishes of a controller for one optimizer step; the default wishes nothing, and leaves exactly the base loss.

    L = sum_t w_t k_t f_t l_t  +  sum_t alpha_t w'_t a_t  -  c * sum_t w_t h_t H_t

    k_t from `kept`, f_t from `focus`, h_t from `bonus_factors`; l_t sees `rescaled` advantages and `clip_high`.
    """

    alpha: float = 0.0
    """Coefficient of EntroPIC's term, of every token unless `prompt_alpha` says otherwise."""
    entropy_coefficient: float = 0.0
    """Coefficient c of the entropy, which needs the entropy's gradient; 0 computes none."""
    samples: Literal["all", "positive", "negative"] = "all"
    """Sign of the advantage of the samples whose policy loss counts."""
    drop_positive_above: float | None = None
    """Current probability from which on tokens with A > 0 have no policy loss; None drops none."""
    prompt_alpha: PromptAlpha | None = None
    """Alpha of each prompt; None: all prompts have the same."""
    tau: float | None = None
    """Probability above which EntroPIC's term acts; None: `entropy_control.tau`."""

    bonus_threshold: float | None = None
    """Share of right responses of a prompt from which on its tokens have no entropy bonus; None: all have it."""
    logprob_scale: float = 0.0
    """REPO-R's zeta: how far advantages are rescaled by the log-probability of their token."""
    clip_high: float | None = None
    """Upper clip of the policy loss; None: `algorithm.clip_high`."""
    focus: Focus | None = None
    """Weights of the policy loss by sign and success; None: 1."""

    @property
    def reads_success(self) -> bool:
        """Whether sequences must carry their prompt's success."""
        return not (self.prompt_alpha is None and self.bonus_threshold is None and self.focus is None)

    @property
    def has_term(self) -> bool:
        """Whether EntroPIC's term is in the loss."""
        return self.alpha != 0.0 or self.prompt_alpha is not None

    @property
    def keeps_all(self) -> bool:
        """Whether every token's policy loss counts."""
        return self.samples == "all" and self.drop_positive_above is None

    def alphas(self, success: Tensor) -> Tensor:
        """Alpha of each token, in the shape of `success`, the shares of right responses of their prompts."""
        if self.prompt_alpha is None:
            return torch.full_like(success, self.alpha)
        return self.prompt_alpha.at(self.alpha, success)

    def kept(self, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Mask of the tokens whose policy loss counts, [T] bool. The others still count in every denominator.

        Args:
            logprobs: [T] under the current weights; read as constants.
            advantages: [T].
        """
        keep = torch.ones_like(advantages, dtype=torch.bool)
        if self.samples != "all":
            keep = advantages > 0 if self.samples == "positive" else advantages < 0
        if self.drop_positive_above is not None:
            confident = logprobs.detach() >= math.log(self.drop_positive_above)
            keep = keep & ~(confident & (advantages > 0))
        return keep

    def rescaled(self, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Advantages [T] as REPO-R has them, A (1 - zeta log pi) for A > 0 and A (1 + zeta log pi) for A < 0.

        Neither changes its sign: what would is 0.

        Args:
            logprobs: [T] under the current weights; read as constants.
            advantages: [T].
        """
        factor = 1.0 - self.logprob_scale * advantages.sign() * logprobs.detach()
        return advantages * factor.clamp(min=0.0)

    def bonus_factors(self, success: Tensor) -> Tensor:
        """Factors of the tokens' entropy bonus, in the shape of `success`: from 1 at 0 down to 0 at the threshold."""
        if self.bonus_threshold is None:
            return torch.ones_like(success)
        return (1.0 - success / self.bonus_threshold).clamp(min=0.0)
