"""Rivals that adapt one number to entropy: a rescaled advantage, an upper clip, a bonus or a focus by difficulty.

Formulas are as far as they could be read; what had to be filled in is said at each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.controller import Controller, Setpoint
from megatron_entropic.algorithms.entropy_control.steering import Focus, Steering

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig


class RepoR(Controller):
    """REPO-R: advantages are rescaled by the log-probability of their token (arXiv 2603.11682, appendix D.2).

        A > 0:  A max(0, 1 - zeta log pi)      rare right tokens count more, for zeta > 0
        A < 0:  A max(0, 1 + zeta log pi)      rare wrong ones less
        |zeta| doubles while it does too little and halves while it does too much, and changes its sign at its least

    log pi stands for the paper's centred log-probability, as in the implementation that others use (SkyRL). Where
    zeta is adapted and how far is read from its description, not from the paper.

    Args:
        target: set point, nats.
        zeta: first value, positive.
        bounds: least and largest |zeta|.
    """

    kind = "repo_r"
    state_names = ("zeta",)

    def __init__(self, target: float | Setpoint, zeta: float, bounds: tuple[float, float]) -> None:
        super().__init__(target)
        self.zeta = zeta
        self._least, self._largest = bounds

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> RepoR:
        return cls(target, config.rivals.repo_zeta, config.rivals.repo_bounds)

    def _steer(self) -> Steering:
        return Steering(logprob_scale=self.zeta)

    def _advance(self, *, has_advantage: bool) -> None:
        wanted = 1.0 if self.error < 0 else -1.0
        if self.zeta * wanted > 0:
            self.zeta = wanted * min(2.0 * abs(self.zeta), self._largest)
        else:
            smaller = 0.5 * abs(self.zeta)
            self.zeta = -wanted * smaller if smaller >= self._least else wanted * self._least

    def metrics(self) -> dict[str, float]:
        """Metrics of the base class and zeta."""
        return super().metrics() | {"entropy/zeta": self.zeta}


class Adapo(Controller):
    """ADAPO: the upper clip rises while entropy is below its target, else it falls (arXiv 2603.11682).

        eps_high <- clip(factor eps_high, low, high) while H < target, else clip(eps_high / factor, low, high)

    A wider upper clip lets rare right tokens grow, DAPO's clip-higher. With one optimizer step a rollout every ratio is
    1 and nothing is clipped. The paper's abstract gives the idea; the step is a factor here.

    Args:
        target: set point, nats.
        clip: first eps_high.
        bounds: least and largest eps_high.
        factor: change of an optimizer step, > 1.
    """

    kind = "adapo"
    state_names = ("clip",)

    def __init__(self, target: float | Setpoint, clip: float, bounds: tuple[float, float], factor: float) -> None:
        super().__init__(target)
        self.clip = clip
        self._bounds, self._factor = bounds, factor

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Adapo:
        rivals = config.rivals
        return cls(target, rivals.adapo_clip, rivals.adapo_bounds, rivals.adapo_factor)

    def _steer(self) -> Steering:
        return Steering(clip_high=self.clip)

    def _advance(self, *, has_advantage: bool) -> None:
        changed = self.clip * self._factor if self.error < 0 else self.clip / self._factor
        self.clip = min(max(changed, self._bounds[0]), self._bounds[1])

    def metrics(self) -> dict[str, float]:
        """Metrics of the base class and the clip."""
        return super().metrics() | {"entropy/clip_high": self.clip}


class Aer(Controller):
    """AER: an entropy bonus of difficult prompts, whose size follows the error (arXiv 2510.10959).

        L -= c sum over tokens of max(0, 1 - s / rho) H          s: share of the prompt's right responses
        c <- clip(c + eta (target - H), 0, limit)                the target a fraction of the first entropy: 0.4x

    The three parts are the paper's; how the coefficient falls between s = 0 and rho is filled in here.

    Args:
        target: set point, nats.
        rho: share of right responses from which on a prompt has no bonus.
        eta: change of c per nat and optimizer step.
        limit: largest c.
    """

    kind = "aer"
    state_names = ("coefficient",)

    def __init__(self, target: float | Setpoint, rho: float, eta: float, limit: float) -> None:
        super().__init__(target)
        self._rho, self._eta, self._limit = rho, eta, limit
        self.coefficient = 0.0

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Aer:
        rivals = config.rivals
        return cls(target, rivals.aer_rho, rivals.aer_eta, rivals.aer_limit)

    def _steer(self) -> Steering:
        return Steering(entropy_coefficient=self.coefficient, bonus_threshold=self._rho)

    def _advance(self, *, has_advantage: bool) -> None:
        self.coefficient = min(max(self.coefficient - self._eta * self.error, 0.0), self._limit)


class Fade(Controller):
    """FADE: balance and hard prompts while entropy is high, suppression and medium ones as it falls (arXiv 2607.01490).

        e = min(H / first H, 1), and the weights of `Focus`

    The two axes, their directions and that the schedule reads entropy are the paper's; no formula of it could be read,
    so this one is ours and says nothing about the published method's scores.

    Args:
        target: only for the log.
        suppression: share by which wrong responses count more, and right ones less, once entropy is gone.
    """

    kind = "fade"

    def __init__(self, target: float | Setpoint, suppression: float) -> None:
        super().__init__(target)
        self._suppression = suppression

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Fade:
        return cls(target, config.rivals.fade_suppression)

    def _steer(self) -> Steering:
        explore = min(self.entropy / self.initial_entropy, 1.0) if self.initial_entropy > 0 else 0.0
        return Steering(focus=Focus(explore, self._suppression))

    def metrics(self) -> dict[str, float]:
        """Metrics of the base class and e."""
        return super().metrics() | {"entropy/explore": self.steering.focus.explore if self.steering.focus else 1.0}
