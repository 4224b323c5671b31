"""Reservations: what is asked of Ray, in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic.cluster import placement
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
