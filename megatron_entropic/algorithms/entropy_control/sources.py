"""Sources of alpha beside P and PI: by the success of each prompt, and a threshold that moves instead of alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.controller import Controller, Setpoint
from megatron_entropic.algorithms.entropy_control.steering import PromptAlpha, Steering

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig


class Unsolved(Controller):
    """An alpha of each prompt that raises entropy where its responses fail, and retires as the prompt is solved.

        alpha_i = -min(limit, gain (1 - s_i))          s_i: share of the prompt's responses that are right

    Certainty is unearned where a prompt is unsolved and wanted where it is solved, and s_i is known exactly. Entropy is
    not looked at, which is what `entropy_control.guard` is for.

    Args:
        target: only for the log.
        gain: by how much alpha falls with the share of wrong responses.
        limit: largest |alpha|.
    """

    kind = "unsolved"

    def __init__(self, target: float | Setpoint, gain: float, limit: float) -> None:
        super().__init__(target)
        self._prompt_alpha = PromptAlpha(gain=gain, limit=limit, low=-limit, high=0.0)

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Unsolved:
        limit = config.rivals.unsolved_limit
        if limit is None:
            limit = 1.0 if config.denominator == "all_tokens" else 1.5
        return cls(target, config.rivals.unsolved_gain, limit)

    def _steer(self) -> Steering:
        return Steering(prompt_alpha=self._prompt_alpha)


class Cascade(Controller):
    """PI on tau: alpha is fixed and negative, so every token above tau is pushed towards it; the outer loop moves tau.

        tau = clip(tau_0 + K_p e / H_first + K_i sum(e) / H_first, low, high)

    A higher tau leaves more tokens alone and lets entropy fall, so the sign is that of the error. Alpha never
    saturates; where tau does, the sum stands still.

    Args:
        target: set point, nats.
        alpha: the fixed coefficient, negative.
        tau: tau_0.
        gains: (K_p, K_i), per relative error.
        bounds: (low, high) of tau.
    """

    kind = "cascade"
    state_names = ("acc", "tau")

    def __init__(
        self,
        target: float | Setpoint,
        *,
        alpha: float,
        tau: float,
        gains: tuple[float, float],
        bounds: tuple[float, float],
    ) -> None:
        super().__init__(target)
        self._alpha, self._centre, self._gains, self._bounds = alpha, tau, gains, bounds
        self.acc = 0.0
        self.tau = tau
        self._wanted = tau

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Cascade:
        rivals = config.rivals
        gains = rivals.cascade_kp, rivals.cascade_ki
        return cls(target, alpha=rivals.cascade_alpha, tau=config.tau, gains=gains, bounds=rivals.cascade_tau)

    def _steer(self) -> Steering:
        kp, ki = self._gains
        first = self.initial_entropy or 1.0
        self._wanted = self._centre + (kp * self.error + ki * self.acc) / first
        self.tau = min(max(self._wanted, self._bounds[0]), self._bounds[1])
        return Steering(alpha=self._alpha, tau=self.tau)

    def _advance(self, *, has_advantage: bool) -> None:
        saturated = self._wanted != self.tau and (self._wanted - self.tau) * self.error > 0
        if has_advantage and not saturated:
            self.acc += self.error

    def metrics(self) -> dict[str, float]:
        """Metrics of the base class and the threshold."""
        return super().metrics() | {"entropy/tau": self.tau, "entropy/integral": self.acc}
