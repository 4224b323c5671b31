"""Which policy losses there are: the values of `algorithm.policy_loss`."""

from __future__ import annotations

import importlib

from megatron_entropic.algorithms.losses import batch_losses, token_losses
from megatron_entropic.algorithms.losses.interface import PolicyLoss
from megatron_entropic.errors import UserError

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clipped": PolicyLoss(token_losses.clipped),
    "reinforce": PolicyLoss(token_losses.reinforce),
    "gspo": PolicyLoss(token_losses.gspo, whole_sequences=True),
    "cispo": PolicyLoss(token_losses.cispo),
    "ce_gppo": PolicyLoss(token_losses.ce_gppo),
    "steer": PolicyLoss(batch_losses.steer, plan=batch_losses.steer_plan),
    "clip_cov": PolicyLoss(batch_losses.clip_cov, plan=batch_losses.clip_cov_plan),
    "kl_cov": PolicyLoss(batch_losses.kl_cov, plan=batch_losses.kl_cov_plan),
}


def find_policy_loss(name: str) -> PolicyLoss:
    """The loss called `name`, or the function or `PolicyLoss` that `module:name` names.

    A function from outside may look at whole sequences: it gets their lengths.

    Raises:
        UserError: there is no such loss, or the module cannot be imported.
    """
    if name in POLICY_LOSSES:
        return POLICY_LOSSES[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise UserError(f"algorithm.policy_loss={name!r}: expected {', '.join(POLICY_LOSSES)}, or module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"algorithm.policy_loss={name!r}: {error}") from error
    return found if isinstance(found, PolicyLoss) else PolicyLoss(found, whole_sequences=True)
