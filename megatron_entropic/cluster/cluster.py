"""Policy and engines of a run as one object, which switches the devices between them.

    |            policy                                   engines, where cluster.colocate puts both on the same devices
    | rollout    what policy.offload names is offloaded   awake
    | training   whole                                    asleep: weights in host memory, no KV cache
    | publish    parameters only                          weights awake, still no KV cache

A turn lasts until another one is taken: changing it costs time, and a checkpoint after a publication needs nothing to
change twice. Each change is complete before the work of the turn begins, so what one side frees is there when the
other asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.cluster.nodes import node_table
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.weight_sync import WeightPublisher
from megatron_entropic.config.run import ClusterConfig

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""Parts of an engine's memory that vLLM wakes apart from each other."""


class Cluster:
    """Policy and engines of a run. It begins with the policy's turn, engines that share its devices being asleep."""

    def __init__(self, config: ClusterConfig, engines: EngineGroup, policy: PolicyGroup | None = None) -> None:
        """Join what has started; without a policy the engines keep the weights they were loaded with."""
        self.engines = engines
        self._policy = policy
        self._weights = None if policy is None else WeightPublisher(policy, engines, config)
        self._config = config
        self._colocated = config.colocate
        self._turn: Literal["rollout", "training", "publish"] = "training"

    @property
    def policy(self) -> PolicyGroup:
        """All policy ranks, for work that needs no device; for anything else see `training`."""
        assert self._policy is not None, "engines alone have no policy"
        return self._policy

    @property
    def version(self) -> int:
        """Version of the weights that were published last; 0 before."""
        return 0 if self._weights is None else self._weights.version

    def describe_nodes(self) -> str:
        """One line about the nodes of the run: at work, spare, gone."""
        return node_table().describe(self._config)

    def node_metrics(self) -> dict[str, float]:
        """cluster/spare_nodes and cluster/lost_nodes; nothing for a run without spare nodes."""
        return node_table().metrics(self._config) if self._config.spare_nodes else {}

    @contextmanager
    def training(self) -> Iterator[PolicyGroup]:
        """Yields the policy, to score, update, load, save or export; it fetches what is offloaded by itself."""
        self._to_training()
        yield self.policy

    @contextmanager
    def rollout(self) -> Iterator[EngineGroup]:
        """Yields the engines, to generate."""
        self._to_rollout()
        yield self.engines

    def publish(self, version: int) -> dict[str, float]:
        """Bring the policy's weights into all engines as `version`; see `WeightPublisher.publish`."""
        assert self._weights is not None, "engines alone have nothing published to them"
        self._to_publish()
        return self._weights.publish(version)

    def renew_weights(self) -> None:
        """Give all engines the current weights once more, after some were replaced."""
        if self._weights is not None:
            self._to_publish()
            self._weights.renew()

    def _to_rollout(self) -> None:
        if self._turn == "rollout":
            return
        if self._policy is not None:
            self._policy.offload()
            if self._colocated:
                self.engines.wake([KV_CACHE] if self._turn == "publish" else [WEIGHTS, KV_CACHE])
        self._turn = "rollout"

    def _to_training(self) -> None:
        if self._turn == "training":
            return
        if self._colocated:
            # vLLM falls asleep from being awake, not from half of it.
            self._to_rollout()
            self.engines.sleep()
        self._turn = "training"

    def _to_publish(self) -> None:
        if self._turn == "publish":
            return
        if self._colocated:
            self._to_training()
            self.policy.offload(keep_parameters=True)
            self.engines.wake([WEIGHTS])
        self._turn = "publish"
