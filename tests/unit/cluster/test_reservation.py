"""Reservations: what is asked of Ray, in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic.cluster import engine_group, placement
from megatron_entropic.config.run import ClusterConfig, Config
from megatron_entropic.errors import RunError


class Ray:
    """Places groups as it is told, and notes what happens to them."""

    def __init__(self, *placed: bool) -> None:
        self.events: list[str] = []
        self._placed = list(placed)

    def create(self, bundles: list[dict[str, float]], strategy: str) -> Any:
        self.events.append(f"ask {strategy}")
        placed = self._placed.pop(0)

        def wait(timeout_s: float) -> bool:
            self.events.append(f"wait {strategy}")
            return placed

        return SimpleNamespace(wait=wait, bundle_count=len(bundles), strategy=strategy)

    def remove(self, group: Any) -> None:
        self.events.append(f"remove {group.strategy}")


def reserve(monkeypatch: pytest.MonkeyPatch, ray: Ray) -> list[placement.Slot]:
    monkeypatch.setattr(placement, "placement_group", ray.create)
    monkeypatch.setattr(placement, "remove_placement_group", ray.remove)
    monkeypatch.setattr(placement.ray, "cluster_resources", dict)
    monkeypatch.setattr(placement.ray, "available_resources", dict)
    config: Any = Config.model_construct(
        policy=SimpleNamespace(world_size=8),
        rollout=SimpleNamespace(engines=8),
        cluster=ClusterConfig(policy_ranks_per_node=4),
    )
    return placement._reserve({"STRICT_SPREAD": [{"GPU": 4.0}] * 2, "PACK": [{"GPU": 1.0}] * 8}, config)


def test_engines_do_not_fill_the_node_that_ranks_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for both at once, Ray places whichever fits, and two nodes for ranks that need two never come."""
    ray = Ray(True, True)
    assert len(reserve(monkeypatch, ray)) == 10
    assert ray.events == ["ask STRICT_SPREAD", "wait STRICT_SPREAD", "ask PACK", "wait PACK"]


@pytest.mark.parametrize(("placed", "removed"), [((False,), 1), ((True, False), 2)])
def test_nothing_stays_reserved_where_not_all_fits(
    monkeypatch: pytest.MonkeyPatch, placed: tuple[bool, ...], removed: int
) -> None:
    ray = Ray(*placed)
    with pytest.raises(RunError, match=r"8 policy ranks \(4 on a node\) and 8 engines need 16 GPU"):
        reserve(monkeypatch, ray)
    assert [event for event in ray.events if event.startswith("remove")] == ["remove STRICT_SPREAD", "remove PACK"][
        :removed
    ]


def test_an_engine_of_several_gpus_lies_with_the_ranks_that_share_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, float]] = []

    def create(bundles: list[dict[str, float]], strategy: str) -> Any:
        asked.extend(bundles)
        return SimpleNamespace(wait=lambda _: True, bundle_count=len(bundles), id=1)

    nodes = {"bundles_to_node_id": {0: "node b", 1: "node a", 2: "node b", 3: "node a"}}
    monkeypatch.setattr(placement, "placement_group", create)
    monkeypatch.setattr(placement, "placement_group_table", lambda _: nodes)
    config: Any = Config.model_construct(
        policy=SimpleNamespace(world_size=8),
        rollout=SimpleNamespace(engines=3, tensor_parallel=2),
        cluster=ClusterConfig(colocate=True),
    )
    found = placement.reserve(config, "cuda")
    assert asked == [{"CPU": 3, "GPU": 2}] * 4
    assert [slot.bundle for slot in found.policy] == [1, 1, 3, 3, 0, 0, 2, 2]
    assert [slot.bundle for slot in found.engines] == [1, 3, 0]

    started: list[tuple[Any, ...]] = []

    def options(num_gpus: int, **_: Any) -> Any:
        assert num_gpus == 0, "the GPUs are the ranks'"
        actor = SimpleNamespace(place=SimpleNamespace(remote=lambda: None))
        return SimpleNamespace(remote=lambda *arguments: started.append(arguments) or actor)

    monkeypatch.setattr(engine_group, "EngineWorker", SimpleNamespace(options=options))
    monkeypatch.setattr(engine_group, "engine_environment", lambda *_: {})
    monkeypatch.setattr(placement, "PlacementGroupSchedulingStrategy", lambda *_, **__: None)
    engine_group.EngineGroup(config, found, ["0", "1", "2", "3", "0", "1", "2", "3"], load_weights=False)
    assert [gpus for _, _, gpus in started] == [["0", "1"], ["2", "3"], ["0", "1"]]
