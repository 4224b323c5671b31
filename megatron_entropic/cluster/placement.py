"""Places of the actors: room for each policy rank and each engine, reserved at once or not at all.

With cluster.colocate an engine of t GPUs has the room of t policy ranks: engine i that of ranks i t to i t + t - 1. To
Ray these are the ranks' GPUs; the engine counts for none and is told which they have (`PolicyGroup.gpus`), since Ray
gives several shares of GPUs to one process only as whole GPUs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_entropic.cluster.nodes import nodes_to_avoid
from megatron_entropic.cluster.waiting import head_refusal
from megatron_entropic.config.run import Config, Device
from megatron_entropic.errors import RunError

NODE_LABEL = "ray.io/node-id"
"""Label that Ray gives every node."""
MOVE_S = 60.0
"""Seconds in which other room for an engine must be found."""


@dataclass(frozen=True)
class Slot:
    """Room for one actor: a bundle of a reservation. Policy ranks of a node, and an engine, may share a bundle."""

    group: PlacementGroup
    bundle: int


@dataclass
class Placement:
    """Reserved slots. Those of the policy are ordered by node: neighbouring ranks (tensor parallel) share one."""

    policy: tuple[Slot, ...]
    engines: tuple[Slot, ...]
    device: Device
    engine_gpus: int
    """GPUs that Ray gives to each engine; 0: those of policy ranks."""
    left: tuple[Slot, ...] = ()
    """Former slots of engines, on nodes that are gone."""

    def policy_options(self, rank: int) -> dict[str, Any]:
        """Ray actor options of a policy rank."""
        return self._options(self.policy[rank], gpus=1)

    def engine_options(self, engine: int) -> dict[str, Any]:
        """Ray actor options of a rollout engine, which drives `rollout.tensor_parallel` GPUs."""
        return self._options(self.engines[engine], gpus=self.engine_gpus)

    def release(self) -> None:
        """Give the reservation back. It goes with the session anyway, and without Ray's head nobody would answer."""
        if head_refusal() is not None:
            return
        for group in {slot.group.id: slot.group for slot in self.policy + self.engines + self.left}.values():
            remove_placement_group(group)

    def move_engines(self, numbers: list[int], config: Config) -> list[str]:
        """Reserve other room for engines whose node is gone; returns the ids of the nodes that have it.

        Raises:
            RunError: there is none.
        """
        # Ray looks for another place for what it lost, too, but never on what was spare when it was asked.
        wanted = bundles(config, self.device, policy_ranks=0)[1][: len(numbers)]
        slots = _reserve({"PACK": wanted}, config, timeout_s=MOVE_S)
        moved = dict(zip(numbers, slots, strict=True))
        self.left += tuple(self.engines[number] for number in numbers)
        self.engines = tuple(moved.get(number, slot) for number, slot in enumerate(self.engines))
        return _nodes(slots)

    def _options(self, slot: Slot, gpus: int) -> dict[str, Any]:
        return {
            "num_cpus": 1,
            "num_gpus": gpus if self.device == "cuda" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                slot.group, placement_group_bundle_index=slot.bundle
            ),
        }


def bundles(config: Config, device: Device, policy_ranks: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Resources of the policy ranks and of the engines, one dict for each of them."""
    gpu = 1.0 if device == "cuda" else 0.0
    policy = [{"CPU": 1.0, "GPU": gpu} for _ in range(policy_ranks)]
    engines = [{"CPU": 1.0, "GPU": gpu * config.rollout.tensor_parallel} for _ in range(config.rollout.engines)]
    return [[{k: v for k, v in bundle.items() if v} for bundle in side] for side in (policy, engines)]  # type: ignore[return-value]


def reserve(config: Config, device: Device, *, policy_ranks: int | None = None) -> Placement:
    """Reserve everything the run needs: all engines, and `policy_ranks` policy ranks (None: all; 0 to evaluate).

    Raises:
        RunError: the cluster does not have the resources within cluster.startup_timeout_s; says what is there.
    """
    policy, engines = bundles(config, device, config.policy.world_size if policy_ranks is None else policy_ranks)
    if config.cluster.colocate and policy:
        return _shared(config, device)
    per_node = config.cluster.policy_ranks_per_node
    if per_node is None or not policy:
        slots = _reserve({"PACK": policy + engines}, config)
        ranks, served = slots[: len(policy)], slots[len(policy) :]
    else:
        nodes = [{kind: amount * per_node for kind, amount in policy[0].items()}] * (len(policy) // per_node)
        slots = _reserve({"STRICT_SPREAD": nodes, "PACK": engines}, config)
        ranks = [slot for slot in slots[: len(nodes)] for _ in range(per_node)]
        served = slots[len(nodes) :]
    return Placement(
        policy=_by_node(ranks),
        engines=tuple(served),
        device=device,
        engine_gpus=config.rollout.tensor_parallel,
    )


def shared_bundles(config: Config, device: Device) -> list[dict[str, float]]:
    """Resources for the policy ranks that can share their devices with an engine, and for the engine's own process.

    One bundle for each engine there could be: what is in a bundle is on one node, as an engine must be.
    """
    width = config.rollout.tensor_parallel
    gpus = {"GPU": float(width)} if device == "cuda" else {}
    return [{"CPU": width + 1.0} | gpus for _ in range(config.policy.world_size // width)]


def _shared(config: Config, device: Device) -> Placement:
    """Reserve room in which policy ranks and engines lie together."""
    slots = _by_node(_reserve({"PACK": shared_bundles(config, device)}, config))
    ranks = tuple(slot for slot in slots for _ in range(config.rollout.tensor_parallel))
    return Placement(ranks, slots[: config.rollout.engines], device, engine_gpus=0)


def _reserve(
    wanted: dict[Literal["PACK", "STRICT_SPREAD"], list[dict[str, float]]],
    config: Config,
    timeout_s: float | None = None,
) -> list[Slot]:
    """Reserve a slot for each bundle, in order; the groups have one strategy each, and all are reserved or none."""
    groups: list[PlacementGroup] = []
    deadline = time.monotonic() + (timeout_s or config.cluster.startup_timeout_s)
    avoided = ",".join(nodes_to_avoid(config.cluster))
    for strategy, bundles_of_group in wanted.items():
        where = [{NODE_LABEL: f"!in({avoided})"}] * len(bundles_of_group)
        options: dict[str, Any] = {"bundle_label_selector": where} if avoided else {}
        groups.append(placement_group(bundles_of_group, strategy=strategy, **options))
        # One after the other: where the first has to wait, for what an earlier run gives back, Ray would place the
        # second and fill a node that the first needs. `ready` would start a process of its own in each group to say so.
        if groups[-1].wait(max(0.0, deadline - time.monotonic())):
            continue
        for group in groups:
            remove_placement_group(group)
        spread = config.cluster.policy_ranks_per_node
        needed = _total(list(chain.from_iterable(wanted.values())))
        raise RunError(
            f"placement: {config.policy.world_size} policy ranks{f' ({spread} on a node)' if spread else ''} and "
            f"{config.rollout.engines} engines need {needed}; the Ray cluster has "
            f"{ray.cluster_resources()} of which {ray.available_resources()} are free"
        )
    return [Slot(group, bundle) for group in groups for bundle in range(group.bundle_count)]


def _by_node(slots: list[Slot]) -> tuple[Slot, ...]:
    """Slots ordered by node, then by bundle."""
    placed = zip(_nodes(slots), slots, strict=True)
    return tuple(slot for _, slot in sorted(placed, key=lambda one: (one[0], one[1].bundle)))


def _nodes(slots: list[Slot]) -> list[str]:
    """Id of the node of each slot."""
    # One table a group: Ray's lists every bundle, and takes 12 ms where there are 1,152.
    groups = {slot.group.id: slot.group for slot in slots}
    nodes = {key: placement_group_table(group)["bundles_to_node_id"] for key, group in groups.items()}
    return [nodes[slot.group.id][slot.bundle] for slot in slots]


def _total(bundles: list[dict[str, float]]) -> str:
    kinds = sorted({kind for bundle in bundles for kind in bundle})
    return ", ".join(f"{sum(bundle.get(kind, 0) for bundle in bundles):g} {kind}" for kind in kinds)
