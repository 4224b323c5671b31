"""Guards: overrides of a controller's alpha that act only where the entropy leaves what the run began with.

    source --steering--> Guarded --steering with a changed alpha--> loss
                            ^
    H --Anchor--> x = smoothed H / anchor --Guard--> u

The anchor is the entropy of the run's first steps, moved where the data change: one optimizer step moves entropy by
hundredths of itself, new prompts by tenths. Where the responses of a step are scored again after it, the difference of
the next measurement from that is the data's alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_entropic.algorithms.entropy_control.controller import Controller
from megatron_entropic.algorithms.entropy_control.proportional_integral import ALPHA_LIMIT
from megatron_entropic.algorithms.entropy_control.steering import Steering

FIRST_STEPS = 5
"""Number of first measurements whose mean the anchor is."""
SMOOTHING = 0.8
"""Share of the old value in the moving mean of H."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """The entropy that H is compared with, after some measurements; nats.

    A measurement that differs from the moving mean by more than `jump` times the anchor is put down to the data: mean
    and anchor are scaled by the same factor, so that their ratio stays what it was.
    """

    entropy: float = 0.0
    smoothed: float = 0.0
    """Moving mean of H since the last jump."""
    measurements: float = 0.0
    factor: float = 1.0
    """Factor by which the last measurement moved the anchor; 1 without a jump."""

    @property
    def relative(self) -> float:
        """Smoothed H as a multiple of the anchor; 1 where there is no entropy to compare with."""
        return self.smoothed / self.entropy if self.entropy > 0 else 1.0

    def after(self, entropy: float, jump: float, before: float = 0.0) -> Anchor:
        """The anchor after one more measurement, nats.

        Args:
            entropy: the measurement.
            jump: see the class.
            before: entropy of the responses before under the same weights; 0 where nobody has measured it, then the
                moving mean stands for it.
        """
        count = self.measurements + 1
        if count <= FIRST_STEPS:
            mean = self.entropy + (entropy - self.entropy) / count
            return Anchor(mean, mean, count)
        before = before or self.smoothed
        if abs(entropy - before) > jump * self.entropy and entropy > 0 and before > 0:
            factor = entropy / before
            return Anchor(self.entropy * factor, self.smoothed * factor, count, factor)
        return Anchor(self.entropy, SMOOTHING * self.smoothed + (1.0 - SMOOTHING) * entropy, count)


class Guard(ABC):
    """What to add to alpha, given x = smoothed H / anchor.

    Args:
        top: x above which the guard acts.
        bottom: x below which a guard of two sides acts.
        gain: k, of alpha per unit of x outside.
        integral_gain: k_i, of alpha per unit of x outside and optimizer step.
    """

    kind: str

    def __init__(self, top: float, bottom: float, gain: float, integral_gain: float) -> None:
        self.top, self.bottom = top, bottom
        self.gain, self.integral_gain = gain, integral_gain
        self.integral = 0.0

    @abstractmethod
    def action(self, relative: float) -> float:
        """The amount u that is added to alpha, of a step with x = `relative`."""

    @abstractmethod
    def advance(self, relative: float) -> None:
        """Change `integral` after an optimizer step that was taken."""

    @abstractmethod
    def applied(self, steering: Steering, action: float) -> Steering:
        """The steering with the action added, within the guard's limits."""


class Ceiling(Guard):
    """A ceiling of the entropy over any source of alpha: it takes back what raises entropy, and never asks for less
    entropy than the base loss does.

        u = k max(0, x - top) + v          v <- clip(v + k_i (x - top), 0, 1.5)
        alpha <- min(alpha + u, 0)         where alpha < 0; an alpha that lowers entropy is left as it is
    """

    kind = "ceiling"
    INTEGRAL_LIMIT = 1.5

    def action(self, relative: float) -> float:
        """See the class."""
        return self.gain * max(0.0, relative - self.top) + self.integral

    def advance(self, relative: float) -> None:
        """See the class."""
        moved = self.integral + self.integral_gain * (relative - self.top)
        self.integral = min(max(moved, 0.0), self.INTEGRAL_LIMIT)

    def applied(self, steering: Steering, action: float) -> Steering:
        """See the class; of an alpha for each prompt every one is treated like that."""
        if steering.prompt_alpha is not None:
            return replace(steering, alpha=steering.alpha + action)
        return replace(steering, alpha=min(steering.alpha + action, 0.0)) if steering.alpha < 0 else steering


class Band(Guard):
    """A band of the entropy, inactive within: it may also lower entropy further, and raise it.

    u = k o + v         o = max(0, x - top) + min(0, x - bottom)         v <- clip(v + k_i o, -1, 1)
    alpha <- alpha + u, within [-1, 1] or the source's own limits if these are wider
    """

    kind = "band"

    def action(self, relative: float) -> float:
        """See the class."""
        return self.gain * self._outside(relative) + self.integral

    def advance(self, relative: float) -> None:
        """See the class."""
        moved = self.integral + self.integral_gain * self._outside(relative)
        self.integral = min(max(moved, -ALPHA_LIMIT), ALPHA_LIMIT)

    def applied(self, steering: Steering, action: float) -> Steering:
        """See the class."""
        if steering.prompt_alpha is not None:
            wider = replace(steering.prompt_alpha, high=max(steering.prompt_alpha.high, ALPHA_LIMIT))
            return replace(steering, alpha=steering.alpha + action, prompt_alpha=wider)
        low, high = min(steering.alpha, -ALPHA_LIMIT), max(steering.alpha, ALPHA_LIMIT)
        return replace(steering, alpha=min(max(steering.alpha + action, low), high))

    def _outside(self, relative: float) -> float:
        return max(0.0, relative - self.top) + min(0.0, relative - self.bottom)


class Guarded(Controller):
    """A controller under a guard, or whose relative target follows the data, or both.

    Args:
        source: controller that is overridden.
        guard: what overrides it; None: nothing does.
        jump: change of H in one step, as a share of the anchor, from which on it is put down to the data.
        reanchors: whether the source's relative target moves with the anchor.
        measures_again: whether the data's part of a change is measured, by scoring responses again after their step.
    """

    state_names = ("anchor", "smoothed", "measurements", "guard_integral", "after_update")

    def __init__(
        self, source: Controller, guard: Guard | None, *, jump: float, reanchors: bool, measures_again: bool = False
    ) -> None:
        super().__init__(source.target)
        self.source, self.guard = source, guard
        self.kind = f"{source.kind} {guard.kind if guard else 'reanchored'}"
        self._jump, self._reanchors, self.measures_again = jump, reanchors, measures_again
        self._before = self._anchor = Anchor()
        self._action = self._initial_before = self._after_update = 0.0

    def observe(self, entropy_sum: float, token_count: float) -> Steering:
        """Fix what the next optimizer step does; see `Controller.observe`."""
        if token_count > 0:
            self._anchor = self._before.after(entropy_sum / token_count, self._jump, self._after_update)
            if self._reanchors:
                self._initial_before = self.source.initial_entropy
                self.source.initial_entropy *= self._anchor.factor
        steering = self.source.observe(entropy_sum, token_count)
        self._observed = True
        if self.guard is not None:
            self._action = self.guard.action(self._anchor.relative)
            steering = self.guard.applied(steering, self._action)
        self.entropy, self.target, self.error = self.source.entropy, self.source.target, self.source.error
        self.steering = steering
        return steering

    def _steer(self) -> Steering:
        raise AssertionError("observe() asks the source")

    @property
    def step(self) -> int:
        """Number of optimizer steps that were taken."""
        return self.source.step

    def commit(self, *, stepped: bool, has_advantage: bool) -> None:
        """Advance source, anchor and guard; after a refused step nothing moves."""
        assert self._observed, "commit() without observe(): this optimizer step has no steering"
        self._observed = False
        self.source.commit(stepped=stepped, has_advantage=has_advantage)
        if not stepped:
            if self._reanchors and self._anchor.factor != 1.0:
                self.source.initial_entropy = self._initial_before
            return
        self._before = self._anchor
        if self.guard is not None and has_advantage:
            self.guard.advance(self._anchor.relative)

    def measured_again(self, entropy: float) -> None:
        """Keep it for the next measurement."""
        self._after_update = entropy

    def metrics(self) -> dict[str, float]:
        """Metrics of the source, with the alpha that is used, and those of the guard."""
        return self.source.metrics() | {
            "entropy/alpha": self.steering.alpha,
            "entropy/anchor": self._anchor.entropy,
            "entropy/relative": self._anchor.relative,
            "entropy/band_action": self._action,
        }

    def state_dict(self) -> dict[str, float | int]:
        """State of the source, the anchor and the guard."""
        before, integral = self._before, self.guard.integral if self.guard else 0.0
        values = (before.entropy, before.smoothed, before.measurements, integral, self._after_update)
        return self.source.state_dict() | dict(zip(self.state_names, values, strict=True))

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: keys are missing or unknown, or a value is not finite.
        """
        self.source.load_state_dict({name: value for name, value in state.items() if name not in self.state_names})
        anchor, smoothed, measurements, integral, self._after_update = (float(state[n]) for n in self.state_names)
        self._before = self._anchor = Anchor(anchor, smoothed, measurements)
        if self.guard:
            self.guard.integral = integral
