"""Which controllers there are: the values of `entropy_control.controller` other than off.

A new one is a subclass of `Controller`, a row here, and its name in `EntropyControlConfig.controller`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.controller import Controller
from megatron_entropic.algorithms.entropy_control.entropic import EntropyController
from megatron_entropic.algorithms.entropy_control.probe import Probe
from megatron_entropic.algorithms.entropy_control.rivals import (
    AdaptiveEntropyCoefficient,
    ConstantAlpha,
    Dmmpt,
    Entrocraft,
    EntropyBonus,
)
from megatron_entropic.algorithms.entropy_control.schedules import Schedule, Setpoint

if TYPE_CHECKING:
    from megatron_entropic.config_algorithm import EntropyControlConfig

ControllerFactory = Callable[[Setpoint, "EntropyControlConfig"], Controller]


def _entropic(target: Setpoint, config: EntropyControlConfig) -> Controller:
    return EntropyController(
        target,
        config.kp,
        config.ki if config.controller == "pi" else 0.0,
        gain=Schedule.of_gain(config.gain_schedule),
        anti_windup=config.anti_windup,
        start=config.start,
        integral_limit=config.integral_limit,
        integral_leak=config.integral_leak,
        dead_band=config.dead_band,
        initial_alpha=config.initial_alpha,
    )


def _entrocraft(target: Setpoint, config: EntropyControlConfig) -> Controller:
    rivals = config.rivals
    upper, lower = (
        Schedule(first, last, "linear", rivals.entrocraft_steps)
        for first, last in (rivals.entrocraft_upper, rivals.entrocraft_lower)
    )
    return Entrocraft(target, upper, lower)


def _probe(target: Setpoint, config: EntropyControlConfig) -> Controller:
    rivals = config.rivals
    return Probe(target, rivals.alpha, rivals.probe_amplitude, rivals.probe_half_period)


CONTROLLERS: dict[str, ControllerFactory] = {
    "p": _entropic,
    "pi": _entropic,
    "constant": lambda target, config: ConstantAlpha(target, config.rivals.alpha),
    "probe": _probe,
    "entropy_bonus": lambda target, config: EntropyBonus(target, config.rivals.bonus),
    "aec": lambda target, config: AdaptiveEntropyCoefficient(target, config.rivals.aec_step, config.rivals.aec_limit),
    "entrocraft": _entrocraft,
    "dmmpt": lambda target, config: Dmmpt(target, config.rivals.dmmpt_probability),
}


def build_controller(config: EntropyControlConfig) -> Controller:
    """The controller that the `entropy_control` section asks for.

    Raises:
        ValueError: the controller is off.
    """
    if not config.enabled:
        raise ValueError("entropy_control.controller is off: there is no controller to build")
    return CONTROLLERS[config.controller](Setpoint.from_config(config), config)
