"""Base of all controllers: measurement, set point, state, log."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_entropic.algorithms.entropy_control.steering import Steering

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig, GainScheduleConfig


_BASE_STATE = ("H", "H_initial", "observations", "step")


class Controller(ABC):
    """One replica of a controller. An optimizer step calls `observe` before its first backward pass, `commit` after it.

    Between the two, what it asked for is fixed. Subclasses write `_steer` and, where they have more state than the last
    measurement, `_advance` and the names in `state_names`.

    Args:
        target: set point of the token-mean entropy, nats.

    Attributes (0 before the first measurement; entropies and errors in nats):
        entropy, target, error: last measured H, the set point then, and e = H - target.
        steering: the steering asked for last.
        initial_entropy: the first measured H, which relative targets are multiples of.
    """

    kind: str
    """Kind of the state in a checkpoint: a controller of another kind starts fresh."""
    state_names: tuple[str, ...] = ()
    """Float attributes that are state beside the measurement, in checkpoints under the same names."""
    measures_again = False
    """Whether `measured_again` is to be called, which costs a forward pass after each optimizer step."""

    def __init__(self, target: float | Setpoint) -> None:
        self._setpoint = Setpoint.of(target)
        self.target = 0.0 if self._setpoint.start_is_relative else self._setpoint.at(0, 0.0)
        self.entropy = 0.0
        self.error = 0.0
        self.steering = Steering()
        self.initial_entropy = 0.0
        self._observations = 0
        self._steps = 0
        self._observed = False

    @classmethod
    def from_config(cls, target: Setpoint, config: EntropyControlConfig) -> Controller:
        """Make the controller from the `entropy_control` section; a class that needs more than a target overrides it.

        Numbers of somebody's own class come as `config.options`.
        """
        return cls(target)

    @property
    def step(self) -> int:
        """Number of optimizer steps that were taken (skipped ones do not count)."""
        return self._steps

    @abstractmethod
    def _steer(self) -> Steering:
        """The controller's wishes, given `entropy` and `error`, which were just measured."""

    def _advance(self, *, has_advantage: bool) -> None:
        """Change the state once, after an optimizer step that was taken."""
        return

    def observe(self, entropy_sum: float, token_count: float) -> Steering:
        """Fix what the next optimizer step does.

        Args:
            entropy_sum: sum of the token entropies over all response tokens of all ranks, nats.
            token_count: number of those tokens.

        Raises:
            ValueError: there are no tokens, or the sum is not finite (the forward pass itself is broken).
        """
        if not token_count > 0:
            raise ValueError(f"entropy control: no response tokens to measure on (token count {token_count})")
        entropy = entropy_sum / token_count
        if not math.isfinite(entropy):
            raise ValueError(f"entropy control: measured entropy {entropy}: the policy's logits are not finite")
        if self._observations == 0:
            self.initial_entropy = entropy
        self._observations += 1
        self.entropy = entropy
        self.target = self._setpoint.at(self._steps, self.initial_entropy)
        self.error = entropy - self.target
        self._observed = True
        self.steering = self._steer()
        return self.steering

    def commit(self, *, stepped: bool, has_advantage: bool) -> None:
        """Advance once, after the optimizer step that used what `observe` returned.

        Args:
            stepped: the optimizer changed the weights; False when the step was skipped (non-finite gradient).
            has_advantage: some token had A != 0. Without one, the policy loss had nothing to act on and the error says
                nothing about the loop, so integrals stand still.
        """
        assert self._observed, "commit() without observe(): this optimizer step has no steering"
        self._observed = False
        if not stepped:
            return
        self._steps += 1
        self._advance(has_advantage=has_advantage)

    def measured_again(self, entropy: float) -> None:
        """Take the entropy, nats, of the responses of the last step under the weights after it."""
        return

    def metrics(self) -> dict[str, float]:
        """Metrics that a run logs each step; subclasses add theirs."""
        return {
            "entropy/mean": self.entropy,
            "entropy/target": self.target,
            "entropy/error": self.error,
            "entropy/alpha": self.steering.alpha,
            "entropy/coefficient": self.steering.entropy_coefficient,
        }

    def state_dict(self) -> dict[str, float | int]:
        """State as plain numbers: `H`, `H_initial`, `observations`, `step`, and the attributes in `state_names`."""
        return {
            "H": self.entropy,
            "H_initial": self.initial_entropy,
            "observations": self._observations,
            "step": self._steps,
            **{name: getattr(self, name) for name in self.state_names},
        }

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Restore what `state_dict` returned; it goes on as a controller that was never stopped.

        Raises:
            ValueError: keys are missing or unknown, or a value is not finite.
        """
        check_state(state, (*_BASE_STATE, *self.state_names))
        self.entropy = float(state["H"])
        self.initial_entropy = float(state["H_initial"])
        self._observations = int(state["observations"])
        self._steps = int(state["step"])
        for name in self.state_names:
            setattr(self, name, float(state[name]))


def check_state(state: Mapping[str, float | int], names: tuple[str, ...]) -> None:
    """Refuse a saved state that does not have exactly these finite numbers.

    Raises:
        ValueError: it does not.
    """
    if set(state) != set(names):
        raise ValueError(f"entropy controller state needs exactly the keys {sorted(names)}, not {sorted(state)}")
    if not all(math.isfinite(value) for value in state.values()):
        raise ValueError(f"entropy controller state holds a value that is not finite: {dict(state)}")


def check_gains(kp: float, ki: float) -> None:
    """Refuse gains that are negative or not finite.

    Raises:
        ValueError: one is.
    """
    for name, value in (("kp", kp), ("ki", ki)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"entropy control: {name} must be a finite number >= 0, not {value}")


# Set points and gains that move over a run, as functions of the number of optimizer steps.


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number that moves from `start` to `end` in `steps` optimizer steps and then stays.

    constant   start
    linear     start + (end - start) p            p = min(step / steps, 1)
    cosine     end + (start - end) (1 + cos(pi p)) / 2
    """

    start: float
    end: float = 0.0
    kind: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 1

    def at(self, step: int) -> float:
        """Value when `step` optimizer steps have been taken."""
        progress = min(step / self.steps, 1.0)
        if self.kind == "constant":
            return self.start
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))

    @classmethod
    def of_gain(cls, config: GainScheduleConfig) -> Schedule:
        """Schedule of the factor of `entropy_control.gain_schedule`, which starts at 1."""
        return cls(1.0, config.end, config.kind, config.steps)


@dataclass(frozen=True, slots=True)
class Setpoint:
    """The entropy aimed at: nats, or multiples of the first measured entropy, on a schedule."""

    schedule: Schedule
    start_is_relative: bool = False
    end_is_relative: bool = False

    @classmethod
    def of(cls, target: float | Setpoint) -> Setpoint:
        """Make a set point of a constant number of nats; one that is a set point already is returned.

        Raises:
            ValueError: the number is negative or not finite.
        """
        if isinstance(target, Setpoint):
            return target
        if not (math.isfinite(target) and target >= 0):
            raise ValueError(f"entropy control: target must be a finite number >= 0, not {target}")
        return cls(Schedule(float(target)))

    @classmethod
    def from_config(cls, config: EntropyControlConfig) -> Setpoint:
        """Make the set point of `entropy_control.target` and `target_schedule`; 0.7x is relative, 0.7 is nats."""
        moving = config.target_schedule
        (start, start_is_relative), (end, end_is_relative) = _parsed(config.target), _parsed(moving.end)
        return cls(Schedule(start, end, moving.kind, moving.steps), start_is_relative, end_is_relative)

    def at(self, step: int, initial_entropy: float) -> float:
        """Entropy aimed at after `step` optimizer steps, in nats.

        Args:
            step: number of optimizer steps taken.
            initial_entropy: the first entropy that this run measured, nats.
        """
        start = self.schedule.start * (initial_entropy if self.start_is_relative else 1.0)
        end = self.schedule.end * (initial_entropy if self.end_is_relative else 1.0)
        return Schedule(start, end, self.schedule.kind, self.schedule.steps).at(step)


def _parsed(value: float | str) -> tuple[float, bool]:
    if isinstance(value, str):
        return float(value.removesuffix("x")), True
    return float(value), False
