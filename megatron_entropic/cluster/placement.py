"""Where actors go: one bundle for each policy rank and each engine, reserved at once or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_entropic.config import Config, Device
from megatron_entropic.errors import RunError


@dataclass(frozen=True)
class Placement:
    """Reserved bundles. Policy bundles are ordered by node, so that neighbouring ranks (tensor parallel) share one."""

    group: PlacementGroup
    policy_bundles: tuple[int, ...]
    engine_bundles: tuple[int, ...]
    device: Device
    engine_gpus: int

    def policy_options(self, rank: int) -> dict[str, Any]:
        """Ray actor options of a policy rank."""
        return self._options(self.policy_bundles[rank], gpus=1)

    def engine_options(self, engine: int) -> dict[str, Any]:
        """Ray actor options of a rollout engine, which drives `rollout.tensor_parallel` GPUs."""
        return self._options(self.engine_bundles[engine], gpus=self.engine_gpus)

    def release(self) -> None:
        """Give the reservation back."""
        remove_placement_group(self.group)

    def _options(self, bundle: int, gpus: int) -> dict[str, Any]:
        return {
            "num_cpus": 1,
            "num_gpus": gpus if self.device == "cuda" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle),
        }


def bundles(config: Config, device: Device) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Resources of (policy ranks, engines), one dict each."""
    gpu = 1.0 if device == "cuda" else 0.0
    policy = [{"CPU": 1.0, "GPU": gpu} for _ in range(config.policy.world_size)]
    engines = [{"CPU": 1.0, "GPU": gpu * config.rollout.tensor_parallel} for _ in range(config.rollout.engines)]
    return [[{k: v for k, v in bundle.items() if v} for bundle in side] for side in (policy, engines)]  # type: ignore[return-value]


def reserve(config: Config, device: Device) -> Placement:
    """Reserve everything the run needs.

    Raises:
        RunError: the cluster does not have the resources within cluster.startup_timeout_s; says what is there.
    """
    policy, engines = bundles(config, device)
    group = placement_group(policy + engines, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=config.cluster.startup_timeout_s)
    except GetTimeoutError as error:
        remove_placement_group(group)
        raise RunError(
            f"placement: {len(policy)} policy ranks and {len(engines)} engines need "
            f"{_total(policy + engines)}; the Ray cluster has {ray.cluster_resources()} of which "
            f"{ray.available_resources()} are free"
        ) from error
    node_of = placement_group_table(group)["bundles_to_node_id"]
    ranks = sorted(range(len(policy)), key=lambda bundle: (node_of[bundle], bundle))
    return Placement(
        group=group,
        policy_bundles=tuple(ranks),
        engine_bundles=tuple(range(len(policy), len(policy) + len(engines))),
        device=device,
        engine_gpus=config.rollout.tensor_parallel,
    )


def _total(bundles: list[dict[str, float]]) -> str:
    kinds = sorted({kind for bundle in bundles for kind in bundle})
    return ", ".join(f"{sum(bundle.get(kind, 0) for bundle in bundles):g} {kind}" for kind in kinds)
