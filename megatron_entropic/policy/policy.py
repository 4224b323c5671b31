"""One policy rank, with everything the driver can ask of it. Every method is called on all ranks together.

    score --> old log-probs, entropy of the batch --> update (one optimizer step) --> publish, save, export

The driver calls it through an actor; nothing here knows how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.checkpoints.run_checkpoints import changed_files
from megatron_entropic.config.algorithm import FrozenName
from megatron_entropic.config.policy import OFFLOAD_PARTS, OffloadPart, PolicyConfig
from megatron_entropic.config.run import Config
from megatron_entropic.models.adapters import adapter_map
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.batch.balance import attention_weight
from megatron_entropic.policy.batch.prefix_sharing import shares_prefixes
from megatron_entropic.policy.megatron.parallel import (
    destroy_model_parallel,
    initialise_model_parallel,
    sum_of_token_statistics,
)
from megatron_entropic.policy.megatron.platform import Device, Rendezvous, select_platform
from megatron_entropic.policy.model.adapters import fill_adapters
from megatron_entropic.policy.model.load import load_weights
from megatron_entropic.policy.model.outputs import OutputOptions
from megatron_entropic.policy.model.routing import Routing
from megatron_entropic.policy.model.transformer_config import DTYPES
from megatron_entropic.policy.publish.gather import AdapterWeights, RankWeights
from megatron_entropic.policy.publish.publisher import BUCKET_BYTES, Published, Publisher, SenderType
from megatron_entropic.policy.state import checkpoint
from megatron_entropic.policy.state.checkpoint_writer import CheckpointWriter
from megatron_entropic.policy.state.export import BackgroundExport, Exported, export_hf
from megatron_entropic.policy.state.kept_weights import KeptWeights
from megatron_entropic.policy.state.offload import DeviceMemory
from megatron_entropic.policy.step.control import (
    EntropyControl,
    EntropyMeasurement,
    build_control,
    collect_control_state,
    measured_entropy,
    restore_control_state,
)
from megatron_entropic.policy.step.gradient_step import GradientStep
from megatron_entropic.policy.step.loss_fields import LossSettings
from megatron_entropic.policy.step.optimizer import PolicyOptimizer, wrap_data_parallel
from megatron_entropic.policy.step.score import score_sequences
from megatron_entropic.policy.step.sft import warm_start_optimizer, warm_start_step
from megatron_entropic.policy.step.update import PolicyUpdate
from megatron_entropic.types import Scores, Sequence
from megatron_entropic.weight_sync.gloo import GlooSender, local_address
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan


class Policy:
    """One rank's part of the policy: process group, model, optimizer, entropy control.

    Args:
        rendezvous: address at which all policy ranks meet, and this rank's number among them.
        device: "auto" takes CUDA where there is one.
        sender_type: class that carries weights to the rollout engines.

    Attributes that others build on: `platform`, `parallel`, `parameter_map` (with `.dimensions`), `model` (the chunks
    of this rank's stage, not wrapped), `plan` (buckets of its parameters), `optimizer`.

    Raises:
        UserError: the model directory or the layout does not work; all reasons in one message.
        PhaseTimeout: not all ranks joined in time.
    """

    def __init__(
        self,
        config: Config,
        rendezvous: Rendezvous,
        *,
        device: Device = "auto",
        sender_type: SenderType = GlooSender,
    ) -> None:
        self.config = config
        self.platform = select_platform(device)
        self.platform.init_process_group(rendezvous, timeout_s=config.policy.distributed_timeout_s)
        self.parameter_map = ParameterMap(read_dimensions(config.model.hf_dir))
        shared = shares_prefixes(config.policy, self.parameter_map.dimensions, on_cpu=self.platform.takes_prefixes)
        self.parallel = initialise_model_parallel(config.policy, share_prefixes=shared)
        self.platform.manual_seed(config.run.seed)
        self.model = self._load(config.model.hf_dir, config.policy, config.model.megatron_dir)
        self._frozen = {name: self._load_frozen(name) for name in config.frozen_copies}
        self._wrapped = wrap_data_parallel(
            self.model,
            distributed_optimizer=config.policy.distributed_optimizer,
            overlap=self.platform.backend == "nccl",
            gradient_dtype=config.policy.gradient_dtype,
        )
        self._memory = DeviceMemory(self.platform, self._wrapped, self._frozen.values())
        self._kept = KeptWeights(self.model, self.platform)
        self._start = KeptWeights(self.model, self.platform)
        if config.reference_is_the_start:
            self._start.keep()
        self._machinery = GradientStep(
            self._wrapped,
            self.parallel,
            self.platform.device,
            config.policy.tokens_per_microbatch,
            attention_weight(self.parameter_map.dimensions),
        )
        self._control = build_control(config, self.parallel, self.platform.device)
        settings = LossSettings.from_config(config)
        self._update = PolicyUpdate(
            self._machinery,
            settings,
            OutputOptions(config.rollout.temperature, head=config.output_head),
            self._control,
            replay=config.policy.moe_router_replay != "off",
            teacher=self._frozen["teacher"] if config.algorithm.distillation.as_loss else None,
        )
        self.plan = self._plan(self.parameter_map)
        self._weights = RankWeights(self.model, self.plan, self.parameter_map, self.parallel)
        self._exported = Exported(self._weights, config.model.hf_dir, self._adapter_weights())
        self._publisher = self._build_publisher(local_address(rendezvous.address, rendezvous.port), sender_type)
        self._exports = BackgroundExport(self._exported, keep_last=config.checkpoint.keep_last)
        self._checkpoints = CheckpointWriter(
            config.checkpoint,
            self.platform.device,
            timeout_s=config.cluster.checkpoint_timeout_s,
            keep_steps={step - 1 for step in config.train.record_steps},
        )
        self._scored: EntropyMeasurement | None = None
        self._freshly_scored = False
        self._warming_up = config.warm_start.steps > 0
        self.optimizer = self._build_optimizer()

    def keep_weights(self) -> None:
        """Keep a copy of the parameters in host memory, in the place of the one before, for `score`."""
        self._memory.restore(["parameters"])
        self.synchronize_parameters()
        self._kept.keep()

    def score_kept(self, sequences: list[Sequence]) -> Scores | None:
        """Score as `score` does, measuring nothing for alpha, with the weights of the last `keep_weights`.

        Where none were kept, with the current ones.
        """
        self._memory.restore(["parameters"])
        self.synchronize_parameters()  # or the forward pass would gather the new ones
        with self._kept.in_place():
            scores = self._scores(self._machinery.model, sequences)
        return scores if self.parallel.reports else None

    def score(self, sequences: list[Sequence], *, frozen: FrozenName | None = None) -> Scores | None:
        """Log-probs and entropies of this replica's response tokens at the rollout temperature, without gradients.

        The entropy of all replicas' tokens becomes the measurement that drives alpha.

        Args:
            sequences: sequences of this replica; may be empty.
            frozen: frozen model to score under, the KL penalty's reference or the teacher; this measures nothing. None:
                the policy.

        Returns:
            On one rank of each replica (`parallel.reports`) statistics in the caller's order, else None.

        Raises:
            ValueError: there is no such frozen model.
        """
        self._memory.restore(["parameters"])
        if frozen == "reference" and self.config.reference_is_the_start:
            return self._score_under_the_start(sequences)
        if frozen is not None and frozen not in self._frozen:
            raise ValueError(f"no {frozen}: the section algorithm asks for none")
        model = self._machinery.model if frozen is None else self._frozen[frozen]
        replays = frozen is None and self.config.policy.moe_router_replay != "off"
        scores = self._scores(model, sequences, record=self._machinery.routing if replays else None)
        if frozen is None:
            self._measure(sequences, scores)
        return scores if self.parallel.reports else None

    def _score_under_the_start(self, sequences: list[Sequence]) -> Scores | None:
        """Score under the adapters that the run began with, which is the KL penalty's reference of a policy with some.

        Adapters begin with B = 0 unless they were given, so this is the model without any, in the same memory.
        """
        self.synchronize_parameters()  # or the forward pass would gather the new ones
        with self._start.in_place():
            scores = self._scores(self._machinery.model, sequences)
        return scores if self.parallel.reports else None

    def update(self, minibatch: list[Sequence]) -> dict[str, float]:
        """Take one optimizer step on this replica's part of a mini-batch.

        Returns:
            Metrics, equal on all ranks; see `PolicyUpdate.step`.

        Raises:
            ValueError: a sequence lacks what the loss reads, nothing was scored yet, or the warm start has not ended.
            RuntimeError: the controller's replicas differ between ranks.
        """
        if self._warming_up:
            raise ValueError("the warm start has not ended: begin_reinforcement_learning() comes before update()")
        self._memory.restore(OFFLOAD_PARTS)
        metrics = self._update.step(minibatch, self.optimizer, freshly_scored=self._freshly_scored)
        if not metrics["optimizer/skipped"]:
            self._freshly_scored = False
        if isinstance(self._control, EntropyControl) and self._control.controller.measures_again:
            # The weights were just changed, as in `score`: gathers that overlap the next pass must have come.
            self.synchronize_parameters()
            self._control.updated(self._measured(minibatch, self._scores(self.model, minibatch)))
        if self._machinery.routing is not None:
            metrics |= self._machinery.routing.metrics()
        if self._control is None and self._scored is not None:
            # Nothing is controlled, but a run without control is compared with one that has it.
            metrics |= {"entropy/mean": self._scored.mean, "entropy/alpha": 0.0, "entropy/alpha_unclipped": 0.0}
            metrics |= {"entropy/integral": 0.0}
            target = self.config.entropy_control.fixed_target
            metrics |= {} if target is None else {"entropy/target": target}
        return metrics

    def warm_start_step(self, sequences: list[Sequence]) -> dict[str, float]:
        """Take one supervised optimizer step: maximum likelihood of the responses of all replicas."""
        self._memory.restore(OFFLOAD_PARTS)
        metrics = warm_start_step(self._machinery, sequences, self.optimizer, self.config.output_head)
        self._freshly_scored = False
        return metrics

    def begin_reinforcement_learning(self) -> None:
        """End the warm start: begin with a fresh optimizer state and the schedule of the `optimizer` section."""
        self._warming_up = False
        self._memory.restore(OFFLOAD_PARTS)
        self.synchronize_parameters()
        del self.optimizer  # its state is as large as the next one's
        self.optimizer = self._build_optimizer()

    def save_checkpoint(self, directory: Path, driver_state: dict[str, Any]) -> None:
        """Write everything this run needs to go on, with the driver's own JSON state, atomically.

        With `checkpoint.asynchronous` it appears later; `check_checkpoint` tells. Older checkpoints beside it are
        deleted as `checkpoint.keep_last` and `keep_every` say.

        Raises:
            CheckpointError: on every rank, also for the one before; earlier checkpoints are complete.
        """
        self._memory.restore(OFFLOAD_PARTS)
        self.synchronize_parameters()
        state = {
            "warming_up": self._warming_up,
            "control": collect_control_state(self._control, self.parallel),
            "scored": None if self._scored is None else [self._scored.entropy_sum, self._scored.token_count],
            "lora": self.config.policy.lora.shape,
            "driver": driver_state,
        }
        self._checkpoints.save(directory, self.model, self.optimizer, state)

    def check_checkpoint(self, wait: bool) -> None:
        """Raise the error of the last checkpoint, if it failed; with `wait` after it has ended."""
        self._checkpoints.check(wait=wait)

    def changed_files(self, directory: Path) -> list[str]:
        """Names of a checkpoint's files that changed after it was written, among this rank's share of them.

        Raises:
            OSError: a file cannot be read from here.
        """
        return changed_files(directory, self.parallel.rank, self.parallel.world_size)

    def load_checkpoint(self, directory: Path) -> dict[str, Any]:
        """Restore a checkpoint of any layout; returns the driver's state.

        Raises:
            CheckpointError: not a complete checkpoint, or it does not fit the model.
        """
        self._memory.restore(OFFLOAD_PARTS)
        if self._warming_up and not checkpoint.read_state(directory)["state"]["warming_up"]:
            self.begin_reinforcement_learning()
        state = checkpoint.load_checkpoint(directory, self.model, self.optimizer)
        restore_control_state(self._control, state["control"], self.parallel)
        self._scored = None if state["scored"] is None else EntropyMeasurement(*state["scored"])
        self._freshly_scored = False
        return state["driver"]

    def export_hf(self, output_dir: Path) -> None:
        """Write the policy as a Hugging Face directory that transformers and vLLM load."""
        self.synchronize_parameters()
        export_hf(output_dir, self._exported)

    def begin_export(self, output_dir: Path) -> None:
        """Copy the weights and write them as a Hugging Face directory in the background."""
        self.synchronize_parameters()
        self._exports.begin(output_dir)

    def check_export(self, wait: bool) -> None:
        """Raise the error of the last background export, if it failed; with `wait` after it has ended."""
        self._exports.check(wait=wait)

    def publish_plan(self) -> PublishPlan:
        """Plan with the buckets that `publish` sends, in order."""
        return self.plan

    def open_transport(self, receivers: int) -> dict[str, Any]:
        """Begin a weight-transfer rendezvous with `receivers` engine workers; sending ranks return how to connect."""
        return self._publisher.open(receivers)

    def accept_receivers(self) -> None:
        """Wait until all engine workers have joined."""
        self._publisher.accept()

    def publish(self) -> Published:
        """Send the current weights to all engines, which must be receiving."""
        self.synchronize_parameters()
        return self._publisher.publish(with_checksums=self.config.cluster.check_weights)

    def synchronize_parameters(self) -> None:
        """Make `model`'s parameters current; whoever reads them without a forward pass calls this first."""
        self._memory.restore(["parameters"])
        self.optimizer.synchronize_parameters()

    def offload(self, parts: tuple[OffloadPart, ...] = OFFLOAD_PARTS) -> dict[str, float]:
        """Give device memory back until the next call that needs what was in it.

        Returns:
            memory/offloaded_mb, which is gone from this rank's device, and memory/rollout_mb, which it uses now; MiB.
        """
        if self._memory.on_device("parameters"):
            self.synchronize_parameters()
        self._memory.release(parts, self.optimizer)
        return {
            "memory/offloaded_mb": self._memory.released_bytes / 2**20,
            "memory/rollout_mb": self.platform.memory_mb(),
        }

    def close(self) -> None:
        """Leave the engines and the process group, after what is being written."""
        self._checkpoints.close()
        self._publisher.close()
        destroy_model_parallel()
        dist.destroy_process_group()

    def peak_memory_mb(self) -> float:
        """Highest memory use of this rank so far, MiB."""
        return self.platform.peak_memory_mb()

    def _load(self, hf_dir: Path, layout: PolicyConfig, megatron_dir: Path | None = None) -> torch.nn.ModuleList:
        # Imports megatron-core, which the platform must have prepared for.
        from megatron_entropic.policy.model.build import build_model

        dimensions = read_dimensions(hf_dir)
        model = build_model(dimensions, layout, self.config.model.dtype, self.parallel, self.platform)
        load_weights(model, hf_dir, self.parallel, megatron_dir=megatron_dir)
        if layout.lora.enabled:
            fill_adapters(model, self.parameter_map, layout.lora, self.parallel, self.config.run.seed)
        return model

    def _load_frozen(self, name: FrozenName) -> torch.nn.ModuleList:
        directory, layout = self.config.frozen_copies[name], self.config.policy.without_adapters
        if directory is None:
            model = self._load(self.config.model.hf_dir, layout, self.config.model.megatron_dir)
        else:
            model = self._load(directory, layout)
        model.requires_grad_(False)
        return model

    def _adapter_weights(self) -> AdapterWeights | None:
        lora = self.config.policy.lora
        if not lora.enabled:
            return None
        adapters = adapter_map(self.parameter_map, lora)
        return AdapterWeights(self.model, self._plan(adapters), adapters, self.parallel, lora)

    def _plan(self, parameter_map: ParameterMap) -> PublishPlan:
        return publish_plan(
            parameter_map,
            self.config.policy,
            bucket_bytes=BUCKET_BYTES[self.platform.device.type],
            dtype=self.config.model.dtype,
        )

    def _build_publisher(self, host: str, sender_type: SenderType) -> Publisher:
        return Publisher(
            self._weights,
            host=host,
            # Shorter than the driver's limit of the whole publication: this error says more.
            timeout_s=0.9 * self.config.cluster.publish_timeout_s,
            mode=self.config.rollout.publish,
            sender_type=sender_type,
        )

    def _build_optimizer(self) -> PolicyOptimizer:
        config = self.config
        total_steps = config.train.steps * config.algorithm.updates_per_rollout
        return PolicyOptimizer(
            self._wrapped,
            warm_start_optimizer(config) if self._warming_up else config.optimizer,
            total_steps=config.warm_start.steps if self._warming_up else total_steps,
            dtype=DTYPES[config.model.dtype],
        )

    def _scores(
        self, model: torch.nn.ModuleList, sequences: list[Sequence], record: Routing | None = None
    ) -> Scores | None:
        return score_sequences(
            model,
            sequences,
            self.parallel,
            temperature=self.config.rollout.temperature,
            tokens_per_microbatch=self.config.policy.tokens_per_microbatch,
            record=record,
        )

    def _measure(self, sequences: list[Sequence], scores: Scores | None) -> None:
        self._scored = self._measured(sequences, scores)
        self._freshly_scored = True
        if isinstance(self._control, EntropyControl):
            self._control.scored(self._scored)

    def _measured(self, sequences: list[Sequence], scores: Scores | None) -> EntropyMeasurement:
        local = torch.zeros(2, dtype=torch.float64, device=self.platform.device)
        if scores is not None:
            config = self.config
            cap, measure = config.rollout.importance_cap, config.entropy_control.measure
            local += measured_entropy(sequences, scores, config.feedback, cap, measure)
        return EntropyMeasurement(*sum_of_token_statistics(local, self.parallel).tolist())
