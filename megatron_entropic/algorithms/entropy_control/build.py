"""The controller that a configuration asks for: a row of the table, or a class of somebody's own, under its guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.controller import Controller, Setpoint
from megatron_entropic.algorithms.entropy_control.guards import Guard, Guarded
from megatron_entropic.config.names import CONTROLLERS, GUARDS, OFF, controller_entry, unknown_name
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.errors import UserError

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import EntropyControlConfig


def build_controller(config: EntropyControlConfig) -> Controller:
    """Build the controller that the `entropy_control` section asks for, under the guard that it asks for.

    Raises:
        UserError: there is no such controller or guard, or it is none.
        ValueError: the controller is off.
    """
    source = _build_source(config)
    guard = _build_guard(config)
    if guard is None and config.reanchor == OFF:
        return source
    return Guarded(
        source,
        guard,
        jump=config.guards.jump,
        reanchors=config.reanchor != OFF,
        measures_again=config.reanchor == "measured",
    )


def _build_source(config: EntropyControlConfig) -> Controller:
    """Build a row of the table of controllers, or `module:Class`."""
    if not config.enabled:
        raise ValueError("entropy_control.controller is off: there is no controller to build")
    key, name = "entropy_control.controller", config.controller
    if problem := unknown_name(name, CONTROLLERS, own="module:Class"):
        raise UserError(f"{key}={name!r}: {problem}")
    make = find_attribute(key, controller_entry(name).target, arguments=2, kind=type)
    if not (isinstance(make, type) and issubclass(make, Controller)):
        raise UserError(f"{key}={name}: {make.__name__} is no subclass of megatron_entropic.algorithms.Controller")
    return make.from_config(Setpoint.from_config(config), config)


def _build_guard(config: EntropyControlConfig) -> Guard | None:
    """Build a row of the table of guards, or `module:Class`; None without one."""
    key, name = "entropy_control.guard", config.guard
    if name == OFF:
        return None
    if problem := unknown_name(name, GUARDS, own="module:Class"):
        raise UserError(f"{key}={name!r}: {problem}")
    entry = GUARDS.get(name)
    make = find_attribute(key, entry.target if entry else name, arguments=4, kind=type)
    if not (isinstance(make, type) and issubclass(make, Guard)):
        raise UserError(f"{key}={name}: {make.__name__} is no subclass of {Guard.__module__}.Guard")
    return make(*config.guard_numbers)
