"""EntroPIC's law (arXiv 2511.15248), one alpha per optimizer step:

    e     = H - H_target                                    nats
    alpha = clip(K_p * e + K_i * sum of earlier e, -1, 1)

Too much entropy gives alpha > 0: high-probability tokens are pushed up whatever the sign of their advantage, so entropy
falls. Too little gives alpha < 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.controller import Controller, Schedule, Setpoint, check_gains
from megatron_entropic.algorithms.entropy_control.steering import Steering

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig


_OPTIONS = ("anti_windup", "start", "integral_limit", "integral_leak", "dead_band", "initial_alpha")
"""Keys of the section `entropy_control` that are the controller's options under the same name."""


class EntropyController(Controller):
    """EntroPIC's controller from the global entropy: P with `ki` = 0, else PI.

    The integral advances by e in `commit`, so the alpha of a step never contains that step's own error in its integral
    term. It is the sum of errors, not multiplied by K_i: a run resumed with another K_i rescales nothing.

    Args:
        target: set point of the token-mean entropy, nats.
        kp: K_p, per nat.
        ki: K_i, per nat and optimizer step.
        gain: factor on both gains.
        anti_windup, integral_limit, integral_leak: see `IntegralRule`.
        start: "immediately"; "at_crossing" (alpha is `initial_alpha` until H first crosses the target);
            or "integral_at_crossing" (only the integral waits).
        dead_band: an error with |e| < dead_band counts as 0, nats.
        initial_alpha: K_i sum(e) at the start: what holding the target is known to need. Unused with ki = 0.

    Raises:
        ValueError: a setting is out of its range.
    """

    kind = "replicated"
    state_names = ("acc", "alpha", "alpha_unclipped", "crossed", "side")

    def __init__(
        self,
        target: float | Setpoint,
        kp: float,
        ki: float,
        *,
        gain: Schedule | None = None,
        anti_windup: str = "conditional",
        start: str = "immediately",
        integral_limit: float | None = None,
        integral_leak: float = 0.0,
        dead_band: float = 0.0,
        initial_alpha: float = 0.0,
    ) -> None:
        super().__init__(target)
        check_gains(kp, ki)
        _check_options(start, dead_band, initial_alpha)
        self.kp, self.ki = self._initial_gains = (float(kp), float(ki))
        self._gain = gain or Schedule(1.0)
        self.rule = IntegralRule(anti_windup, integral_limit, integral_leak)
        self.start, self.dead_band = start, dead_band
        self.acc = initial_alpha / ki if ki > 0 else 0.0
        self.proportional_term = self.integral_term = self.alpha_unclipped = self.alpha = self.crossed = self.side = 0.0

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> EntropyController:
        ki, gain = config.ki if config.controller == "pi" else 0.0, Schedule.of_gain(config.gain_schedule)
        return cls(target, config.kp, ki, gain=gain, **{name: getattr(config, name) for name in _OPTIONS})

    @property
    def integral(self) -> float:
        """Sum of errors, nats."""
        return self.acc

    def _steer(self) -> Steering:
        self._notice_crossing()
        factor = self._gain.at(self.step)
        self.kp, self.ki = (gain * factor for gain in self._initial_gains)
        if abs(self.error) < self.dead_band:
            self.error = 0.0
        waiting = self.start == "at_crossing" and not self.crossed
        self.proportional_term = 0.0 if waiting else self.kp * self.error
        self.integral_term = self.ki * self.acc
        self.alpha_unclipped = self.proportional_term + self.integral_term
        self.alpha = clipped_alpha(self.alpha_unclipped)
        return Steering(alpha=self.alpha)

    def _notice_crossing(self) -> None:
        """Note the side of the target that the first measurement is on, and the first one that is on another."""
        side = float((self.error > 0) - (self.error < 0))
        self.side = self.side or side
        self.crossed = float(self.crossed or side != self.side or side == 0.0)

    def _advance(self, *, has_advantage: bool) -> None:
        waiting = self.start != "immediately" and not self.crossed
        if has_advantage and not waiting:
            self.acc = self.rule.advanced(self.acc, self.error, alpha_unclipped=self.alpha_unclipped, ki=self.ki)

    def metrics(self) -> dict[str, float]:
        """Metrics of the base class and the parts of alpha.

        `entropy/integral` is the state now, `entropy/integral_term` the part of alpha that was computed from it before.
        """
        return super().metrics() | {
            "entropy/proportional": self.proportional_term,
            "entropy/integral_term": self.integral_term,
            "entropy/alpha_unclipped": self.alpha_unclipped,
            "entropy/integral": self.acc,
        }


def _check_options(start: str, dead_band: float, initial_alpha: float) -> None:
    if start not in ("immediately", "integral_at_crossing", "at_crossing"):
        raise ValueError(f"entropy control: unknown start {start!r}")
    if not dead_band >= 0:
        raise ValueError(f"entropy control: dead_band must be >= 0, not {dead_band}")
    if not abs(initial_alpha) <= ALPHA_LIMIT:
        raise ValueError(f"entropy control: initial_alpha must be in [-1, 1], not {initial_alpha}")


# How a controller's sum of errors advances, and what keeps it from winding up while alpha is at its limit.

ALPHA_LIMIT = 1.0
"""Limit of |alpha|: up to 1 the weights 1 + alpha and 1 - alpha of the policy gradient are non-negative."""


def clipped_alpha(alpha: float) -> float:
    """Clip alpha to its limits."""
    return min(max(alpha, -ALPHA_LIMIT), ALPHA_LIMIT)


@dataclass(frozen=True, slots=True)
class IntegralRule:
    """Rule by which the sum of errors changes after an optimizer step.

    Raises:
        ValueError: a setting is out of its range.
    """

    anti_windup: str = "conditional"
    """Rule against wind-up: conditional, clamp or none.

    conditional: the integral stands still while |K_p e + K_i sum(e)| >= 1 and e would push it further out; clamp: |K_i
    sum(e)| stays within 1; or none.
    """
    limit: float | None = None
    """Bound of |sum of errors|, nats; None is no bound."""
    leak: float = 0.0
    """Fraction of the integral that is forgotten each time it advances."""

    def __post_init__(self) -> None:
        if self.anti_windup not in ("conditional", "clamp", "none"):
            raise ValueError(f"entropy control: anti_windup is conditional, clamp or none, not {self.anti_windup!r}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"entropy control: integral_limit must be > 0 or None, not {self.limit}")
        if not 0 <= self.leak < 1:
            raise ValueError(f"entropy control: integral_leak must be in [0, 1), not {self.leak}")

    def advanced(self, integral: float, error: float, *, alpha_unclipped: float, ki: float) -> float:
        """The sum of errors, nats, after a step with this error.

        Conditional integration has this bound: while e > 0 the integral grows only if K_p e + K_i sum(e) < 1, so after
        it has grown K_i sum(e) < 1 + (K_i - K_p) e. With K_p >= K_i it stays below 1 however long alpha is saturated,
        and the first error of the other sign brings alpha off its limit. The same holds mirrored.
        """
        saturated = abs(alpha_unclipped) >= ALPHA_LIMIT
        if self.anti_windup == "conditional" and saturated and error * alpha_unclipped > 0:
            return integral
        advanced = (1.0 - self.leak) * integral + error
        limit = self.limit
        if self.anti_windup == "clamp" and ki > 0:
            limit = min(ALPHA_LIMIT / ki, limit or ALPHA_LIMIT / ki)
        return advanced if limit is None else min(max(advanced, -limit), limit)
