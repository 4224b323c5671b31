"""A training step that is planned: what all estimates of memory, traffic and time are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_entropic.config.algorithm import FrozenName
from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import ITEM_BYTES, Config, Dtype
from megatron_entropic.planning.activations import Attention
from megatron_entropic.planning.hardware import Hardware
from megatron_entropic.planning.parameters import GradientBuffer, ParameterTable, StageParameters
from megatron_entropic.planning.schedule import Schedule


@dataclass(frozen=True)
class PlannedStep:
    """A configuration with the parameters of its model, the parts of its training step, and the GPUs it runs on."""

    config: Config
    table: ParameterTable
    schedule: Schedule
    hardware: Hardware

    @property
    def policy(self) -> PolicyConfig:
        """Layout of the policy."""
        return self.config.policy

    @property
    def dtype(self) -> Dtype:
        """Dtype of the weights."""
        return self.config.model.dtype

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return ITEM_BYTES[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one gradient as it is added up over micro-batches and ranks."""
        return ITEM_BYTES[self.policy.gradient_dtype]

    @property
    def sends_once_per_node(self) -> bool:
        """Whether a token goes once to each node that has experts for it, as DeepEP's dispatchers send it."""
        return self.hardware.sends_once_per_node or self.policy.moe_dispatcher != "alltoall"

    @property
    def end_stages(self) -> list[int]:
        """First, second and last pipeline stage: those between are like the second."""
        last = self.policy.pipeline_parallel - 1
        return sorted({0, min(1, last), last})

    @property
    def attention(self) -> Attention:
        """Attention whose layers run: torch's (`sdpa`) on a CPU, flash attention on a GPU."""
        return "sdpa" if self.config.cluster.device == "cpu" else "flash"

    @property
    def repeats_feed_forward(self) -> bool:
        """Whether backward computes the feed-forward parts again, which on a GPU is what selective recomputation is."""
        recompute = self.policy.recompute
        return recompute == "full" or (recompute == "selective" and self.attention == "flash")

    @property
    def overlaps(self) -> bool:
        """Whether gradients travel during backward, which they do over NCCL."""
        return self.config.cluster.device != "cpu"

    @property
    def frozen(self) -> dict[FrozenName, ParameterTable]:
        """Parameters of the frozen models beside the policy, by name."""
        return self.table.frozen(self.config.algorithm)

    def of(self, table: ParameterTable) -> PlannedStep:
        """The step with another model in the place of the policy."""
        return replace(self, table=table)

    def trained(self, stage: int) -> StageParameters:
        """Parameters of each rank of a pipeline stage that are trained: all, or the adapters."""
        return self.table.trained(self.policy.lora).stage(self.policy, stage)

    def buffers(self, stage: int) -> tuple[GradientBuffer, ...]:
        """Gradient buffers of each rank of a pipeline stage."""
        return self.table.buffers(self.policy, stage, overlap=self.overlaps)
