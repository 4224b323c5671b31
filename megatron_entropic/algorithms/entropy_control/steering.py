"""What a controller can ask of the loss of one optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Steering:
    """The wishes of a controller; the default wishes nothing, and leaves the loss exactly the base loss.

    L = sum_t w_t k_t l_t  +  alpha * sum_t w'_t a_t  -  c * sum_t w_t H_t        k_t from `kept`
    """

    alpha: float = 0.0
    """Coefficient of EntroPIC's term."""
    entropy_coefficient: float = 0.0
    """c, which needs the entropy's gradient; 0 computes none."""
    samples: Literal["all", "positive", "negative"] = "all"
    """Whose policy loss counts, by the sign of the advantage."""
    drop_positive_above: float | None = None
    """Tokens with A > 0 and at least this current probability have no policy loss; None drops none."""

    @property
    def keeps_all(self) -> bool:
        """Whether every token's policy loss counts."""
        return self.samples == "all" and self.drop_positive_above is None

    def kept(self, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """[T] bool: the tokens whose policy loss counts. The others still count in every denominator.

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
