"""A known alpha for a while, so that `megatron-entropic tune` can tell what alpha does from what learning does."""

from __future__ import annotations

from megatron_entropic.algorithms.entropy_control.controller import Controller
from megatron_entropic.algorithms.entropy_control.schedules import Setpoint
from megatron_entropic.algorithms.entropy_control.steering import Steering


class Probe(Controller):
    """alpha is a square wave, whatever the entropy: a run identified in open loop.

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

    def _steer(self) -> Steering:
        side = 1.0 if self.step // self._half_period % 2 else -1.0
        return Steering(alpha=self._centre + side * self._amplitude)
