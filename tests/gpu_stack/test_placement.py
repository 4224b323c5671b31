"""Where Ray puts ranks and engines on nodes of eight GPUs, which here are numbers only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# name -> nodes, overrides
CASES: dict[str, tuple[int, list[str]]] = {
    "qwen3_8b": (2, []),
    "qwen3_8b, shared": (
        2,
        ["cluster.colocate=true", "policy.offload=all", "policy.data_parallel=4", "rollout.engines=16"],
    ),
    "qwen3_8b, shared by engines of four GPUs": (
        2,
        [
            "cluster.colocate=true",
            "policy.offload=all",
            "policy.data_parallel=4",
            "rollout.tensor_parallel=4",
            "rollout.engines=4",
        ],
    ),
    "qwen3_8b, half a node of ranks": (2, ["cluster.policy_ranks_per_node=4"]),
    "qwen3_8b, engines of two GPUs": (2, ["rollout.tensor_parallel=2", "rollout.engines=4"]),
    "qwen3_32b": (8, []),
    "qwen3_30b_a3b": (4, []),
    "qwen3_235b_a22b": (16, []),
}

STARTED = 2
"""Ranks, and engines, that are started to look at their devices; all of a case would be a few minutes."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
)


def devices_of_actors(config: Any, placement: Any) -> dict[str, list[dict[str, str | None]]]:
    """Environment of the first ranks and engines, which are started as a run starts them, up to `start()`."""
    import ray

    from megatron_entropic.cluster import actors as workers

    def looking(actor: Any) -> Any:
        class Looking(actor.__ray_metadata__.modified_class):
            """The actor itself, which also says what it sees."""

            def variables(self) -> dict[str, str | None]:
                return {name: os.environ.get(name) for name in VARIABLES}

        return ray.remote(max_restarts=0)(Looking)

    def seen(made: list[Any]) -> list[dict[str, str | None]]:
        return ray.get([actor.variables.remote() for actor in made], timeout=300)

    def environment(variables: dict[str, str]) -> dict[str, Any]:
        return {"runtime_env": {"env_vars": variables}}

    of_rank, of_engine = (
        environment(workers.policy_environment(config, "cuda")),
        environment(workers.engine_environment(config, "cuda")),
    )
    rank, engine = looking(workers.PolicyWorker), looking(workers.EngineWorker)
    ranks = [
        rank.options(**placement.policy_options(index), **of_rank).remote(config, index, "cuda")
        for index in range(STARTED * (config.rollout.tensor_parallel if config.cluster.colocate else 1))
    ]
    width = config.rollout.tensor_parallel
    shared = ray.get([actor.gpu.remote() for actor in ranks], timeout=300) if config.cluster.colocate else []
    engines = [
        engine.options(**placement.engine_options(index), **of_engine).remote(
            config, "cuda", shared[index * width : (index + 1) * width]
        )
        for index in range(STARTED)
    ]
    found = {"ranks": seen(ranks), "engines": seen(engines)}
    for actor in ranks + engines:
        ray.kill(actor)
    return found


def _give_nodes_time() -> None:
    """Ray gives a node half a minute to register and has no setting for it; a busy machine takes longer."""
    from ray._private import services

    ask: Any = services.get_node

    def ask_patiently(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 300
        while True:
            try:
                return ask(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise

    services.get_node = ask_patiently


def main(cases: dict[str, tuple[int, list[str]]], nodes: int) -> None:
    """Reserves room for every case in one cluster and prints the node of every rank and engine, as JSON."""
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_DEDUP_LOGS="0")
    # Other programs may need the machine's memory; the actors here need little and Ray would end them for it.
    os.environ.update({"RAY_memory_monitor_refresh_ms": "0"})
    from megatron_entropic.cluster.environment import prepare_ray_environment
    from megatron_entropic.config.run import ClusterConfig

    prepare_ray_environment(ClusterConfig())
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.placement_group import placement_group_table

    from megatron_entropic.cluster.placement import reserve
    from megatron_entropic.config.load import load_config

    _give_nodes_time()
    node = {"num_cpus": 96, "num_gpus": 8, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    found = {}
    try:
        for name, (_, overrides) in cases.items():
            settings = ["model.hf_dir=.", "cluster.startup_timeout_s=300", "cluster.address=auto", *overrides]
            example = EXAMPLES / f"{name.partition(',')[0]}.yaml"
            config = load_config(example, settings)
            placement = reserve(config, "cuda")
            tables = {s.group.id: placement_group_table(s.group) for s in placement.policy + placement.engines}
            sides = (placement.policy, placement.engines)
            ranks, engines = ([tables[s.group.id]["bundles_to_node_id"][s.bundle] for s in side] for side in sides)
            found[name] = {
                "ranks": ranks,
                "engines": engines,
                "tensor": config.policy.tensor_parallel,
                "gpus": [1, placement.engine_gpus],
                "engine_tensor": config.rollout.tensor_parallel,
                "seen": devices_of_actors(config, placement) if nodes == min(n for n, _ in CASES.values()) else None,
            }
            placement.release()
    finally:
        ray.shutdown()
        cluster.shutdown()
    sys.stdout.write(json.dumps(found))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes", sorted({nodes for nodes, _ in CASES.values()}))
def test_tensor_groups_stay_within_a_node(nodes: int) -> None:
    cases = {name: case for name, case in CASES.items() if case[0] == nodes}
    result = subprocess.run(
        [sys.executable, __file__, json.dumps(cases), str(nodes)],
        # Ray refuses to count eight GPUs on a node where no device may be seen.
        env={name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name, where in json.loads(result.stdout).items():
        ranks, engines, size = where["ranks"], where["engines"], where["tensor"]
        groups = [set(ranks[start : start + size]) for start in range(0, len(ranks), size)]
        assert all(len(group) == 1 for group in groups), f"{name}: a tensor group is on several nodes"
        of_rank, of_engine = where["gpus"]
        used = Counter(dict.fromkeys(ranks + engines, 0.0))
        for places, gpus in ((ranks, of_rank), (engines, of_engine)):
            for place in places:
                used[place] += gpus
        assert max(used.values()) <= 8, name
        if "half a node" in name:
            assert sorted(Counter(ranks).values()) == [4, 4], name
        if "shared" in name:
            width = where["engine_tensor"]
            sharing = [set(ranks[start : start + width]) for start in range(0, len(ranks), width)]
            assert sharing == [{engine} for engine in engines], f"{name}: an engine is not where its ranks are"
        if where["seen"] is not None:
            _check_devices(name, where)


def _check_devices(name: str, where: dict[str, Any]) -> None:
    """Each actor sees the GPUs it counts for, and no other; engines see those of their ranks where they share."""
    ranks, engines = where["seen"]["ranks"], where["seen"]["engines"]
    devices = {side: [one["CUDA_VISIBLE_DEVICES"].split(",") for one in seen] for side, seen in where["seen"].items()}
    assert {len(of) for of in devices["ranks"]} == {1}, name
    assert {len(of) for of in devices["engines"]} == {where["engine_tensor"]}, name
    for side, node in (("ranks", where["ranks"]), ("engines", where["engines"])):
        assert node[0] == node[1], name
        assert not set(devices[side][0]) & set(devices[side][1]), f"{name}: two {side} on one GPU"
    if "shared" in name:
        ranks_gpus, engines_gpus = (list(chain.from_iterable(devices[side])) for side in ("ranks", "engines"))
        assert ranks_gpus == engines_gpus, name
    assert {one["CUDA_DEVICE_MAX_CONNECTIONS"] for one in ranks} == {"1"}
    assert {one["CUDA_DEVICE_MAX_CONNECTIONS"] for one in engines} == {None}
    assert {one["NVIDIA_TF32_OVERRIDE"] for one in ranks + engines} == {"0"}
    expandable = None if "shared" in name else "expandable_segments:True"
    assert {one["PYTORCH_ALLOC_CONF"] for one in ranks} == {expandable}
    assert {one["PYTORCH_ALLOC_CONF"] for one in engines} == {None}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
