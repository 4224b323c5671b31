"""The policy's side of bringing new weights to the rollout engines.

    ranks of a stage --BucketGathering--> its first tensor rank --send--> workers of all engines    for each bucket

Who sends depends on the transport (`SendingRanks`): over gloo every pipeline stage sends its own buckets at the same
time as the others; over NCCL rank 0 sends them all; through the memory of a GPU that rank and engine share, every rank
gets every bucket by one more broadcast and sends it to its own engine. While bucket k is sent, bucket k + 1 is
gathered: a sending rank holds two. The groups are opened once; the engines join them and then receive every later
publication through them. What carries the bytes is a `WeightSender`, handed in by whoever knows vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_entropic.config.run import PublishMode
from megatron_entropic.policy.model.transformer_config import DTYPES
from megatron_entropic.policy.publish.gather import BucketGathering, RankWeights, peers, sends_weights, takes_part
from megatron_entropic.policy.publish.shared_flats import SharedFlats
from megatron_entropic.weight_sync.checksums import checksums
from megatron_entropic.weight_sync.gloo import FlatContents, GlooSender, SendingRanks, WeightSender, named_wait
from megatron_entropic.weight_sync.plan import Bucket
from megatron_entropic.weight_sync.shared_memory import SharedBlock

BUCKET_BYTES = {"cuda": 512 * 2**20, "cpu": 32 * 2**20}
"""Bytes of a publish plan's buckets by device; a sending rank and each engine worker hold two or three at a time.

On a CPU the cost of a collective is small beside that of its bytes, and smaller buckets leave more to do at a time.
"""


class SenderType(Protocol):
    """Class whose call opens the sending end of a transfer group."""

    sending_ranks: SendingRanks

    def __call__(
        self, host: str, receivers: int, timeout_s: float, *, name: str, delta: bool, lent: Sequence[SharedBlock]
    ) -> WeightSender:
        """Open a group that waits for `receivers` workers; `GlooSender` has the arguments."""


@dataclass
class Published:
    """Numbers and checksums of what one rank sent in one publication."""

    elements: int = 0
    """Number of elements of all its buckets."""
    sent_elements: int = 0
    """Number of these elements that travelled: all, or those that had changed."""
    checksums: dict[str, int] = field(default_factory=dict)
    """Checksum of every tensor by Hugging Face name, where checksums were asked for."""


class Publisher:
    """One policy rank's part in publishing. All ranks of the policy call every method together."""

    def __init__(
        self,
        weights: RankWeights,
        *,
        host: str,
        timeout_s: float,
        mode: PublishMode = "full",
        sender_type: SenderType = GlooSender,
    ) -> None:
        """Remember what to send; nothing is opened.

        Args:
            weights: parameters of this rank, and the plan by which the engines receive them.
            host: address of this rank that the engines can reach.
            timeout_s: limit of the rendezvous and of each broadcast; keep it below the limit of the whole publication,
                so that the more telling message comes first.
            mode: full sends everything, delta what changed since the last publication.
            sender_type: class that builds the sending end of a transfer group.
        """
        self._weights = weights
        self._parallel = weights.parallel
        self._host = host
        self._timeout_s = timeout_s
        self._mode = mode
        self._sender_type = sender_type
        self._sending_ranks = sender_type.sending_ranks
        self._gathering = BucketGathering(weights.parameter_map, weights.parallel, "publish")
        self._workspace = self._gathering.workspace
        self._sender: WeightSender | None = None
        self._receivers = 0

    def open(self, receivers: int) -> dict[str, Any]:
        """Begin a rendezvous with `receivers` engine workers in all; an earlier group is left.

        Returns:
            On a sending rank its stage and the arguments by which engines connect to it, apart from their own
            `rank_offset`; elsewhere nothing.
        """
        self.close()
        self._share_memory()
        self._receivers = receivers
        if not self._sends:
            return {}
        own_receivers = 1 if self._sending_ranks == "each" else receivers
        name = f"policy {self._parallel.describe()}"
        # vLLM keeps the tensors of experts until their layer is complete: those buckets have to be copied anyway.
        dense = self._workspace.shared.get(False)
        self._sender = self._sender_type(
            self._host,
            own_receivers,
            self._timeout_s,
            name=name,
            delta=self._mode == "delta",
            lent=dense.blocks if dense else (),
        )
        host, port = self._sender.address
        return {
            "stage": self._parallel.pipeline_rank,
            "master_address": host,
            "master_port": port,
            "world_size": own_receivers + 1,
            "timeout_s": self._timeout_s,
        }

    def accept(self) -> None:
        """Wait until all engine workers have joined.

        Raises:
            PhaseTimeout: naming the workers that did not come.
        """
        if self._sender is not None:
            self._sender.accept()
        for flats in self._workspace.shared.values():
            flats.admit_nobody_else()

    def publish(self, *, with_checksums: bool = False) -> Published:
        """Send the model's parameters as they are now; every engine must be receiving the same plan.

        Args:
            with_checksums: also take the checksum of every tensor that this rank sends.

        Raises:
            PhaseTimeout, PeerDied: naming bucket, rank and peer.
        """
        assert self._receivers, "open() and accept() come before publish()"
        published = Published()
        if not sends_weights(self._parallel) and self._sending_ranks != "each":
            return published
        values = self._weights.values()
        with ThreadPoolExecutor(1) as background:
            sending: Future[int] | None = None
            for bucket in self._buckets():
                flat = self._bring(bucket, values)
                if flat is None or self._sender is None:
                    continue
                if sending is not None:
                    published.sent_elements += sending.result()
                contents = FlatContents.of_bucket(bucket)
                sending = background.submit(self._sender.send, contents, flat)
                published.elements += contents.elements
                if with_checksums:
                    published.checksums |= checksums(contents.split(flat))
            if sending is not None:
                published.sent_elements += sending.result()
        if next(iter(values.values())).device.type != "cpu":
            self._workspace.release()  # a CUDA allocator has its own way of keeping memory at hand
        return published

    def _bring(self, bucket: Bucket, values: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Bring a bucket [bucket.elements] to its sending rank; None elsewhere. All ranks with a part in it call this.

        Raises:
            PhaseTimeout, PeerDied: naming bucket, this rank and its peers.
        """
        flat = self._gathering.bring(bucket, values, to_first_stage=self._sending_ranks == "first")
        if self._sending_ranks != "each":
            return flat
        if flat is None:
            device = next(iter(values.values())).device
            flat = self._workspace.take(f"flat {bucket.index % 2}", bucket.elements, DTYPES[bucket.dtype], device)
        source = self._parallel.first_rank_of_stage(bucket.owner_stage)
        where = f"publish: bucket {bucket.index} ({bucket.hf_names[0]} ..) for every rank"
        with named_wait(where, f"policy {self._parallel.describe()}", f"policy rank {source} and all others"):
            dist.broadcast(flat, src=source)
        return flat

    def _share_memory(self) -> None:
        """Find out which ranks of this stage can write into one buffer.

        Raises:
            PhaseTimeout, PeerDied: naming this rank and its peers.
        """
        parallel = self._parallel
        if next(self._weights.model.parameters()).device.type != "cpu":
            return
        own = [bucket for bucket in self._buckets() if bucket.owner_stage == parallel.pipeline_rank]
        for of_experts, group in {False: parallel.tensor_group, True: parallel.expert_group}.items():
            sizes = [bucket.bytes for bucket in own if bucket.of_experts is of_experts]
            if not sizes or not takes_part(parallel, of_experts=of_experts):
                continue
            waiter = f"policy {parallel.describe()}"
            with named_wait("publish: find shared memory", waiter, peers(of_experts=of_experts)):
                flats = SharedFlats.open(group, max(sizes))
            if flats is not None:
                self._workspace.shared[of_experts] = flats

    def close(self) -> None:
        """Leave the transfer group."""
        for flats in self._workspace.shared.values():
            flats.admit_nobody_else()
        self._workspace.shared.clear()
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    @property
    def _sends(self) -> bool:
        """Whether this rank is the sending end of a group."""
        if self._sending_ranks == "each":
            return self._parallel.rank < self._receivers
        if self._sending_ranks == "first_of_stages":
            return self._parallel.is_first_of_stage
        return self._parallel.rank == 0

    def _buckets(self) -> list[Bucket]:
        """Buckets that this rank gathers, passes on or is given, in plan order."""
        if self._sending_ranks == "first_of_stages":
            return [
                bucket for bucket in self._weights.plan.buckets if bucket.owner_stage == self._parallel.pipeline_rank
            ]
        return list(self._weights.plan.buckets)
