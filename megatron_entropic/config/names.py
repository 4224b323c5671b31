"""What a configuration can choose by name: one table for each choice, read by the checks and by the code it names.

A row says where the code is (`module:attribute`, imported when it is wanted) and what must be known of it before:
the checks and the plan of a run import no tensor library.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from megatron_entropic.config.plugins import is_module_name

_LOSSES = "megatron_entropic.algorithms.losses"
_VERIFIERS = "megatron_entropic.rewards.verifiers"
_CONTROLLERS = "megatron_entropic.algorithms.entropy_control"


@dataclass(frozen=True, slots=True)
class LossEntry:
    """A value of algorithm.policy_loss."""

    target: str
    plan: str | None = None
    """Ranks tokens over the whole optimizer step before it begins."""
    whole_sequences: bool = False
    """The loss of a token depends on the other tokens of its sequence."""


POLICY_LOSSES = {
    "clipped": LossEntry(f"{_LOSSES}.token:clipped"),
    "reinforce": LossEntry(f"{_LOSSES}.token:reinforce"),
    "gspo": LossEntry(f"{_LOSSES}.token:gspo", whole_sequences=True),
    "cispo": LossEntry(f"{_LOSSES}.token:cispo"),
    "ce_gppo": LossEntry(f"{_LOSSES}.token:ce_gppo"),
    "steer": LossEntry(f"{_LOSSES}.batch:steer", plan=f"{_LOSSES}.batch:steer_plan"),
    "clip_cov": LossEntry(f"{_LOSSES}.batch:clip_cov", plan=f"{_LOSSES}.batch:clip_cov_plan"),
    "kl_cov": LossEntry(f"{_LOSSES}.batch:kl_cov", plan=f"{_LOSSES}.batch:kl_cov_plan"),
}


@dataclass(frozen=True, slots=True)
class ControllerEntry:
    """A value of entropy_control.controller."""

    target: str
    """A function of the set point and the `entropy_control` section that returns the controller."""
    steers_alpha: bool = True
    """The loss may have EntroPIC's term."""
    answers_error: bool = False
    """alpha is EntroPIC's function of the error: gains matter, and the published code has it."""


CONTROLLERS = {
    "p": ControllerEntry(f"{_CONTROLLERS}.factories:entropic", answers_error=True),
    "pi": ControllerEntry(f"{_CONTROLLERS}.factories:entropic", answers_error=True),
    "constant": ControllerEntry(f"{_CONTROLLERS}.factories:constant"),
    "probe": ControllerEntry(f"{_CONTROLLERS}.factories:probe"),
    "entropy_bonus": ControllerEntry(f"{_CONTROLLERS}.factories:entropy_bonus", steers_alpha=False),
    "aec": ControllerEntry(f"{_CONTROLLERS}.factories:aec", steers_alpha=False),
    "entrocraft": ControllerEntry(f"{_CONTROLLERS}.factories:entrocraft", steers_alpha=False),
    "dmmpt": ControllerEntry(f"{_CONTROLLERS}.factories:dmmpt", steers_alpha=False),
}
OFF = "off"
"""The value of entropy_control.controller that leaves the loss as it is."""


@dataclass(frozen=True, slots=True)
class VerifierEntry:
    """A value of reward.verifier; targets are functions of rewards/verifiers/."""

    target: str
    reading: str | None = None
    """response -> the answer in it, which majority votes count and people look at; None where the verifier knows."""
    trials: str | None = None
    """ground truth -> answers to try it with before training; None where the verifier takes any ground truth."""
    decisive: str | None = None
    """response -> the part that decides alone: responses to one prompt that agree in it are judged once."""
    instant: bool = False
    """Its time is bounded and far below that of asking another process."""
    takes_pattern: bool = False
    """Its first argument is reward.format_pattern."""


VERIFIERS = {
    "countdown": VerifierEntry(
        f"{_VERIFIERS}.countdown:countdown",
        reading=f"{_VERIFIERS}.text:whole_response",
        trials=f"{_VERIFIERS}.text:any_verdict",
        instant=True,
    ),
    "exact": VerifierEntry(f"{_VERIFIERS}.text:exact", reading=f"{_VERIFIERS}.text:whole_response", instant=True),
    "format": VerifierEntry(f"{_VERIFIERS}.text:response_format", takes_pattern=True),
    "ifeval": VerifierEntry(f"{_VERIFIERS}.ifeval:ifeval", trials=f"{_VERIFIERS}.text:any_verdict"),
    "math": VerifierEntry(
        f"{_VERIFIERS}.math:math_answer",
        reading=f"{_VERIFIERS}.math_reading:boxed_answer",
        trials=f"{_VERIFIERS}.math_reading:math_trials",
        decisive=f"{_VERIFIERS}.math_reading:box_alone",
    ),
}

ADVANTAGES = ("grpo", "grpo_no_std", "rloo", "reinforce_plus_plus_baseline", "nsr", "w_reinforce")


def verifier_entry(name: str) -> VerifierEntry:
    """The row of a verifier; of one of somebody's own (`module:function`) nothing is known."""
    return VERIFIERS.get(name, VerifierEntry(name))


def controller_entry(name: str) -> ControllerEntry:
    """The row of a controller; of one of somebody's own (`module:Class`) nothing is known but that it may steer."""
    return CONTROLLERS.get(name, ControllerEntry(name, steers_alpha=name != OFF))


def unknown_name(name: str, table: Collection[str], *, own: str | None = None) -> str | None:
    """Why a name cannot be chosen; None if it can.

    Args:
        table: what there is.
        own: how something of one's own is named, such as `module:function`; None where it cannot be.
    """
    if name in table or (own is not None and is_module_name(name)):
        return None
    choices = ", ".join(table) + (f", or {own}" if own else "")
    nearest = difflib.get_close_matches(name, table, n=1)
    return f"expected one of {choices}" + (f"; did you mean {nearest[0]}?" if nearest else "")
