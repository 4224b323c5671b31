"""An engine that is lost while weights are published is replaced, whenever in that phase it goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_entropic.cluster import weight_sync as weight_publisher
from megatron_entropic.cluster.weight_sync import WeightPublisher
from megatron_entropic.config.run import ClusterConfig
from megatron_entropic.errors import PeerDied, RunError


class Part:
    """What a rank says of its publication."""

    elements = 10
    sent_elements = 10


class Policy:
    """Stands where the policy group does."""

    def open_transport(self, receivers: int) -> list[dict[str, Any]]:
        return [{}] * receivers

    def accept_receivers(self) -> dict[str, str]:
        return {"policy rank 0": "accept"}

    def publish_plan(self) -> str:
        return "plan"

    def publish(self) -> dict[str, str]:
        return {"policy rank 0": "publish"}


class Engines:
    """Stands where the engine group does; may replace so many engines."""

    workers = 1

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.replaced: list[str] = []

    def connect(self, senders: list[dict[str, Any]]) -> dict[str, str]:
        return {"engine 0": "connect"}

    def receive(self, plan: str, version: int) -> dict[str, str]:
        return {"engine 0": f"receive {version}"}

    def find_lost(self, error: RunError) -> dict[str, RunError]:
        return {"engine 0": error} if "engine 0" in str(error) else {}

    def replace(self, lost: dict[str, RunError]) -> None:
        if len(self.replaced) + len(lost) > self.limit:
            raise next(iter(lost.values()))
        self.replaced += [str(error) for error in lost.values()]


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str | None]]]:
    """For each phase what its next waits end with; a word is the message of a death."""
    planned: dict[str, list[str | None]] = {}

    def gather(calls: dict[str, str], *, phase: str, timeout_s: float) -> dict[str, Any]:
        word = phase.split(" (")[0]
        death = planned[word].pop(0) if planned.get(word) else None
        if death is not None:
            raise PeerDied(f"{phase}: {death}")
        return dict.fromkeys(calls, Part())

    monkeypatch.setattr(weight_publisher, "gather", gather)
    yield planned
    assert not any(planned.values()), "every planned loss has happened"


def publisher(engines: Engines, *, colocate: bool = False) -> WeightPublisher:
    return WeightPublisher(Policy(), engines, ClusterConfig(colocate=colocate))  # type: ignore[arg-type]


def test_an_engine_lost_in_any_part_of_publishing_is_replaced(outcomes: dict[str, list[str | None]]) -> None:
    engines = Engines(limit=4)
    weights = publisher(engines)
    outcomes["publish"] = ["engine 0 was ended because its node ran out of memory"]
    # One is lost before it is connected, and the new one, too, when it is about to be.
    outcomes["publish: connect"] = ["engine 0 died", None, "engine 0 died again"]
    assert weights.publish(3) == {"weights/published_fraction": 1.0}
    # And one while all are renewed after a loss in generation.
    outcomes["publish"] = ["engine 0 died in renewal"]
    weights.renew()
    assert len(engines.replaced) == 4
    assert engines.replaced[1].startswith("publish (weights version 3): engine 0 was ended")


def test_the_loss_of_a_rank_or_of_more_engines_than_allowed_ends_the_attempt(
    outcomes: dict[str, list[str | None]],
) -> None:
    weights = publisher(engines := Engines(limit=1))
    outcomes["publish"] = ["policy rank 0 died"]
    with pytest.raises(PeerDied, match="policy rank 0 died"):
        weights.publish(1)
    outcomes["publish"] = ["engine 0 died", "engine 0 died too"]
    with pytest.raises(PeerDied, match="engine 0 died too"):
        weights.publish(2)
    assert len(engines.replaced) == 1


def test_a_colocated_engine_is_not_replaced(outcomes: dict[str, list[str | None]]) -> None:
    weights = publisher(Engines(limit=2), colocate=True)
    outcomes["publish"] = ["engine 0 died"]
    with pytest.raises(PeerDied):
        weights.publish(1)
