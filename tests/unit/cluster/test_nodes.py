"""Spare nodes: which nodes are kept empty, which count as gone, and how long a start waits for whom."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from megatron_entropic.cluster import engine_group, nodes, placement, session
from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.cluster.nodes import Node, NodeTable, node_table
from megatron_entropic.cluster.placement import Placement, Slot
from megatron_entropic.cluster.processes import ActorProcess
from megatron_entropic.config.checks import violations
from megatron_entropic.config.run import ClusterConfig, Config
from megatron_entropic.errors import PeerDied, RunError

NAMES = ["host0", "host1", "host2", "host3"]


def node(name: str) -> Node:
    return Node(f"id of {name}", (name, f"{name}.site", f"10.0.0.{name[-1]}"))


def table(up: str, gone: str = "") -> NodeTable:
    """Nodes by the digits of their names."""
    return NodeTable([node(f"host{digit}") for digit in up], [node(f"host{digit}") for digit in gone])


@pytest.mark.parametrize(
    ("seen", "spare", "missing"),
    [
        (table("0123"), ["host3"], []),
        (table("3210"), ["host3"], []),  # Ray's order says nothing
        (table("023", "1"), [], ["host1"]),
        (table("0231", "1"), ["host3"], []),  # it has joined again
        (table("03", "12"), [], ["host1", "host2"]),
        (table("01239"), ["host3"], []),  # a stranger of the cluster
    ],
)
def test_the_last_nodes_that_are_up_are_spare_until_others_are_lost(
    seen: NodeTable, spare: list[str], missing: list[str]
) -> None:
    cluster = ClusterConfig(nodes=NAMES, spare_nodes=1)
    assert [one.names[0] for one in seen.spare(cluster)] == spare
    assert seen.missing(NAMES) == missing
    assert seen.metrics(cluster) == {"cluster/spare_nodes": len(spare), "cluster/lost_nodes": len(missing)}
    without = ClusterConfig(nodes=NAMES)
    assert seen.spare(without) == []
    assert seen.metrics(without) == {}


def test_people_read_which_nodes_work_are_spare_and_are_gone() -> None:
    cluster = ClusterConfig(nodes=NAMES, spare_nodes=2)
    assert table("013", "2").describe(cluster) == "nodes: at work on host0, host1; spare host3; gone host2"
    assert table("0123").describe(cluster) == "nodes: at work on host0, host1; spare host2, host3; gone none"


def test_a_node_that_only_ray_believes_to_be_up_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray notices a loss after half a minute; ranks that were placed there until then never started."""
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.socket() as lost:
        lost.bind(("127.0.0.1", 0))  # and does not listen

        def entry(name: str, listener: socket.socket, *, alive: bool) -> dict[str, Any]:
            address = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": listener.getsockname()[1]}
            return {"NodeID": f"id of {name}", "NodeName": name, "NodeManagerHostname": "h", "Alive": alive} | address

        entries = [entry("host0", raylet, alive=True), entry("host1", lost, alive=True)]
        entries.append(entry("host2", raylet, alive=False))
        monkeypatch.setattr(nodes.ray, "nodes", lambda: entries)
        monkeypatch.setattr(nodes, "head_refusal", lambda: None)
        seen = node_table()
        assert [one.names for one in seen.up] == [("host0", "h", "127.0.0.1")]
        assert [one.names[0] for one in seen.gone] == ["host1", "host2"]
        cluster = ClusterConfig(nodes=["host0", "host1", "host2"], spare_nodes=2)
        assert nodes.nodes_to_avoid(cluster) == ["id of host1", "id of host2"]
        assert nodes.nodes_to_avoid(ClusterConfig()) == []


def test_ray_is_not_asked_for_nodes_when_its_head_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose Ray was ended together with the driver ended with a stack of Ray's own, a minute later."""
    now = [0.0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(nodes.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(nodes, "head_refusal", lambda: ConnectionRefusedError("nobody listens"))
    monkeypatch.setattr(nodes.ray, "nodes", lambda: pytest.fail("asked"))
    with pytest.raises(PeerDied, match=r"Ray's head process, gcs_server, is gone \(nobody listens\)"):
        node_table()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Seconds that a start waits while it sees the tables, the last one from then on."""

    def wait(cluster: ClusterConfig, *tables: NodeTable) -> float:
        now, seen = [0.0], list(tables)
        monkeypatch.setattr(session, "node_table", lambda: seen.pop(0) if len(seen) > 1 else seen[0])
        monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(session.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
        session._await_nodes(cluster, deadline=600.0)
        return now[0]

    return wait


def test_a_start_waits_for_spare_nodes_for_a_moment_and_not_for_lost_ones(waits: Callable[..., float]) -> None:
    cluster = ClusterConfig(nodes=NAMES, spare_nodes=1)
    assert waits(cluster, table("0"), table("01"), table("0123")) == 1.0
    assert waits(cluster, table("012")) == pytest.approx(session.SPARE_JOIN_S + session.POLL_S)
    assert waits(cluster, table("023", "1")) == 0.0
    assert waits(cluster, table("03", "12"), table("03", "12"), table("031", "12")) == 1.0


def test_without_a_spare_node_left_the_attempt_ends_soon_and_says_who_is_gone(waits: Callable[..., float]) -> None:
    cluster = ClusterConfig(nodes=NAMES, spare_nodes=1)
    with pytest.raises(RunError, match=r"no spare node is left: 2 of 4 nodes are gone .* 1 were spare: host1, host2$"):
        waits(cluster, table("03", "12"))
    with pytest.raises(RunError, match=r"2 of 4 nodes did not join within cluster.startup_timeout_s: host1, host2$"):
        waits(cluster, table("03", "1"))
    with pytest.raises(RunError, match=r"1 of 4 nodes did not join within cluster.startup_timeout_s: host1$"):
        waits(ClusterConfig(nodes=NAMES), table("023", "1"))


def test_spare_nodes_are_some_of_the_nodes_that_are_named() -> None:
    for names, count in (([], 1), (["a"], 1), (["a", "b"], 2)):
        config = Config.model_validate(
            {
                "model": {"hf_dir": "m"},
                "data": {"train_files": ["d"]},
                "cluster": {"nodes": names, "spare_nodes": count},
            }
        )
        (found,) = [one.message for one in violations(config) if "cluster.spare_nodes" in one.keys]
        assert f"cluster.spare_nodes={count}, but cluster.nodes names {len(names)}" in found


class Actor:
    """Stands where an engine's actor does: its methods' calls are their names."""

    def __getattr__(self, name: str) -> Any:
        self.remote = lambda *_, **__: name
        return self


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> EngineGroup:
    """Two engines on host0 and two on host1, which is gone; host2 has been spare."""
    config = Config.model_validate(
        {
            "model": {"hf_dir": "m"},
            "data": {"train_files": ["d"]},
            "rollout": {"engines": 4},
            "cluster": {"nodes": NAMES[:3], "spare_nodes": 1, "max_engine_restarts": 0},
        }
    )
    made: list[int] = []
    group: Any = object()
    slots = Placement((), tuple(Slot(group, number) for number in range(4)), "cpu", engine_gpus=1)
    monkeypatch.setattr(EngineGroup, "_new_actor", lambda self, number: made.append(number) or Actor())
    monkeypatch.setattr(engine_group, "node_table", lambda: table("02", "1"))
    places = {f"engine {number}": ActorProcess(f"id of host{number // 2}", 100 + number) for number in range(4)}
    monkeypatch.setattr(EngineGroup, "processes", lambda self: places)
    for name in ("gather", "kill_processes"):
        monkeypatch.setattr(engine_group, name, lambda *_, **__: None)
    monkeypatch.setattr(engine_group.ray, "kill", lambda actor: None)
    monkeypatch.setattr(engine_group, "dead_peers", lambda pings: [])
    monkeypatch.setattr(engine_group, "head_refusal", lambda: None)
    found = EngineGroup(config, slots, load_weights=False)
    found.made = made  # type: ignore[attr-defined]
    made.clear()
    return found


def test_engines_of_a_lost_node_go_on_on_another_and_do_not_count_as_replaced(
    monkeypatch: pytest.MonkeyPatch, engines: EngineGroup
) -> None:
    asked: list[Any] = []

    def reserve(wanted: Any, config: Config, timeout_s: float) -> list[Slot]:
        asked.append(wanted)
        return [Slot(elsewhere, number) for number in range(2)]

    elsewhere: Any = object()
    monkeypatch.setattr(placement, "_reserve", reserve)
    monkeypatch.setattr(placement, "_nodes", lambda slots: ["id of host2"] * len(slots))
    # Ray does not know of it yet: an engine that does not answer is not called dead.
    lost = engines.find_lost(PeerDied("publish: engine 3 died"))
    assert list(lost) == ["engine 2", "engine 3"]
    engines.replace(lost)
    assert asked == [{"PACK": [{"CPU": 1.0}] * 2}]
    assert engines.made == [2, 3]  # type: ignore[attr-defined]
    assert [slot.group is elsewhere for slot in engines._placement.engines] == [False, False, True, True]
    told = list(map(str, engines.new_losses()))
    assert told[0] == "publish: engine 3 died\nits node is gone; engine 2 goes on on host2"
    with pytest.raises(PeerDied, match="engine 0 hangs"):
        engines.replace({"engine 0": PeerDied("engine 0 hangs")})


def test_without_rays_head_no_node_is_asked_for(monkeypatch: pytest.MonkeyPatch, engines: EngineGroup) -> None:
    """Ray would look for its head for a minute, and then end the driver without a word."""
    monkeypatch.setattr(engine_group, "head_refusal", lambda: ConnectionRefusedError("nobody"))
    monkeypatch.setattr(engine_group, "node_table", lambda: pytest.fail("asked"))
    assert engines.find_lost(PeerDied("Ray's head process, gcs_server, is gone")) == {}


def test_without_room_elsewhere_the_loss_is_told(monkeypatch: pytest.MonkeyPatch, engines: EngineGroup) -> None:
    def refuse(*_: Any, **__: Any) -> list[Slot]:
        raise RunError("placement: 4 engines need 4 GPU")

    monkeypatch.setattr(placement, "_reserve", refuse)
    with pytest.raises(PeerDied, match=r"(?s)engine 2 died\nno other node has room for engine 2: placement: 4 engines"):
        engines.replace({"engine 2": PeerDied("engine 2 died")})
    assert engines.new_losses() == []
