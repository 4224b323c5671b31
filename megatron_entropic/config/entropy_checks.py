"""Checks of the section `entropy_control`: combinations that cannot work on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_entropic.config.algorithm import EntropyControlConfig
from megatron_entropic.config.base import Violation
from megatron_entropic.config.names import CONTROLLERS, GUARDS, OFF, controller_entry, unknown_name

if TYPE_CHECKING:
    from megatron_entropic.config.run import Config


def entropy_violations(config: Config) -> Iterator[Violation]:
    """Yields what of the section `entropy_control` does not go together."""
    yield from section_violations(config.entropy_control, config.feedback)


def section_violations(control: EntropyControlConfig, feedback: str) -> Iterator[Violation]:
    """Yields the same of the section alone, for other trainers too; `feedback` is the one used, never auto."""
    local = control.feedback == "microbatch_local"
    if control.measure != "tokens" and feedback not in ("score_pass", "sampling"):
        yield Violation(
            ("entropy_control.measure", "entropy_control.feedback"),
            f"entropy_control.measure={control.measure} needs feedback=score_pass or sampling: what updates measure "
            f"({feedback}) is a mean of tokens",
        )
    if problem := unknown_name(control.controller, (OFF, *CONTROLLERS), own="module:Class"):
        keys = ("entropy_control.controller",)
        yield Violation(keys, f"entropy_control.controller={control.controller!r}: {problem}")
    elif local and control.enabled and not controller_entry(control.controller).answers_error:
        yield Violation(
            ("entropy_control.feedback", "entropy_control.controller"),
            f"entropy_control.feedback=microbatch_local is the published code's: controllers p and pi have it, "
            f"{control.controller} has not",
        )
    moving = control.fixed_target is None or control.gain_schedule.kind != "constant"
    if local and control.enabled and (moving or control.start != "immediately"):
        yield Violation(
            ("entropy_control",),
            "entropy_control.feedback=microbatch_local needs a fixed target in nats, constant gains and "
            "start=immediately: the published code has nothing else",
        )
    if control.guard != OFF or control.reanchor != OFF:
        yield from _guard(control, feedback)
    yield from _rivals(control)


def _rivals(control: EntropyControlConfig) -> Iterator[Violation]:
    rivals = control.rivals
    if control.controller == "cascade" and not rivals.cascade_tau[0] <= control.tau <= rivals.cascade_tau[1] < 1:
        yield Violation(
            ("entropy_control.tau", "entropy_control.rivals.cascade_tau"),
            f"entropy_control.tau={control.tau:g} must lie within rivals.cascade_tau={list(rivals.cascade_tau)}, which "
            "ends below 1: cascade begins there",
        )
    if control.controller == "probe" and abs(rivals.alpha) + rivals.probe_amplitude > 1:
        yield Violation(
            ("entropy_control.rivals.alpha", "entropy_control.rivals.probe_amplitude"),
            f"entropy_control.rivals: alpha={rivals.alpha:g} and probe_amplitude={rivals.probe_amplitude:g} take alpha "
            "beyond 1",
        )
    for place, low, high in zip(("first", "last"), rivals.entrocraft_lower, rivals.entrocraft_upper, strict=True):
        if control.controller == "entrocraft" and low > high:
            yield Violation(
                ("entropy_control.rivals.entrocraft_lower", "entropy_control.rivals.entrocraft_upper"),
                f"entropy_control.rivals: the {place} entrocraft_lower={low:g} is above entrocraft_upper={high:g}",
            )
    starts = {
        "repo_r": (("repo_zeta", rivals.repo_zeta), ("repo_bounds", rivals.repo_bounds)),
        "adapo": (("adapo_clip", rivals.adapo_clip), ("adapo_bounds", rivals.adapo_bounds)),
    }
    if control.controller in starts:
        (first, value), (bounds, (low, high)) = starts[control.controller]
        if not 0 < low <= value <= high:
            yield Violation(
                (f"entropy_control.rivals.{first}", f"entropy_control.rivals.{bounds}"),
                f"entropy_control.rivals: {first}={value:g} must lie within {bounds}={[low, high]}, both above 0",
            )


def _guard(control: EntropyControlConfig, feedback: str) -> Iterator[Violation]:
    top, bottom, *_ = control.guard_numbers
    if problem := unknown_name(control.guard, (OFF, *GUARDS), own="module:Class"):
        yield Violation(("entropy_control.guard",), f"entropy_control.guard={control.guard!r}: {problem}")
    elif control.guard != OFF and not (control.enabled and control.steers_alpha):
        yield Violation(
            ("entropy_control.guard", "entropy_control.controller"),
            f"entropy_control.guard={control.guard} overrides alpha, and controller={control.controller} has none",
        )
    if feedback == "microbatch_local":
        yield Violation(
            ("entropy_control.guard", "entropy_control.reanchor", "entropy_control.feedback"),
            "entropy_control.guard and reanchor need one alpha for all ranks: not feedback=microbatch_local",
        )
    if control.reanchor == "measured" and feedback != "score_pass":
        yield Violation(
            ("entropy_control.reanchor", "entropy_control.feedback"),
            f"entropy_control.reanchor=measured compares two scoring passes: it needs feedback=score_pass, not "
            f"{feedback}",
        )
    if not bottom < top:
        yield Violation(
            ("entropy_control.guards.top", "entropy_control.guards.bottom"),
            f"entropy_control.guards: bottom={bottom:g} is not below top={top:g}",
        )
