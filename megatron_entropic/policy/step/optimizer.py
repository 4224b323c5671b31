"""AdamW over a model that is split over ranks: gradient summation, schedule, clipping, the step and its refusal.

    wrap_data_parallel   model chunks -> megatron DistributedDataParallel
    PolicyOptimizer      megatron's optimizer (distributed or not) with its schedule

Gradients are sums over micro-batches and ranks, never means: the loss carries its own normalisers.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_entropic.checkpoints.run_checkpoints import CheckpointError
from megatron_entropic.config.run import Dtype, OptimizerConfig
from megatron_entropic.policy.megatron.parallel import all_ranks
from megatron_entropic.policy.megatron.patches import apply_optimizer_patches
from megatron_entropic.policy.model.transformer_config import DTYPES
from megatron_entropic.policy.step.optimizer_shards import Shards, all_shards, can_write_shards, read_into_layout

Format = Literal["dp_reshardable", "fully_reshardable"]
"""Name in megatron-core of a way to save a distributed optimizer: its shards as they are, or the whole state."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Outcome of an optimizer step, the same on every rank."""

    stepped: bool
    """Whether the step was taken; if not, a gradient was not finite, and parameters and state are what they were."""
    gradient_norm: float
    """Norm of all gradients before clipping; not finite when the step was refused."""


def wrap_data_parallel(
    chunks: Iterable[Any], *, distributed_optimizer: bool, overlap: bool, gradient_dtype: Dtype = "float32"
) -> torch.nn.ModuleList:
    """Wrap model chunks so that gradients are summed over micro-batches and over data and context ranks.

    By default megatron-core divides the loss by the number of micro-batches and averages gradients over ranks. With
    `calculate_per_token_loss` it does neither and divides by a token count at the end; that division is left out here,
    because the loss already carries its global normalisers (see `loss`).

    Args:
        chunks: this rank's GPTModel chunks; their TransformerConfig is changed as said above.
        distributed_optimizer: whether to shard optimizer state over data-parallel ranks.
        overlap: whether to communicate gradients during backward and, with the distributed optimizer, parameters during
            the next forward. Then parameters are stale after a step until `PolicyOptimizer.synchronize_parameters`.
        gradient_dtype: dtype of the sums, float32 or that of the parameters.

    Returns:
        megatron DistributedDataParallel, one for each chunk.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradient_dtype == "float32",
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
        # A gradient that is not finite is handled by PolicyOptimizer.step, on all ranks alike.
        check_for_nan_in_grad=False,
    )
    chunks = list(chunks)
    model_config = chunks[0].config
    model_config.calculate_per_token_loss = True
    model_config.finalize_model_grads_func = _sum_gradients
    wrapped = [
        DistributedDataParallel(config=model_config, ddp_config=settings, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if overlap:
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return torch.nn.ModuleList(wrapped)


def _sum_gradients(model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Reduce gradients over data, tensor (sequence) and embedding groups as megatron does, without its division."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model, None, **options)


class PolicyOptimizer:
    """AdamW with weight decay on matrices only, gradient clipping and a schedule in successful steps.

    Args:
        chunks: chunks from `wrap_data_parallel`.
        config: the `optimizer` section.
        total_steps: optimizer steps after which `linear` and `cosine` reach min_learning_rate.
        dtype: dtype of the parameters; bfloat16 keeps float32 main parameters.
    """

    def __init__(self, chunks: Iterable[Any], config: OptimizerConfig, *, total_steps: int, dtype: torch.dtype) -> None:
        from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
        from megatron.core.optimizer import get_megatron_optimizer

        apply_optimizer_patches()
        self.config = config
        self._chunks = list(chunks)
        self._device = next(self._chunks[0].parameters()).device
        settings = self._chunks[0].ddp_config
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.learning_rate,
                min_lr=config.min_learning_rate,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.epsilon,
                clip_grad=config.gradient_clip,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=settings.use_distributed_optimizer,
                overlap_param_gather=settings.overlap_param_gather,
                **_precision(config),
            ),
            self._chunks,
            use_gloo_process_groups=False,
        )
        self._stale = False
        # One pass over parameters, moments and gradients instead of eight.
        self._one_pass = self._device.type == "cpu"
        self._create_state()
        self.scheduler = self._build_scheduler(total_steps)

    @property
    def learning_rate(self) -> float:
        """Rate of the last step taken; before the first, the schedule's start."""
        return float(self.megatron.param_groups[0]["lr"])

    @property
    def steps_taken(self) -> int:
        """Number of successful steps, which is where the schedule stands."""
        return int(self.scheduler.num_steps)

    def zero_grad(self) -> None:
        """Clear all gradients; to be called before the first backward of a step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        # What `step` attached: for float32 parameters the buffer itself, into which autograd would add a second time.
        for group in self.megatron.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> StepOutcome:
        """Clip and step, or refuse on all ranks alike when any rank's gradients are not finite."""
        overflow = self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        if not all_ranks(not overflow and math.isfinite(norm), self._device):
            return StepOutcome(stepped=False, gradient_norm=norm)
        if self.config.gradient_clip > 0:
            self._clip(norm)
        self.scheduler.step(1)
        for gathered in self._overlapped():
            _finish_gather(gathered)  # reads what is stepped now
            gathered.param_gather_dispatched = False
        self.megatron.step_with_ready_grads()
        self._stale = True
        return StepOutcome(stepped=True, gradient_norm=norm)

    def synchronize_parameters(self) -> None:
        """Complete the parameters of every rank after a step whose parameter gather overlaps with the next forward.

        Whoever reads parameters without a forward pass (publishing, export, checkpoint) needs it: without, each rank
        has the new values of its own shard only. Costs nothing when there is no such overlap, or no step since.
        """
        if not self._stale:
            return
        for gathered in self._overlapped():
            # megatron-core's start_param_sync(force_sync=True) waits for a gather that is under way, whatever the
            # values it began with, and then gathers nothing.
            _finish_gather(gathered)
            gathered.start_param_sync(force_sync=True)
        self._stale = False

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """Yields Adam's moments and the parameters it steps, float32; shards where the optimizer is distributed."""
        for part in self._parts():
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter.data
                    # Of one parameter after the other: a dictionary's order is that of its making.
                    state = part.optimizer.state[parameter]
                    yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())

    def sharded_state_dict(self, model_state: dict[str, Any], *, loading: bool, format: Format) -> dict[str, Any]:
        """State for megatron's dist_checkpointing.

        Args:
            model_state: sharded state of the chunks.
            loading: whether to give room instead of values.
            format: format of the distributed optimizer; without it every layout can read the state anyway.
        """
        metadata = {"distrib_optim_sharding_type": format, "chained_optim_avoid_prefix": True}
        # megatron-core asks Python for a garbage collection: 0.2 s, more than all else. It leaves frozen objects out.
        gc.freeze()
        try:
            return self.megatron.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
        finally:
            gc.unfreeze()

    def format_to_write(self, wanted: Format) -> Format:
        """Format of a checkpoint of all ranks: `wanted`, or the other one where it cannot be written."""
        distributed = all(part.config.use_distributed_optimizer for part in self.megatron.chained_optimizers)
        possible = distributed and can_write_shards(self.megatron.chained_optimizers)
        if not all_ranks(possible, self._device):
            return "fully_reshardable"
        return wanted

    def shards(self, model_state: dict[str, Any], group: dist.ProcessGroup | None = None) -> Shards:
        """Places of the parameters in the buckets of all ranks; see `optimizer_shards.all_shards`."""
        return all_shards(self.megatron.chained_optimizers, model_state, group)

    def read_shards(self, directory: Path, saved: Shards, model_state: dict[str, Any]) -> dict[Any, Any]:
        """Read the state for `load_state_dict` from a checkpoint whose shards are not those of this layout."""
        return read_into_layout(directory, saved, self.megatron.chained_optimizers, model_state)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], *, steps_taken: int) -> None:
        """Restore moments, main parameters and step counts; rates and decay follow the current configuration.

        Raises:
            CheckpointError: see `optimizer_state.state_for`.
        """
        self.megatron.load_state_dict(state_for(self.megatron.chained_optimizers, state))
        # A state saved before the first step has no step counts, and the groups hold the rates of the run that saved.
        self._create_state()
        for group in self.megatron.param_groups:
            group.update(max_lr=self.config.learning_rate, min_lr=self.config.min_learning_rate)
            group.update(betas=(self.config.beta1, self.config.beta2), eps=self.config.epsilon)
        self.scheduler.num_steps = steps_taken
        self.scheduler.step(0)

    def _build_scheduler(self, total_steps: int) -> Any:
        """Build the schedule; this switches weight decay off for norms and biases.

        megatron's optimizer only notes `wd_mult = 0` for them. The scheduler multiplies, in its constructor and at each
        of its steps: an optimizer stepped without one decays norms too.
        """
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        config = self.config
        return OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=max(total_steps, config.warmup_steps + 1),
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def _create_state(self) -> None:
        """Allocate Adam's state now: saving and loading need it, also before the first step.

        megatron's own initialisation leaves out the step count of torch's AdamW.
        """
        for part in self._parts():
            if part.config.use_precision_aware_optimizer:
                # megatron-core 0.19.2 leaves out the second argument, which Transformer Engine 2 wants.
                for parameter in part.get_parameters():
                    if not part.optimizer.state[parameter]:
                        part.optimizer.initialize_state(parameter, part.config.store_param_remainders)
            part.init_state_fn(part.optimizer, part.config)
            if not isinstance(part.optimizer, torch.optim.Adam):
                continue
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
            if self._one_pass:
                for group in part.optimizer.param_groups:  # also after loading, which restores those of who saved
                    group["fused"] = True

    def _clip(self, norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        # The precision-aware optimizer reads the buffer's gradients, in the dtype that they have there.
        decoupled = self.config.state_dtype != "float32"
        for part in self._parts():
            clip_grad_by_total_norm_fp32(part.get_parameters(), self.config.gradient_clip, norm, decoupled)

    def _overlapped(self) -> Iterator[Any]:
        """Groups of megatron-core's buckets whose parameters are gathered during the forward pass after a step."""
        for chunk in self._chunks:
            if chunk.ddp_config.overlap_param_gather:
                yield from chunk.bucket_groups + chunk.expert_parallel_bucket_groups

    def _parts(self) -> list[Any]:
        """Optimizers of dense and of expert parameters that hold something on this rank."""
        return [part for part in self.megatron.chained_optimizers if not part.is_stub_optimizer]


def _precision(config: OptimizerConfig) -> dict[str, Any]:
    """Settings of megatron-core's precision-aware optimizer; none for float32 moments."""
    if config.state_dtype == "float32":
        return {}
    moments = DTYPES[config.state_dtype]
    moments_of = {"exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    # Main parameters stay whole: of those that are kept as remainders a checkpoint got the rounded half only.
    return {"use_precision_aware_optimizer": True, "store_param_remainders": False, **moments_of}


def _finish_gather(bucket_group: Any) -> None:
    """Wait for a gather of parameters that is under way, if there is one."""
    if bucket_group.param_gather_handle is not None:
        bucket_group.param_gather_handle.wait()
        bucket_group.param_gather_handle = None


# Restored optimizer state, whatever number of optimizers saved it.
#
# With expert_parallel > 1 megatron-core has one optimizer for dense parameters and one for those of experts, else one
# for all. Moments are stored by parameter either way; only parameter groups, with step count and rates, are stored
# apart:
#
#   | one        {"optimizer": {"param_groups"}, tensors ..}
#   | several    {0: {"optimizer": {"param_groups"}, tensors ..}, 1: ..}


def state_for(parts: Sequence[Any], state: dict[Any, Any]) -> dict[Any, Any]:
    """Arrange saved state as megatron's optimizers of this layout expect it.

    Args:
        parts: megatron's optimizers of this rank.
        state: state as loaded: tensors as `parts` asked for them, parameter groups as they were saved.

    Raises:
        CheckpointError: another number of optimizers saved it, and they were not distributed ones.
    """
    saved_apart = any("optimizer" in value for key, value in state.items() if isinstance(key, int))
    if saved_apart is (len(parts) > 1):
        return state
    if not all(part.config.use_distributed_optimizer for part in parts):
        raise CheckpointError(
            "a checkpoint saved with expert_parallel=1 is read with expert_parallel > 1, or the other way round, only "
            "with policy.distributed_optimizer=true"
        )
    # What is beside groups and tensors, such as the name of the format, is the same for all optimizers.
    shared = {key: value for key, value in state.items() if not isinstance(key, int)}
    if saved_apart:
        groups = [group for key in state if isinstance(key, int) for group in state[key]["optimizer"]["param_groups"]]
        return {**state[0], **shared, "optimizer": _groups_for(parts[0], groups)}
    groups = state["optimizer"]["param_groups"]
    return {i: {**shared, **state[i], "optimizer": _groups_for(part, groups)} for i, part in enumerate(parts)}


def _groups_for(part: Any, saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Find a saved group for each group of an optimizer: of experts or not, what is decayed alike was stepped alike."""
    found = []
    for group in part.param_groups:
        alike = next(other for other in saved if other["wd_mult"] == group["wd_mult"])
        found.append({**alike, "is_expert_parallel": group["is_expert_parallel"]})
    return {"param_groups": found}
