"""Functions that make each controller of `names.CONTROLLERS` from the `entropy_control` section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_entropic.algorithms.entropy_control.adaptive import Adapo, Aer, Fade, RepoR
from megatron_entropic.algorithms.entropy_control.baselines import (
    AdaptiveEntropyCoefficient,
    ConstantAlpha,
    Dmmpt,
    Entrocraft,
    EntropyBonus,
    Probe,
)
from megatron_entropic.algorithms.entropy_control.controller import Controller, Schedule, Setpoint
from megatron_entropic.algorithms.entropy_control.guards import Guard, Guarded
from megatron_entropic.algorithms.entropy_control.proportional_integral import EntropyController
from megatron_entropic.algorithms.entropy_control.sources import Cascade, Unsolved
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
    target = Setpoint.from_config(config)
    make = find_attribute(key, controller_entry(name).target, arguments=2, kind=type)
    if not isinstance(make, type):
        controller: Controller = make(target, config)
        return controller
    if not issubclass(make, Controller):
        raise UserError(f"{key}={name}: {make.__name__} is no subclass of megatron_entropic.algorithms.Controller")
    return make.from_config(target, config)


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


def entropic(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make EntroPIC's controller, p or pi."""
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


def constant(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of EntroPIC's term with an alpha that never changes."""
    return ConstantAlpha(target, config.rivals.alpha)


def unsolved(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of an alpha of each prompt by its failures."""
    rivals = config.rivals
    limit = rivals.unsolved_limit
    if limit is None:
        limit = 1.0 if config.denominator == "all_tokens" else 1.5
    return Unsolved(target, rivals.unsolved_gain, limit)


def cascade(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of a fixed alpha and a threshold tau that moves."""
    rivals = config.rivals
    return Cascade(
        target,
        alpha=rivals.cascade_alpha,
        tau=config.tau,
        gains=(rivals.cascade_kp, rivals.cascade_ki),
        bounds=rivals.cascade_tau,
    )


def probe(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of a square wave of alpha."""
    rivals = config.rivals
    return Probe(target, rivals.alpha, rivals.probe_amplitude, rivals.probe_half_period)


def entropy_bonus(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of a fixed coefficient of the entropy."""
    return EntropyBonus(target, config.rivals.bonus)


def aec(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of a coefficient of the entropy that moves in steps."""
    return AdaptiveEntropyCoefficient(target, config.rivals.aec_step, config.rivals.aec_limit)


def entrocraft(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller that keeps samples of one sign outside of bounds that are annealed."""
    rivals = config.rivals
    upper, lower = (
        Schedule(first, last, "linear", rivals.entrocraft_steps)
        for first, last in (rivals.entrocraft_upper, rivals.entrocraft_lower)
    )
    return Entrocraft(target, upper, lower)


def dmmpt(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller that drops confident positive tokens below the target."""
    return Dmmpt(target, config.rivals.dmmpt_probability)


def repo_r(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller that rescales advantages by log-probabilities."""
    return RepoR(target, config.rivals.repo_zeta, config.rivals.repo_bounds)


def adapo(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of the upper clip."""
    rivals = config.rivals
    return Adapo(target, rivals.adapo_clip, rivals.adapo_bounds, rivals.adapo_factor)


def aer(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of an entropy bonus by difficulty."""
    rivals = config.rivals
    return Aer(target, rivals.aer_rho, rivals.aer_eta, rivals.aer_limit)


def fade(target: Setpoint, config: EntropyControlConfig) -> Controller:
    """Make a controller of the weights of signs and difficulties."""
    return Fade(target, config.rivals.fade_suppression)
