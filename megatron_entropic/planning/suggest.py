"""Searches layouts of a model over a number of GPUs for those that fit, fastest first.

The policy's layout and the engines' are searched apart, because a step's phases add up: score, update and publish
depend on the policy's GPUs, rollout on the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_entropic.config.run import Config, PolicyConfig
from megatron_entropic.planning.hardware import Hardware, hardware_of
from megatron_entropic.planning.memory import GIB, rollout_memory, stage_memory
from megatron_entropic.planning.parameters import ParameterTable
from megatron_entropic.planning.plan import (
    Plan,
    divides,
    gpus_in_use,
    layout_problems,
    make_plan,
    memory_problems,
    publication,
    publication_time_s,
)
from megatron_entropic.planning.roofline import rollout_time_s, score_time_s, update_time_s
from megatron_entropic.planning.schedule import make_schedule

RECOMPUTE = ("none", "selective", "full")
SPLITS = 16
"""Numbers of policy GPUs that are tried, at equal distances between none and all."""

MEMORY_SHARE = 0.9
"""Share of a policy GPU's memory that a suggestion may fill: activations are estimates."""

MAX_TENSOR_PARALLEL = 8
"""Most ranks of tensor parallelism that are tried: more would leave the node."""

_CONTEXT_SIZES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4)
"""Numbers of chunks of a pipeline stage that are tried: more would send small pieces often."""
_VIRTUAL = "virtual_pipeline_parallel"
"""Key of the number of chunks; like recomputation, it is no reason to list a layout twice."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits."""

    overrides: tuple[str, ...]
    """The `dotted.key=value` that select the layout."""
    plan: Plan

    @property
    def time_s(self) -> float:
        """Expected seconds of one training step."""
        assert self.plan.numbers is not None
        return self.plan.numbers.time.total_s

    @property
    def memory_bytes(self) -> int:
        """Peak bytes of the fullest policy GPU."""
        assert self.plan.numbers is not None
        return max(stage.total for stage in self.plan.numbers.memory)


@dataclass(frozen=True)
class _Half:
    """One side of a layout: a section's changed values, the GPUs it takes and the seconds of its phases."""

    changes: dict[str, Any]
    gpus: int
    time_s: float


def suggest(
    config: Config,
    table: ParameterTable,
    *,
    gpus: int,
    gpu_memory_gb: float,
    accepts: Callable[[Config], bool],
    count: int = 5,
) -> list[Suggestion]:
    """The `count` fastest layouts that fit on `gpus` GPUs, each with other sizes of the policy.

    Args:
        config: everything but the layout is taken as it is.
        table: the parameters of its model.
        gpus: number of GPUs of policy and engines together.
        gpu_memory_gb: memory of each GPU, in units of 2**30 bytes.
        accepts: whether the rest of the project runs a configuration.
        count: how many layouts are wanted.
    """
    hardware = hardware_of(gpu_memory_gb)
    engines = _fastest_engines(config, table, gpus, gpu_memory_gb, hardware)
    pairs: list[tuple[float, _Half, _Half]] = []
    for policy_gpus, rollout in engines.items():
        laid_out = _changed(config, {}, rollout.changes)
        for policy in _policies(laid_out, table, policy_gpus, gpu_memory_gb, hardware, accepts):
            pairs.append((policy.time_s + rollout.time_s, policy, rollout))
    found: dict[tuple[int, ...], Suggestion] = {}
    for _, policy, rollout in sorted(pairs, key=lambda pair: pair[0]):
        changed = _changed(config, policy.changes, rollout.changes)
        sizes = tuple(
            value for name, value in policy.changes.items() if name.endswith("_parallel") and name != _VIRTUAL
        )
        if sizes in found:
            continue
        plan = make_plan(changed, table, gpu_memory_gb=gpu_memory_gb, gpus=gpus)
        if plan.problems:
            continue
        found[sizes] = Suggestion(_overrides(policy.changes, rollout.changes), plan)
        if len(found) == count:
            break
    return sorted(found.values(), key=lambda suggestion: suggestion.time_s)


def _changed(config: Config, policy: dict[str, Any], rollout: dict[str, Any]) -> Config:
    """The configuration with another layout."""
    return config.model_copy(
        update={
            "policy": config.policy.model_copy(update=policy),
            "rollout": config.rollout.model_copy(update=rollout),
        }
    )


def _overrides(policy: dict[str, Any], rollout: dict[str, Any]) -> tuple[str, ...]:
    sections = (("policy", policy), ("rollout", rollout))
    return tuple(
        f"{section}.{name}={str(value).lower()}" for section, values in sections for name, value in values.items()
    )


def _fastest_engines(
    config: Config, table: ParameterTable, gpus: int, gpu_memory_gb: float, hardware: Hardware
) -> dict[int, _Half]:
    """Fastest engines for each number of policy GPUs that is tried, on the others; colocated, one on each GPU."""
    if config.cluster.colocate:
        shared = _engines(config, table, gpus, 1, gpu_memory_gb, hardware)
        return {} if shared is None else {gpus: shared}
    fastest: dict[int, _Half] = {}
    for policy_gpus in range(max(1, gpus // SPLITS), gpus, max(1, gpus // SPLITS)):
        rest = gpus - policy_gpus
        halves = (_engines(config, table, rest, size, gpu_memory_gb, hardware) for size in _tensor_sizes(table))
        fitting = [half for half in halves if half is not None]
        if fitting:
            fastest[policy_gpus] = min(fitting, key=lambda half: half.time_s)
    return fastest


def _engines(
    config: Config, table: ParameterTable, gpus: int, tensor: int, gpu_memory_gb: float, hardware: Hardware
) -> _Half | None:
    """Engines of `tensor` GPUs each; None unless the model and at least one long sequence fit."""
    if gpus % tensor or table.model.dimensions.num_attention_heads % tensor:
        return None
    changes = {"engines": gpus // tensor, "tensor_parallel": tensor}
    changed = _changed(config, {}, changes)
    memory = rollout_memory(changed, table, int(gpu_memory_gb * GIB))
    if any(memory_problems(changed, (), memory, gpu_memory_gb)):
        return None
    return _Half(changes, gpus, rollout_time_s(changed, table, make_schedule(changed), memory, hardware))


def _policies(
    config: Config,
    table: ParameterTable,
    gpus: int,
    gpu_memory_gb: float,
    hardware: Hardware,
    accepts: Callable[[Config], bool],
) -> Iterator[_Half]:
    """Every way of laying the policy out on exactly that many GPUs, with the fastest recomputation that fits."""
    for sizes in _layouts(table, gpus):
        fitting = []
        for recompute in RECOMPUTE:
            changes = sizes | {"distributed_optimizer": True, "recompute": recompute}
            changed = _changed(config, changes, {})
            if not divides(changed, table) or any(_own_problems(changed, table)) or not accepts(changed):
                break
            time_s = _policy_time_s(changed, table, gpu_memory_gb, hardware)
            if time_s is not None:
                fitting.append(_Half(changes, gpus, time_s))
        if fitting:
            yield min(fitting, key=lambda half: half.time_s)


def _layouts(table: ParameterTable, gpus: int) -> Iterator[dict[str, Any]]:
    """Yields the sizes of all kinds of parallelism, where tensor x pipeline x context x data is the number of GPUs."""
    layers = table.model.dimensions.num_layers
    for tensor in _tensor_sizes(table):
        for pipeline in (size for size in range(1, layers + 1) if layers % size == 0):
            for virtual, context in product(_chunks(layers, pipeline), _CONTEXT_SIZES):
                if gpus % (tensor * pipeline * context):
                    continue
                data = gpus // (tensor * pipeline * context)
                for expert in _expert_sizes(table, data * context):
                    yield {
                        "tensor_parallel": tensor,
                        "pipeline_parallel": pipeline,
                        _VIRTUAL: virtual,
                        "context_parallel": context,
                        "data_parallel": data,
                        "expert_parallel": expert,
                        "sequence_parallel": tensor > 1,
                    }


def _chunks(layers: int, pipeline: int) -> list[int]:
    return [size for size in _CHUNKS if size == 1 or (pipeline > 1 and layers % (pipeline * size) == 0)]


def _tensor_sizes(table: ParameterTable) -> list[int]:
    return [size for size in (1, 2, 4, MAX_TENSOR_PARALLEL) if table.model.dimensions.num_attention_heads % size == 0]


def _expert_sizes(table: ParameterTable, replicas: int) -> list[int]:
    if table.model.experts is None:
        return [1]
    count = table.model.experts.count
    return [size for size in range(1, count + 1) if count % size == 0 and replicas % size == 0]


def _own_problems(config: Config, table: ParameterTable) -> Iterator[str]:
    """Problems of the layout itself, whatever number of GPUs there is."""
    yield from (
        problem
        for problem in layout_problems(config, table.model, gpus_in_use(config))
        if problem.startswith("policy.")
    )


def _policy_time_s(config: Config, table: ParameterTable, gpu_memory_gb: float, hardware: Hardware) -> float | None:
    """Seconds of score, update and publish; None if some stage does not fit."""
    schedule, policy = make_schedule(config), config.policy
    for stage in sorted({0, min(1, policy.pipeline_parallel - 1), policy.pipeline_parallel - 1}):
        if stage_memory(config, table, schedule, stage).total > MEMORY_SHARE * gpu_memory_gb * GIB:
            return None
    return (
        score_time_s(config, table, schedule, hardware)
        + update_time_s(config, table, schedule, hardware)
        + publication_time_s(config, publication(config, table), hardware)
    )


def layout_name(policy: PolicyConfig) -> str:
    """Short name of a layout, such as `TP2 PP2 DP2`; sizes of 1 are left out."""
    sizes = (
        ("TP", policy.tensor_parallel),
        ("PP", policy.pipeline_parallel),
        ("VPP", policy.virtual_pipeline_parallel),
        ("CP", policy.context_parallel),
        ("EP", policy.expert_parallel),
        ("DP", policy.data_parallel),
    )
    return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "1 GPU"
