"""Searches layouts of a model over a number of GPUs for those that fit, fastest first.

    for each split of the GPUs: engines (fastest that fit)  x  policy layouts (fastest that fit)  -->  exact plans

The policy's layout and the engines' are searched apart, because a step's phases add up: score, update and publish
depend on the policy's GPUs, rollout on the rest. Layouts are compared by a sketch of their parameters; only those that
are suggested get an exact plan. What keeps layouts out is noted, so that a search without result says why.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import add
from typing import Any

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import Config
from megatron_entropic.planning.generation import generation_time
from megatron_entropic.planning.hardware import Machine
from megatron_entropic.planning.memory import GIB, StageMemory, rollout_memory, stage_memory
from megatron_entropic.planning.parameters import ParameterTable
from megatron_entropic.planning.plan import (
    Plan,
    frozen_problems,
    gpus_in_use,
    layout_problems,
    make_plan,
    memory_kinds,
    memory_problems,
    publication_time_s,
)
from megatron_entropic.planning.roofline import score_time_s, update_time_s
from megatron_entropic.planning.schedule import Lengths, make_schedule
from megatron_entropic.planning.sketch import SketchedTable, sketched_publication
from megatron_entropic.planning.step import PlannedStep

RECOMPUTE = ("none", "selective", "full")
"""Kinds of recomputation, fastest first: the next is tried where the one before does not fit."""
SPLITS = 16
"""Numbers of policy GPUs that are tried, at equal distances between none and all."""

MEMORY_SHARE = 0.9
"""Share of a policy GPU's memory that a suggestion may fill: activations are estimates."""

MAX_TENSOR_PARALLEL = 8
"""Most ranks of tensor parallelism that are tried: more would leave the node."""
_MAX_PIPELINE_PARALLEL = 32
"""Most pipeline stages that are tried: published layouts of 235 billion parameters have up to 32."""
_MAX_EXPERT_PARALLEL = 64
"""Most ranks that share the experts out: published layouts have up to 64."""

_CONTEXT_SIZES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4)
"""Numbers of chunks of a pipeline stage that are tried: more would send small pieces often."""
_VIRTUAL = "virtual_pipeline_parallel"
_SIZES = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "expert_tensor_parallel")
"""Keys in which suggestions differ: chunks, recomputation and replicas are no reason to list a layout twice."""
_NEAR = 1.05
"""Engines of fewer GPUs are taken if they are at most so much slower: the estimate is no better, and they fail less."""
_KEPT = 24
"""Fastest layouts of each split that are kept: some turn out not to fit by a hair, or the run's checks refuse them."""


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


@dataclass
class Rejections:
    """Why layouts were left out."""

    layouts: int = 0
    """Number of policy layouts that divide the model and the GPUs."""
    smallest: tuple[StageMemory, str] | None = None
    """Fullest stage of the layout that needs least memory, with the layout's name, among those that do not fit."""
    engines: tuple[int, str] | None = None
    """GPUs of the largest engine that was tried, and why it does not fit."""
    refused: list[str] = field(default_factory=list)
    """What the run's own checks say against the fastest layout that fits."""

    def too_large(self, memory: StageMemory, policy: PolicyConfig) -> None:
        """Count a layout that does not fit."""
        if self.smallest is None or memory.total < self.smallest[0].total:
            self.smallest = memory, f"{layout_name(policy)}, recompute {policy.recompute}"

    def reasons(self, gpus: int, gpu_memory_gb: float) -> Iterator[str]:
        """Yields sentences that say why there is no suggestion."""
        yield from self.refused
        if self.engines is not None:
            yield f"no engine fits: with rollout.tensor_parallel={self.engines[0]}, {self.engines[1]}"
        elif not self.layouts:
            yield f"no policy layout divides both the model and {gpus} GPUs, of which engines need some"
        if self.smallest is not None and not self.refused:
            memory, name = self.smallest
            yield (
                f"none of {self.layouts:,} policy layouts fits: {name} needs least, {memory.total / GIB:.1f} GB of the "
                f"{MEMORY_SHARE * gpu_memory_gb:.1f} GB that a suggestion may fill, on stage {memory.stage}: "
                f"{memory_kinds(memory)}"
            )


@dataclass(frozen=True)
class _Half:
    """One side of a layout: a section's changed values, the GPUs it takes and the seconds of its phases."""

    changes: dict[str, Any]
    gpus: int
    time_s: float


@dataclass(frozen=True)
class _Search:
    """What every part of a search needs."""

    config: Config
    table: SketchedTable
    machine: Machine
    lengths: Lengths | None
    rejections: Rejections

    def step(self, config: Config) -> PlannedStep:
        """The training step of one of the configurations that are tried."""
        return PlannedStep(config, self.table, make_schedule(config, self.lengths), self.machine.hardware)


def suggest(
    config: Config,
    table: ParameterTable,
    machine: Machine,
    *,
    lengths: Lengths | None = None,
    objections: Callable[[Config], Iterable[str]],
    count: int = 5,
) -> tuple[list[Suggestion], tuple[str, ...]]:
    """(the `count` fastest layouts that fit, each with other sizes of the policy than replicas; why there is none).

    Args:
        config: everything but the layout is taken as it is.
        table: the parameters of its model.
        machine: the GPUs of policy and engines together, with their number.
        lengths: lengths of prompts and responses; None: shares of their limits.
        objections: what the rest of the project says against running a configuration.
        count: how many layouts are wanted.
    """
    gpus = gpus_in_use(config) if machine.gpus is None else machine.gpus
    search = _Search(config, SketchedTable(table), machine, lengths, Rejections())
    pairs: list[tuple[float, _Half, _Half]] = []
    for policy_gpus, rollout in _fastest_engines(search, gpus).items():
        for policy in _policies(search, _changed(config, {}, rollout.changes), policy_gpus):
            # Engines that run ahead work while the policy learns: the slower side orders the pairs, and what is
            # suggested is simulated.
            together = max if config.rollout.lag else add
            pairs.append((together(policy.time_s, rollout.time_s), policy, rollout))
    found: dict[tuple[int | None, ...], Suggestion] = {}
    for _, policy, rollout in sorted(pairs, key=lambda pair: pair[0]):
        sizes = tuple(policy.changes.get(name) for name in _SIZES)
        changed = _changed(config, policy.changes, rollout.changes)
        if sizes in found:
            continue
        if refused := list(objections(changed)):
            search.rejections.refused = search.rejections.refused or refused
            continue
        plan = make_plan(changed, table, machine, lengths=lengths)
        if plan.problems:
            search.rejections.refused = search.rejections.refused or list(plan.problems)
            continue
        found[sizes] = Suggestion(_overrides(policy.changes, rollout.changes), plan)
        if len(found) == count:
            break
    if found:
        return sorted(found.values(), key=lambda suggestion: suggestion.time_s), ()
    return [], tuple(search.rejections.reasons(gpus, machine.gpu_memory_gb))


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
        f"{section}.{name}={'null' if value is None else str(value).lower()}"
        for section, values in sections
        for name, value in values.items()
    )


def _fastest_engines(search: _Search, gpus: int) -> dict[int, _Half]:
    """Fastest engines for each number of policy GPUs that is tried, on the others; colocated, on all of them."""
    shared = search.config.cluster.colocate
    tried = [gpus] if shared else range(max(1, gpus // SPLITS), gpus, max(1, gpus // SPLITS))
    fastest: dict[int, _Half] = {}
    for policy_gpus in tried:
        others = gpus if shared else gpus - policy_gpus
        halves = [_engines(search, others, size) for size in _tensor_sizes(search.table)]
        if fitting := [half for half in halves if half is not None]:
            best_s = min(half.time_s for half in fitting)
            fastest[policy_gpus] = next(half for half in fitting if half.time_s <= _NEAR * best_s)
    if fastest:
        search.rejections.engines = None
    return fastest


def _engines(search: _Search, gpus: int, tensor: int) -> _Half | None:
    """Engines of `tensor` GPUs each; None unless the model and at least one long sequence fit."""
    if gpus % tensor or search.table.model.dimensions.num_attention_heads % tensor:
        return None
    changes = {"engines": gpus // tensor, "tensor_parallel": tensor}
    step = search.step(_changed(search.config, {}, changes))
    memory = rollout_memory(step, int(search.machine.gpu_memory_gb * GIB))
    if problems := list(memory_problems(step.config, (), memory, search.machine.gpu_memory_gb)):
        if search.rejections.engines is None or tensor >= search.rejections.engines[0]:
            search.rejections.engines = tensor, problems[0]
        return None
    return _Half(changes, gpus, generation_time(step, memory).total_s)


def _policies(search: _Search, config: Config, gpus: int) -> Sequence[_Half]:
    """The fastest ways of laying the policy out on exactly that many GPUs.

    A layout gets the fastest recomputation that fits. Context parallelism is tried where without it nothing fits,
    chunks of stages for what is fast without them.
    """
    halves: list[_Half] = []
    for sizes in _layouts(search, gpus):
        for context in _CONTEXT_SIZES:
            half = _with_context(search, config, sizes, context)
            if half is not None:
                halves.append(half)
                break
    fastest = heapq.nsmallest(_KEPT, halves, key=lambda half: half.time_s)
    layers = search.table.model.dimensions.num_layers
    chunked = []
    for half in fastest:
        tried = [half]
        for chunks in _chunks(layers, half.changes["pipeline_parallel"]):
            other = _laid_out(search, config, half.changes | {_VIRTUAL: chunks})
            tried += [] if other is None else [other]
        chunked.append(min(tried, key=lambda one: one.time_s))
    return chunked


def _with_context(search: _Search, config: Config, sizes: dict[str, Any], context: int) -> _Half | None:
    """A layout with some of its data-parallel ranks used for context parallelism; None if it does not fit or divide."""
    if sizes["data_parallel"] % context:
        return None
    return _laid_out(
        search,
        config,
        sizes | {"context_parallel": context, "data_parallel": sizes["data_parallel"] // context},
    )


def _laid_out(search: _Search, config: Config, sizes: dict[str, Any]) -> _Half | None:
    """A layout with the fastest recomputation that fits; None if none fits or the layout does not divide the model."""
    if sizes["data_parallel"] > config.sequences_per_optimizer_step:
        return None
    limit = MEMORY_SHARE * search.machine.gpu_memory_gb * GIB
    largest: tuple[StageMemory, PolicyConfig] | None = None
    for recompute in RECOMPUTE:
        changes = sizes | {"distributed_optimizer": True, "recompute": recompute}
        changed = _changed(config, changes, {})
        if largest is None:
            if any(_own_problems(changed, search.table)):
                return None
            search.rejections.layouts += 1
        step, policy = search.step(changed), changed.policy
        memories = (stage_memory(step, stage) for stage in step.end_stages)
        memory = next((stage for stage in memories if stage.total > limit), None)
        if memory is None:
            publish_s = publication_time_s(step, sketched_publication(step))
            return _Half(changes, policy.world_size, score_time_s(step) + update_time_s(step) + publish_s)
        largest = memory, policy
    assert largest is not None
    search.rejections.too_large(*largest)
    return None


def _layouts(search: _Search, gpus: int) -> Iterator[dict[str, Any]]:
    """Yields the sizes of all kinds of parallelism but context, where their product is the number of GPUs."""
    layers, experts = search.table.model.dimensions.num_layers, search.table.model.experts
    for tensor in _tensor_sizes(search.table):
        for pipeline in range(1, min(layers, _MAX_PIPELINE_PARALLEL) + 1):
            ends = _ends(layers, pipeline)
            if ends is None or gpus % (tensor * pipeline):
                continue
            data = gpus // (tensor * pipeline)
            # Experts are cut like the other matrices, or whole and shared out over the tensor ranks too.
            expert_tensor = (None,) if experts is None or tensor == 1 else (None, 1)
            for cut, expert in product(expert_tensor, _expert_sizes(search.table)):
                if (tensor * data) % (expert * (cut or tensor)) or (cut and expert == 1):
                    continue
                sizes = {
                    "tensor_parallel": tensor,
                    "pipeline_parallel": pipeline,
                    _VIRTUAL: 1,
                    "context_parallel": 1,
                    "data_parallel": data,
                    "sequence_parallel": tensor > 1,
                } | ends
                yield sizes | ({} if experts is None else {"expert_parallel": expert, "expert_tensor_parallel": cut})


def _ends(layers: int, pipeline: int) -> dict[str, int] | None:
    """Numbers of layers of the first and the last stage where the layers cannot be shared equally; None: not at all.

    The stages between have as many each, the first and the last fewer: they have embedding and output layer besides.
    Only powers of two are laid out like this, as published layouts are: other numbers of stages leave GPUs over.
    """
    if layers % pipeline == 0:
        return {}
    each = -(-layers // pipeline)
    rest = layers - each * (pipeline - 2)
    if pipeline & (pipeline - 1) or rest < 2:
        return None
    return {"first_stage_layers": -(-rest // 2), "last_stage_layers": rest // 2}


def _chunks(layers: int, pipeline: int) -> list[int]:
    return [size for size in _CHUNKS[1:] if pipeline > 1 and layers % (pipeline * size) == 0]


def _tensor_sizes(table: ParameterTable) -> list[int]:
    return [size for size in (1, 2, 4, MAX_TENSOR_PARALLEL) if table.model.dimensions.num_attention_heads % size == 0]


def _expert_sizes(table: ParameterTable) -> list[int]:
    if table.model.experts is None:
        return [1]
    count = table.model.experts.count
    return [size for size in range(1, min(count, _MAX_EXPERT_PARALLEL) + 1) if count % size == 0]


def _own_problems(config: Config, table: ParameterTable) -> Iterator[str]:
    """Problems of the layout itself, whatever number of GPUs there is."""
    yield from (
        problem
        for problem in layout_problems(config, table.model, gpus_in_use(config))
        if problem.startswith("policy.")
    )
    yield from frozen_problems(config, table)


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
    name = " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "1 GPU"
    folded = policy.expert_parallel > 1 and policy.expert_tensor_size != policy.tensor_parallel
    return f"{name} ETP{policy.expert_tensor_size}" if folded else name
