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
class Steering:
    """Wishes of a controller for one optimizer step; the default wishes nothing, and leaves exactly the base loss.

    L = sum_t w_t k_t l_t  +  sum_t alpha_t w'_t a_t  -  c * sum_t w_t H_t        k_t from `kept`
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
