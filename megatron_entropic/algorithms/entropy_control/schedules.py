"""Set points and gains that move over a run, as functions of the number of optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig, GainScheduleConfig


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
        """Its value when `step` optimizer steps have been taken."""
        progress = min(step / self.steps, 1.0)
        if self.kind == "constant":
            return self.start
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))

    @classmethod
    def of_gain(cls, config: GainScheduleConfig) -> Schedule:
        """The factor of `entropy_control.gain_schedule`, which starts at 1."""
        return cls(1.0, config.end, config.kind, config.steps)


@dataclass(frozen=True, slots=True)
class Setpoint:
    """The entropy aimed at: nats, or multiples of the first measured entropy, on a schedule."""

    schedule: Schedule
    start_is_relative: bool = False
    end_is_relative: bool = False

    @classmethod
    def of(cls, target: float | Setpoint) -> Setpoint:
        """A constant number of nats as a set point.

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
        """From `entropy_control.target` and `target_schedule`; 0.7x is relative, 0.7 is nats."""
        moving = config.target_schedule
        (start, start_is_relative), (end, end_is_relative) = _parsed(config.target), _parsed(moving.end)
        return cls(Schedule(start, end, moving.kind, moving.steps), start_is_relative, end_is_relative)

    def at(self, step: int, initial_entropy: float) -> float:
        """Nats aimed at after `step` optimizer steps.

        Args:
            initial_entropy: the first entropy that this run measured, nats.
        """
        start = self.schedule.start * (initial_entropy if self.start_is_relative else 1.0)
        end = self.schedule.end * (initial_entropy if self.end_is_relative else 1.0)
        return Schedule(start, end, self.schedule.kind, self.schedule.steps).at(step)


def _parsed(value: float | str) -> tuple[float, bool]:
    if isinstance(value, str):
        return float(value.removesuffix("x")), True
    return float(value), False
