"""Entropy controllers: from the measured entropy to what the loss of the next optimizer step shall do about it.

    measurement (sum, count) --observe--> Steering --loss--> optimizer step --commit--> state

A controller is a few Python floats. It sees numbers that were already summed over ranks, so replicas that start equal
stay equal bit for bit. `Steering` says what a controller can ask for, `build` how a configuration makes one, and
a guard overrides the alpha of any of them.
"""

from megatron_entropic.algorithms.entropy_control.build import build_controller
from megatron_entropic.algorithms.entropy_control.controller import Controller, Schedule, Setpoint
from megatron_entropic.algorithms.entropy_control.guards import Guard
from megatron_entropic.algorithms.entropy_control.proportional_integral import EntropyController
from megatron_entropic.algorithms.entropy_control.published import MicrobatchLocalController
from megatron_entropic.algorithms.entropy_control.steering import PromptAlpha, Steering
from megatron_entropic.config.names import CONTROLLERS, GUARDS

__all__ = [
    "CONTROLLERS",
    "GUARDS",
    "Controller",
    "EntropyController",
    "Guard",
    "MicrobatchLocalController",
    "PromptAlpha",
    "Schedule",
    "Setpoint",
    "Steering",
    "build_controller",
]
