"""Restored optimizer state, whatever number of optimizers saved it.

With expert_parallel > 1 megatron-core has one optimizer for dense parameters and one for those of experts, else one for
all. Moments are stored by parameter either way; only parameter groups, with step count and rates, are stored apart:

    one        {"optimizer": {"param_groups"}, tensors ..}
    several    {0: {"optimizer": {"param_groups"}, tensors ..}, 1: ..}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_entropic.checkpoints.run_checkpoints import CheckpointError


def state_for(parts: Sequence[Any], state: dict[Any, Any]) -> dict[Any, Any]:
    """The state as megatron's optimizers of this layout expect it.

    Args:
        parts: megatron's optimizers of this rank.
        state: as loaded: tensors as `parts` asked for them, parameter groups as they were saved.

    Raises:
        CheckpointError: another number of optimizers saved it, and they were not distributed ones.
    """
    saved_apart = any("optimizer" in value for key, value in state.items() if isinstance(key, int))
    if saved_apart is (len(parts) > 1):
        return state
    if not all(part.config.use_distributed_optimizer for part in parts):
        raise CheckpointError(
            "a checkpoint saved with expert_parallel=1 is read with expert_parallel > 1, or the other way round, only "
            "with policy.distributed_optimizer=true"
        )
    # What is beside groups and tensors, such as the name of the format, is the same for all optimizers.
    shared = {key: value for key, value in state.items() if not isinstance(key, int)}
    if saved_apart:
        groups = [group for key in state if isinstance(key, int) for group in state[key]["optimizer"]["param_groups"]]
        return {**state[0], **shared, "optimizer": _groups_for(parts[0], groups)}
    groups = state["optimizer"]["param_groups"]
    return {i: {**shared, **state[i], "optimizer": _groups_for(part, groups)} for i, part in enumerate(parts)}


def _groups_for(part: Any, saved: list[dict[str, Any]]) -> dict[str, Any]:
    """A saved group for each group of an optimizer: of experts or not, what is decayed alike was stepped alike."""
    found = []
    for group in part.param_groups:
        alike = next(other for other in saved if other["wd_mult"] == group["wd_mult"])
        found.append({**alike, "is_expert_parallel": group["is_expert_parallel"]})
    return {"param_groups": found}
