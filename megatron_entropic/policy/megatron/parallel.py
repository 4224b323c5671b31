"""This rank's part of the policy: sizes, ranks and groups of every kind of parallelism."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.errors import UserError
from megatron_entropic.models.stages import StageSizes
from megatron_entropic.policy.batch.microbatch import PackingRules
from megatron_entropic.policy.batch.segments import ContextCut


@dataclass(frozen=True)
class ParallelState:
    """This rank's place in the layout. Groups are megatron-core's own; sizes of 1 have a group of one."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    virtual_size: int
    """Number of chunks of the model on each pipeline stage."""
    stage_sizes: StageSizes
    """What the layout says of pipeline stages; with the model's number of layers, where each layer is."""
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int
    expert_data_rank: int
    """Number of this rank's copy among those of its experts."""
    sequence_parallel: bool
    token_alignment: int
    """Number that the tokens of each product must be a multiple of, see `PolicyConfig.token_alignment`."""
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_context_group: dist.ProcessGroup
    """Ranks that hold the same parameters and different tokens (data x context parallel)."""
    model_group: dist.ProcessGroup
    """Ranks that together hold one replica of the policy (tensor x pipeline parallel)."""
    expert_group: dist.ProcessGroup
    """Ranks that together hold one copy of a stage's experts: expert tensor ranks of the first expert-parallel rank,
    then those of the next."""
    share_prefixes: bool = False
    """Whether prompts are computed once, see `prefix_sharing.shares_prefixes`."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, hence the token statistics."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this is the one rank of its pipeline stage that comes first in its tensor and its expert group."""
        return self.tensor_rank == 0 and self.data_rank == 0 and self.context_rank == 0

    def first_rank_of_stage(self, stage: int) -> int:
        """Global rank for which `is_first_of_stage` holds on that pipeline stage: stages are the outermost cut."""
        return stage * (self.world_size // self.pipeline_size)

    @property
    def reports(self) -> bool:
        """Whether this is the reporting rank of its data-parallel replica: the first tensor rank of its last stage."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's own pipeline, the source of broadcasts within it."""
        return dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)

    @property
    def packing(self) -> PackingRules:
        """Rules of this layout for micro-batches.

        With sequence parallelism tensor ranks get equal parts of the tokens. Interleaved stages run micro-batches in
        groups of one for each stage, of equal length: between two stages that send in both directions at once,
        megatron-core's exchange of lengths mixes them up.
        """
        interleaved = self.virtual_size > 1
        return PackingRules(
            token_multiple=self.token_alignment * (self.tensor_size if self.sequence_parallel else 1),
            cut=ContextCut(self.context_rank, self.context_size),
            count_multiple=self.pipeline_size if interleaved else 1,
            equal_tokens=interleaved,
            share_prefixes=self.share_prefixes,
        )

    @property
    def replicas_meet(self) -> bool:
        """Whether replicas exchange tokens within a forward pass, so that all must run as many: experts do that."""
        return self.expert_size * self.expert_tensor_size > self.tensor_size

    def tensor_place(self, *, of_expert: bool) -> tuple[int, int]:
        """Rank and size of the tensor parallelism that cuts a dense parameter, or one of an expert."""
        if of_expert:
            return self.expert_tensor_rank, self.expert_tensor_size
        return self.tensor_rank, self.tensor_size

    def describe(self) -> str:
        """Short name for messages, such as `rank 3 (tp 1, pp 1, dp 0)`."""
        context = f"cp {self.context_rank}, " if self.context_size > 1 else ""
        experts = f", ep {self.expert_rank}" if self.expert_size > 1 else ""
        place = f"tp {self.tensor_rank}, pp {self.pipeline_rank}, {context}dp {self.data_rank}{experts}"
        return f"rank {self.rank} ({place})"


def layout_problems(policy: PolicyConfig, world_size: int) -> list[str]:
    """Reasons why a layout cannot be built on `world_size` ranks; empty if it can."""
    problems = []
    if policy.world_size != world_size:
        problems.append(
            f"tensor x pipeline x context x data parallel = {policy.world_size}, but there are {world_size} ranks"
        )
    return problems


def initialise_model_parallel(policy: PolicyConfig, *, share_prefixes: bool = False) -> ParallelState:
    """Create megatron-core's process groups for this layout; torch.distributed must be initialised.

    Args:
        policy: layout.
        share_prefixes: see `ParallelState`.

    Raises:
        UserError: the layout is not supported or does not fit the number of ranks (all reasons in one message).
    """
    from megatron.core import parallel_state

    problems = layout_problems(policy, dist.get_world_size())
    if problems:
        raise UserError("the policy cannot be laid out as asked:\n" + "\n".join(f"  - {p}" for p in problems))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=policy.tensor_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual if (virtual := policy.virtual_pipeline_parallel) > 1 else None,
        context_parallel_size=policy.context_parallel,
        expert_model_parallel_size=policy.expert_parallel,
        expert_tensor_parallel_size=policy.expert_tensor_parallel,
        # Nothing here uses them, and each is a full mesh: a socket to every replica, on every rank.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=policy.distributed_timeout_s / 60,
    )
    return replace(_current_state(policy), share_prefixes=share_prefixes)


def _current_state(policy: PolicyConfig) -> ParallelState:
    from megatron.core import parallel_state

    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=policy.tensor_parallel,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=policy.pipeline_parallel,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=policy.data_parallel,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=policy.context_parallel,
        virtual_size=policy.virtual_pipeline_parallel,
        stage_sizes=StageSizes.of(policy),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=policy.expert_parallel,
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=policy.expert_tensor_size,
        expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
        # With one tensor rank there is nothing to split: megatron-core would only warn and switch it off.
        sequence_parallel=policy.sequence_parallel and policy.tensor_parallel > 1,
        token_alignment=policy.token_alignment,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        data_context_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model_group=parallel_state.get_model_parallel_group(),
        expert_group=parallel_state.get_expert_tensor_and_model_parallel_group(),
    )


def destroy_model_parallel() -> None:
    """End the groups, so that another layout can be initialised in the same processes.

    megatron-core only forgets most of them. Each keeps threads of gloo that wake up a hundred times a second, and a
    layout has some thirty groups.
    """
    from megatron.core import parallel_state

    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the group of all ranks
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


# Small numbers that all policy ranks must agree on. Every function here is called by all ranks of its group.


def all_ranks(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on every rank."""
    return int(_reduced(int(condition), dist.ReduceOp.MIN, device)) == 1


def largest(number: int, device: torch.device) -> int:
    """Largest `number` of any rank."""
    return int(_reduced(number, dist.ReduceOp.MAX, device))


def _reduced(number: int, operation: dist.ReduceOp.RedOpType, device: torch.device) -> torch.Tensor:
    value = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(value, op=operation)
    return value


def sum_of_token_statistics(values: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    """Sum over all replicas the statistics that last stages measured on their own tokens.

    One SUM over data-parallel replicas. Context and tensor parallel ranks hold the same values, gathered or merged
    (`context_parallel`, `tensor_parallel`), and count once. Other stages measured nothing; they receive the result, so
    logs and checkpoints agree.

    Args:
        values: [k] float64 on the policy's device; on stages before the last only its size matters.

    Returns:
        [k] float64, the same on every rank, bit for bit.
    """
    assert values.dtype == torch.float64, "sums over a whole batch lose digits in float32"
    total = values.clone()
    if parallel.is_last_stage:
        if parallel.context_rank:
            total.zero_()
        dist.all_reduce(total, group=parallel.data_context_group)
    if parallel.pipeline_size > 1:
        dist.broadcast(total, src=parallel.last_stage_rank, group=parallel.pipeline_group)
    return total


def verify_equal(values: Mapping[str, float], subject: str, parallel: ParallelState, device: torch.device) -> None:
    """Check that replicated numbers are the same on all ranks, bit for bit.

    Args:
        values: the numbers, same names on every rank.
        subject: words for what the numbers are, for the message.
        parallel: this rank's place.
        device: device of the process groups.

    Raises:
        RuntimeError: on every rank; names the ranks that differ from rank 0, and for each differing number all values.
    """
    names = sorted(values)
    mine = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(parallel.world_size)]
    dist.all_gather(gathered, mine)
    columns = {name: [float(row[column]) for row in gathered] for column, name in enumerate(names)}
    differing = {name: column for name, column in columns.items() if len({_bits(value) for value in column}) > 1}
    if not differing:
        return
    ranks = [r for r in range(parallel.world_size) if any(_bits(c[r]) != _bits(c[0]) for c in differing.values())]
    listed = "; ".join(f"{name} by rank: {column}" for name, column in differing.items())
    raise RuntimeError(f"{subject} must be the same on every rank, but ranks {ranks} differ from rank 0: {listed}")


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)
