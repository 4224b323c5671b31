"""What megatron-core's DistributedOptimizer needs to resume with torch's AdamW (no Transformer Engine, no Apex).

Seen in 0.16.1; 0.19.2 has the same lines. torch's AdamW keeps its step count as one tensor per parameter, Transformer
Engine's as a number per group, and the distributed optimizer's checkpoint code was written for the latter:

1. Loading copies every state tensor of a parameter from the checkpoint, but `step` travels in the parameter groups.
   With `fully_reshardable` it is not among the tensors: KeyError 'step'. With `dp_reshardable` it is what it was when
   loading began: the first steps after a resume are corrected as if they were the first of all.
2. `load_state_dict` gives all parameters the SAME step tensor. AdamW adds 1 to it once per parameter, so with 35
   parameters two steps after a resume at step 2 the count is 72, not 4, and the bias correction is gone. Parameters and
   moments restore exactly: only training on shows it.

Where an optimizer state has no such tensor (Transformer Engine's FusedAdam) both patches do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch


def apply_optimizer_patches() -> None:
    """Install both patches; safe to call more than once. The originals stay reachable as `__wrapped__`."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    _wrap(DistributedOptimizer, "_set_main_param_and_optimizer_states", _keep_own_step)
    _wrap(DistributedOptimizer, "load_state_dict", _give_each_parameter_its_own_step)


def _wrap(owner: type, name: str, replacement: Any) -> None:
    original = getattr(owner, name)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def patched(self: Any, *arguments: Any) -> Any:
        return replacement(original, self, *arguments)

    setattr(owner, name, patched)


def _keep_own_step(original: Any, self: Any, model_param: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Patch 1: the step that `load_state_dict` has already restored holds."""
    current = self._get_main_param_and_optimizer_states(model_param)
    if "step" in current:
        tensors = {**tensors, "step": current["step"]}
    return original(self, model_param, tensors)


def _give_each_parameter_its_own_step(original: Any, self: Any, state_dict: dict[str, Any]) -> None:
    """Patch 2."""
    original(self, state_dict)
    for state in self.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
