"""The nodes of a run: which are up, which of them are kept empty for the loss of another, and which are gone.

    cluster.nodes, in this order    host0   host1   host2   host3      cluster.spare_nodes=1
    all are up                      works   works   works   spare
    host1 is lost                   works   gone    works   works

Ray learns of a loss from a node's silence, which takes it up to half a minute, and until then it would place processes
there. So a node counts as gone, too, when its raylet's port takes no connection.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

import ray

from megatron_entropic.cluster.waiting import GONE_AFTER_S, POLL_S, head_refusal
from megatron_entropic.config.run import ClusterConfig
from megatron_entropic.errors import PeerDied

PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Node:
    """One start of Ray on a machine; a machine that joins again is another one."""

    id: str
    """Ray's, in hexadecimal."""
    names: tuple[str, ...]
    """Every name by which it goes, the one it was started with first."""


@dataclass(frozen=True)
class NodeTable:
    """All nodes that Ray knows or has known."""

    up: list[Node]
    gone: list[Node]

    def missing(self, names: list[str]) -> list[str]:
        """Those of the names by which no node that is up goes."""
        present = {name for node in self.up for name in node.names}
        return [name for name in names if name not in present]

    def spare(self, cluster: ClusterConfig) -> list[Node]:
        """Nodes that are kept empty: those of `cluster.nodes` that are up beyond as many as the run works on."""
        rank = {name: number for number, name in enumerate(cluster.nodes)}
        listed = [node for node in self.up if any(name in rank for name in node.names)]
        listed.sort(key=lambda node: min(rank[name] for name in node.names if name in rank))
        return listed[len(cluster.nodes) - cluster.spare_nodes :] if cluster.spare_nodes else []

    def describe(self, cluster: ClusterConfig) -> str:
        """One line about those of `cluster.nodes`, for people."""
        spare = {name for node in self.spare(cluster) for name in node.names}
        gone = self.missing(cluster.nodes)
        groups = {
            "at work on": [name for name in cluster.nodes if name not in spare and name not in gone],
            "spare": [name for name in cluster.nodes if name in spare],
            "gone": gone,
        }
        return "nodes: " + "; ".join(f"{what} {', '.join(names) or 'none'}" for what, names in groups.items())

    def metrics(self, cluster: ClusterConfig) -> dict[str, float]:
        """Numbers of nodes that are spare and that are gone; nothing for a run without spare nodes."""
        if not cluster.spare_nodes:
            return {}
        return {
            "cluster/spare_nodes": float(len(self.spare(cluster))),
            "cluster/lost_nodes": float(len(self.missing(cluster.nodes))),
        }


def node_table() -> NodeTable:
    """Ask Ray's head for all nodes, and each that it believes to be up whether it is.

    Raises:
        PeerDied: the head is gone.
    """
    _require_head()
    up: list[Node] = []
    gone: list[Node] = []
    for entry in ray.nodes():
        keys = ("NodeName", "NodeManagerHostname", "NodeManagerAddress")
        node = Node(entry["NodeID"], tuple(dict.fromkeys(entry[key] for key in keys)))
        answers = entry["Alive"] and _answers(entry["NodeManagerAddress"], entry["NodeManagerPort"])
        (up if answers else gone).append(node)
    return NodeTable(up, gone)


def nodes_to_avoid(cluster: ClusterConfig) -> list[str]:
    """Ids of the nodes on which nothing may be placed: spare ones, and those that only Ray believes to be up."""
    if not cluster.spare_nodes:
        return []
    table = node_table()
    return [node.id for node in [*table.spare(cluster), *table.gone]]


def _require_head() -> None:
    # Ray 2.60 looks for a head that is gone for a minute, and then ends this process without a word.
    deadline = time.monotonic() + GONE_AFTER_S
    while (error := head_refusal()) is not None:
        if time.monotonic() > deadline:
            raise PeerDied(f"nodes: Ray's head process, gcs_server, is gone ({error})") from error
        time.sleep(POLL_S)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
