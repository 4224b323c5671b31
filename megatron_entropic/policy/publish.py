"""The policy's half of bringing new weights to the rollout engines.

    all ranks of replica 0 --gather_bucket--> rank 0 --broadcast--> workers of all engines        for each bucket

Rank 0 opens a transfer group once; the engines join it and then receive every later publication through it. What
carries the bytes is a `WeightSender`: gloo on a CPU, vLLM's NCCL calls on CUDA, handed in by whoever knows vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_entropic.policy.gather import gather_bucket, sends_weights
from megatron_entropic.policy.load_weights import named_entries
from megatron_entropic.policy.parallel import ParallelState
from megatron_entropic.weights.parameter_map import ParameterMap
from megatron_entropic.weights.plan import PublishPlan
from megatron_entropic.weights.transport import FlatContents, GlooSender, WeightSender

BUCKET_BYTES = 512 * 2**20
"""Default size of a publish plan's buckets; rank 0 and each engine worker hold one or two at a time."""

SenderType = Callable[[str, int, float], WeightSender]
"""(host, number of receivers, timeout in seconds) -> an open group."""


class Publisher:
    """One policy rank's part in publishing. All ranks of the policy call every method together."""

    def __init__(
        self,
        plan: PublishPlan,
        parameter_map: ParameterMap,
        model: torch.nn.Module,
        parallel: ParallelState,
        *,
        host: str,
        timeout_s: float,
        sender_type: SenderType = GlooSender,
    ) -> None:
        """Remember what to send; nothing is opened.

        Args:
            plan: buckets in the order in which the engines receive them.
            parameter_map: of the model.
            model: this rank's stage, not wrapped.
            parallel: this rank's place.
            host: address of rank 0 that the engines can reach.
            timeout_s: limit of the rendezvous and of each broadcast; keep it below the limit of the whole publication,
                so that the more telling message comes first.
            sender_type: builds rank 0's end of the transfer group.
        """
        self.plan = plan
        self._parameter_map = parameter_map
        self._model = model
        self._parallel = parallel
        self._host = host
        self._timeout_s = timeout_s
        self._sender_type = sender_type
        self._sender: WeightSender | None = None

    def open(self, receivers: int) -> dict[str, Any]:
        """Begin a rendezvous with `receivers` engine workers in all; an earlier group is left.

        Returns:
            On rank 0 what every engine needs to connect, apart from its own `rank_offset`; elsewhere nothing.
        """
        self.close()
        if self._parallel.rank != 0:
            return {}
        self._sender = self._sender_type(self._host, receivers, self._timeout_s)
        host, port = self._sender.address
        return {
            "master_address": host,
            "master_port": port,
            "world_size": receivers + 1,
            "timeout_s": self._timeout_s,
        }

    def accept(self) -> None:
        """Wait until all engine workers have joined.

        Raises:
            PhaseTimeout: naming the workers that did not come.
        """
        if self._sender is not None:
            self._sender.accept()

    def publish(self) -> None:
        """Send the model's parameters as they are now; every engine must be receiving the same plan.

        Raises:
            PhaseTimeout, PeerDied: naming bucket, rank and peer.
        """
        if not sends_weights(self._parallel):
            return
        values = {
            entry.megatron_name: parameter
            for entry, parameter in named_entries(self._model, self._parameter_map, self._parallel)
        }
        for bucket in self.plan.buckets:
            flat = gather_bucket(bucket, values, self._parameter_map, self._parallel, "publish")
            if flat is not None:
                assert self._sender is not None, "open() and accept() come before publish()"
                self._sender.send(FlatContents.of_bucket(bucket), flat)

    def close(self) -> None:
        """Leave the transfer group."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
