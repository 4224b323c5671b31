"""The policy losses of `names.POLICY_LOSSES`, and those of one's own."""

from __future__ import annotations

from megatron_entropic.algorithms.losses.interface import PolicyLoss
from megatron_entropic.config import names
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.errors import UserError

_KEY = "algorithm.policy_loss"


def _of(entry: names.LossEntry) -> PolicyLoss:
    plan = find_attribute(_KEY, entry.plan, arguments=3) if entry.plan else None
    function = find_attribute(_KEY, entry.target, arguments=2)
    return PolicyLoss(function, plan=plan, whole_sequences=entry.whole_sequences)


POLICY_LOSSES: dict[str, PolicyLoss] = {name: _of(entry) for name, entry in names.POLICY_LOSSES.items()}


def find_policy_loss(name: str) -> PolicyLoss:
    """Find the loss called `name`, or the function or `PolicyLoss` that `module:name` names.

    A function from outside may look at whole sequences: it gets their lengths.

    Raises:
        UserError: there is no such loss, or the module cannot be imported.
    """
    if name in POLICY_LOSSES:
        return POLICY_LOSSES[name]
    if problem := names.unknown_name(name, names.POLICY_LOSSES, own="module:function"):
        raise UserError(f"{_KEY}={name!r}: {problem}")
    found = find_attribute(_KEY, name, arguments=2, kind=PolicyLoss)
    return found if isinstance(found, PolicyLoss) else PolicyLoss(found, whole_sequences=True)
