"""All policy ranks as one object: the driver's half of the policy.

sequences --split over data-parallel replicas--> ranks --statistics of last stages--> the caller's order
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray

from megatron_entropic.cluster.actors import PolicyWorker, policy_environment
from megatron_entropic.cluster.placement import Placement
from megatron_entropic.cluster.processes import ActorProcess
from megatron_entropic.cluster.waiting import answered, gather, require_raylet
from megatron_entropic.config.algorithm import FrozenName
from megatron_entropic.config.run import ClusterConfig, Config
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.policy.batch.balance import attention_weight
from megatron_entropic.policy.batch.prefix_sharing import deal, shares_prefixes
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Scores, Sequence
from megatron_entropic.weight_sync.plan import PublishPlan

P = ParamSpec("P")
R = TypeVar("R")


class PolicyGroup:
    """All policy ranks, one Ray actor each; every method runs on all of them at once."""

    def __init__(self, config: Config, placement: Placement) -> None:
        """Create the actors; nothing heavy happens before `start`."""
        self._limits: ClusterConfig = config.cluster
        self._world_size = config.policy.world_size
        self._data_parallel = config.policy.data_parallel
        self._measures_rollout = config.feedback == "sampling"
        dimensions = read_dimensions(config.model.hf_dir)
        self._attention_weight = attention_weight(dimensions)
        self._share_prefixes = shares_prefixes(config.policy, dimensions, on_cpu=placement.device == "cpu")
        environment = policy_environment(config, placement.device)
        self._actors = [
            PolicyWorker.options(  # type: ignore[attr-defined]
                **placement.policy_options(rank), runtime_env={"env_vars": environment}
            ).remote(config, rank, placement.device)
            for rank in range(self._world_size)
        ]
        self._offloaded = config.policy.offloaded_parts
        self._offload_metrics: dict[str, float] = {}
        self._places = {self._name(rank): actor.place.remote() for rank, actor in enumerate(self._actors)}
        self._replica_of: list[int] = []

    def processes(self) -> dict[str, ActorProcess]:
        """Processes of the ranks that have told theirs, by name."""
        return answered(self._places)

    def gpus(self) -> list[str]:
        """GPU of each rank, as CUDA_VISIBLE_DEVICES names it on the rank's node."""
        calls = {self._name(rank): actor.gpu.remote() for rank, actor in enumerate(self._actors)}
        return list(gather(calls, phase="placement", timeout_s=self._limits.startup_timeout_s).values())

    def start(self) -> None:
        """Rendezvous, build the model on every rank and load its shard of the Hugging Face weights.

        Raises:
            RunError: a rank could not start; the message is that rank's.
        """
        phase, timeout_s = "policy start", self._limits.startup_timeout_s
        address, port = gather(
            {"policy rank 0": self._actors[0].rendezvous.remote()}, phase=phase, timeout_s=timeout_s
        )["policy rank 0"]
        calls = {self._name(rank): actor.start.remote(address, port) for rank, actor in enumerate(self._actors)}
        self._replica_of = list(gather(calls, phase=phase, timeout_s=timeout_s).values())

    def score(self, sequences: list[Sequence], *, frozen: FrozenName | None = None) -> Scores:
        """Log-probs and entropies of the response tokens under the policy (or a frozen model beside it), in nats."""
        shards = self._deal(sequences)
        if not self._measures_rollout:  # what engines said is half of what would travel, and nobody reads it
            sequences = [replace(sequence, rollout_logprobs=None) for sequence in sequences]
        timeout_s = self._limits.score_timeout_s
        answers = self._on_replicas(Policy.score, sequences, shards, timeout_s, frozen=frozen)
        return self._in_callers_order(answers, shards, len(sequences))

    def keep_weights(self) -> None:
        """Let ranks keep a copy of the weights in host memory, for `score_kept`."""
        self._on_all(Policy.keep_weights, self._limits.update_timeout_s)

    def score_kept(self, sequences: list[Sequence]) -> Scores:
        """Score with the weights of the last `keep_weights`, or the current ones; alpha knows nothing of it."""
        shards = self._deal(sequences)
        answers = self._on_replicas(Policy.score_kept, sequences, shards, self._limits.score_timeout_s)
        return self._in_callers_order(answers, shards, len(sequences))

    def _in_callers_order(self, answers: list[Scores | None], shards: list[list[int]], count: int) -> Scores:
        logprobs: list[Any] = [None] * count
        entropies: list[Any] = [None] * count
        experts: dict[int, Any] = {}
        for rank, scores in enumerate(answers):
            if scores is None:
                continue
            for position, index in enumerate(shards[self._replica_of[rank]]):
                logprobs[index], entropies[index] = scores.logprobs[position], scores.entropies[position]
                experts |= {index: scores.experts[position]} if scores.experts else {}
        assert all(value is not None for value in logprobs), "a data-parallel replica returned no scores"
        return Scores(logprobs, entropies, [experts[index] for index in sorted(experts)])

    def update(self, minibatch: list[Sequence]) -> dict[str, float]:
        """Take one optimizer step on `minibatch`; returns metrics, which are global and equal on every rank."""
        return self._on_replicas(Policy.update, minibatch, self._deal(minibatch), self._limits.update_timeout_s)[0]

    def warm_start_step(self, sequences: list[Sequence]) -> dict[str, float]:
        """Take one supervised optimizer step, maximum likelihood of the responses; returns its metrics."""
        shards, timeout_s = self._deal(sequences), self._limits.update_timeout_s
        return self._on_replicas(Policy.warm_start_step, sequences, shards, timeout_s)[0]

    def begin_reinforcement_learning(self) -> None:
        """Begin with a fresh optimizer state and the schedule of `optimizer`, after a warm start."""
        self._on_all(Policy.begin_reinforcement_learning, self._limits.update_timeout_s)

    def open_transport(self, receivers: int) -> list[dict[str, Any]]:
        """Begin a weight-transfer rendezvous with `receivers` engine workers.

        Returns:
            Arguments by which workers connect to each sending rank, in the order of ranks.
        """
        answers = self._on_all(Policy.open_transport, self._limits.publish_timeout_s, receivers)
        return sorted((answer for answer in answers if answer), key=lambda sender: sender["stage"])

    def accept_receivers(self) -> dict[str, ray.ObjectRef]:
        """Let ranks wait for all engines to connect; to be gathered beside the engines' own pending calls."""
        return self._calls(Policy.accept_receivers)

    def publish(self) -> dict[str, ray.ObjectRef]:
        """Let ranks send the current weights; the pending calls are to be gathered beside the engines' receiving."""
        return self._calls(Policy.publish)

    def publish_plan(self) -> PublishPlan:
        """Plan with the buckets that `publish` sends, in order."""
        return self._on_all(Policy.publish_plan, self._limits.publish_timeout_s)[0]

    def save_checkpoint(self, directory: Path, driver_state: dict[str, Any]) -> None:
        """Save model, optimizer, controller and RNG of all ranks, with the driver's own state, atomically.

        With `checkpoint.asynchronous` it is complete when `check_checkpoint` has waited for it.
        """
        self._on_all(Policy.save_checkpoint, self._limits.checkpoint_timeout_s, directory, driver_state)

    def check_checkpoint(self, *, wait: bool) -> None:
        """Raise the error of the last checkpoint, if it failed; with `wait` after it has ended."""
        self._on_all(Policy.check_checkpoint, self._limits.checkpoint_timeout_s, wait)

    def changed_files(self, directory: Path) -> list[str]:
        """Names of a checkpoint's files that changed after it was written; every rank reads its share of them.

        Raises:
            RunError: a rank cannot read a file that is there for the driver. That is no damage to the checkpoint.
        """
        answers = self._on_all(Policy.changed_files, self._limits.checkpoint_timeout_s, directory)
        return sorted(name for changed in answers for name in changed)

    def load_checkpoint(self, directory: Path) -> dict[str, Any]:
        """Restore all ranks; returns the driver's state."""
        return self._on_all(Policy.load_checkpoint, self._limits.checkpoint_timeout_s, directory)[0]

    def export_hf(self, output_dir: Path) -> None:
        """Write the policy as a Hugging Face directory."""
        self._on_all(Policy.export_hf, self._limits.checkpoint_timeout_s, output_dir)

    def begin_export(self, output_dir: Path) -> None:
        """Copy the weights to rank 0, which writes them as a Hugging Face directory in the background."""
        self._on_all(Policy.begin_export, self._limits.checkpoint_timeout_s, output_dir)

    def check_export(self, *, wait: bool) -> None:
        """Raise the error of the last background export, if it failed; with `wait` after it has ended."""
        call = {self._name(0): self._actors[0].call.remote(Policy.check_export, wait)}
        gather(call, phase="export", timeout_s=self._limits.checkpoint_timeout_s)

    def offload(self, *, keep_parameters: bool = False) -> None:
        """Give the device memory that `policy.offload` names back, until a call needs it."""
        parts = tuple(part for part in self._offloaded if not (keep_parameters and part == "parameters"))
        if parts:
            answers = self._on_all(Policy.offload, self._limits.update_timeout_s, parts)
            self._offload_metrics = {name: max(answer[name] for answer in answers) for name in answers[0]}

    def memory_metrics(self) -> dict[str, float]:
        """Return memory/peak_mb of the rank where it is largest, and what `Policy.offload` returned last."""
        peak = max(self._on_all(Policy.peak_memory_mb, self._limits.score_timeout_s))
        return {"memory/peak_mb": peak, **self._offload_metrics}

    def _deal(self, sequences: list[Sequence]) -> list[list[int]]:
        """Indices of the sequences of each data-parallel replica."""
        return deal(sequences, self._attention_weight, self._data_parallel, shared=self._share_prefixes)

    def _on_replicas(
        self,
        method: Callable[Concatenate[Policy, list[Sequence], P], R],
        sequences: list[Sequence],
        shards: list[list[int]],
        timeout_s: float,
        *arguments: P.args,
        **options: P.kwargs,
    ) -> list[R]:
        require_raylet(method.__name__)
        # One object per replica: its ranks on one node read the same shared memory.
        parts = [ray.put([sequences[index] for index in shard]) for shard in shards]
        calls = {
            self._name(rank): actor.call.remote(method, parts[self._replica_of[rank]], *arguments, **options)
            for rank, actor in enumerate(self._actors)
        }
        return list(gather(calls, phase=method.__name__, timeout_s=timeout_s).values())

    def _on_all(
        self,
        method: Callable[Concatenate[Policy, P], R],
        timeout_s: float,
        *arguments: P.args,
        **options: P.kwargs,
    ) -> list[R]:
        calls = self._calls(method, *arguments, **options)
        return list(gather(calls, phase=method.__name__, timeout_s=timeout_s).values())

    def _calls(
        self, method: Callable[Concatenate[Policy, P], R], *arguments: P.args, **options: P.kwargs
    ) -> dict[str, ray.ObjectRef]:
        require_raylet(method.__name__)
        return {self._name(rank): a.call.remote(method, *arguments, **options) for rank, a in enumerate(self._actors)}

    @staticmethod
    def _name(rank: int) -> str:
        return f"policy rank {rank}"
