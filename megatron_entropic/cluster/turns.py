"""Who has the devices: the policy or the engines.

              policy                                   engines, where cluster.colocate puts both on the same devices
    rollout   what policy.offload names is offloaded   awake
    training  whole                                    asleep: weights in host memory, no KV cache
    publish   parameters only                          weights awake, still no KV cache

Whoever starts to work takes the turn first, so the loop does not know of it. Each step is complete before the next one
begins: what one side frees is there when the other asks for it.
"""

from __future__ import annotations

from typing import Literal

from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.cluster.policy_group import PolicyGroup

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""What vLLM wakes apart from each other."""


class DeviceTurns:
    """Gives the turns. Begins with the policy's, engines that share its devices being asleep."""

    def __init__(self, policy: PolicyGroup, engines: EngineGroup, *, colocated: bool) -> None:
        self._policy = policy
        self._engines = engines
        self._colocated = colocated
        self._turn: Literal["rollout", "training", "publish"] = "training"
        policy.before_training = self.to_training
        policy.before_publishing = self.to_publish
        engines.before_rollout = self.to_rollout

    def to_rollout(self) -> None:
        """The engines generate next."""
        if self._turn == "rollout":
            return
        self._policy.offload()
        if self._colocated:
            self._engines.wake([KV_CACHE] if self._turn == "publish" else [WEIGHTS, KV_CACHE])
        self._turn = "rollout"

    def to_training(self) -> None:
        """The policy scores, updates, saves or exports next; it fetches what it needs by itself."""
        if self._turn == "training":
            return
        if self._colocated:
            # vLLM falls asleep from being awake, not from half of it.
            self.to_rollout()
            self._engines.sleep()
        self._turn = "training"

    def to_publish(self) -> None:
        """Both hold weights next."""
        if self._turn == "publish":
            return
        if self._colocated:
            self.to_training()
            self._policy.offload(keep_parameters=True)
            self._engines.wake([WEIGHTS])
        self._turn = "publish"
