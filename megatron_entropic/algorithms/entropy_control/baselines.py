"""Other ways to act on entropy, behind the same interface as EntroPIC's controller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.controller import Controller, Schedule, Setpoint
from megatron_entropic.algorithms.entropy_control.steering import Steering

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig


class ConstantAlpha(Controller):
    """EntroPIC's term with an alpha that never changes: what is left of the method without feedback.

    Args:
        target: only for the log.
        alpha: in [-1, 1].
    """

    kind = "constant"

    def __init__(self, target: float | Setpoint, alpha: float) -> None:
        super().__init__(target)
        self._alpha = alpha

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> ConstantAlpha:
        return cls(target, config.rivals.alpha)

    def _steer(self) -> Steering:
        return Steering(alpha=self._alpha)


class EntropyBonus(Controller):
    """L -= c * H with a constant c, as in PPO (arXiv 1707.06347, eq. 9).

    Args:
        target: only for the log.
        coefficient: c; negative values press entropy down.
    """

    kind = "entropy_bonus"

    def __init__(self, target: float | Setpoint, coefficient: float) -> None:
        super().__init__(target)
        self._coefficient = coefficient

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> EntropyBonus:
        return cls(target, config.rivals.bonus)

    def _steer(self) -> Steering:
        return Steering(entropy_coefficient=self._coefficient)


class AdaptiveEntropyCoefficient(Controller):
    """AEC (Skywork-OR1, arXiv 2505.22312): the coefficient rises by a fixed step while H < target, else it falls.

        c <- clip(c +- step, 0, limit)        + where H < target
        L -= c * 1[H < target] * H

    Args:
        target: below it the bonus acts, nats.
        step: change of c each optimizer step.
        limit: largest c.
    """

    kind = "aec"
    state_names = ("coefficient",)

    def __init__(self, target: float | Setpoint, step: float, limit: float) -> None:
        super().__init__(target)
        self._change = step
        self._limit = limit
        self.coefficient = 0.0

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> AdaptiveEntropyCoefficient:
        return cls(target, config.rivals.aec_step, config.rivals.aec_limit)

    def _steer(self) -> Steering:
        return Steering(entropy_coefficient=self.coefficient if self.error < 0 else 0.0)

    def _advance(self, *, has_advantage: bool) -> None:
        change = self._change if self.error < 0 else -self._change
        self.coefficient = min(max(self.coefficient + change, 0.0), self._limit)


class Entrocraft(Controller):
    """Samples of one sign only while entropy is outside a band (lblaoke/entrocraft, arXiv 2604.26326).

    Above the upper bound only positive samples count, whose gradient lowers entropy; below the lower bound only
    negative ones. Dropped samples stay in the denominators here; the published code samples replacements.

    Args:
        target: only for the log.
        upper, lower: the bounds, nats.
    """

    kind = "entrocraft"

    def __init__(self, target: float | Setpoint, upper: Schedule, lower: Schedule) -> None:
        super().__init__(target)
        self._upper = upper
        self._lower = lower

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Entrocraft:
        steps = config.rivals.entrocraft_steps
        bounds = (config.rivals.entrocraft_upper, config.rivals.entrocraft_lower)
        return cls(target, *(Schedule(first, last, "linear", steps) for first, last in bounds))

    def _steer(self) -> Steering:
        if self.entropy > self._upper.at(self.step):
            return Steering(samples="positive")
        if self.entropy < self._lower.at(self.step):
            return Steering(samples="negative")
        return Steering()


class Dmmpt(Controller):
    """DMMPT: while H < target, positive tokens that are almost certain already are dropped from the policy loss.

    Source: dynamic masking of well-mastered positive tokens, UloRL, arXiv 2507.19766.

    Args:
        target: below it tokens are dropped, nats.
        probability: tokens with A > 0 and at least this current probability are dropped.
    """

    kind = "dmmpt"

    def __init__(self, target: float | Setpoint, probability: float) -> None:
        super().__init__(target)
        self._probability = probability

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Dmmpt:
        return cls(target, config.rivals.dmmpt_probability)

    def _steer(self) -> Steering:
        return Steering(drop_positive_above=self._probability if self.error < 0 else None)


# A known alpha for a while, so that `megatron-entropic tune` can tell what alpha does from what learning does.


class Probe(Controller):
    """A square wave of alpha, whatever the entropy: a run identified in open loop.

        alpha = centre - amplitude      in the first `half_period` optimizer steps, which raises entropy
        alpha = centre + amplitude      in the next, and so on in turn

    Since alpha does not answer to entropy, neither measurement noise nor chance in the updates gets into it, and least
    squares over the run is not biased by them.

    Args:
        target: only for the log.
        centre: mean of alpha.
        amplitude: how far alpha goes to either side.
        half_period: optimizer steps on one side.
    """

    kind = "probe"

    def __init__(self, target: float | Setpoint, centre: float, amplitude: float, half_period: int) -> None:
        super().__init__(target)
        self._centre = centre
        self._amplitude = amplitude
        self._half_period = half_period

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Probe:
        rivals = config.rivals
        return cls(target, rivals.alpha, rivals.probe_amplitude, rivals.probe_half_period)

    def _steer(self) -> Steering:
        side = 1.0 if self.step // self._half_period % 2 else -1.0
        return Steering(alpha=self._centre + side * self._amplitude)
