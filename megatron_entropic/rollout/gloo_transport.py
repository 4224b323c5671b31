"""vLLM's weight-transfer engine for CPU: receives flat buffers over gloo and loads them as checkpoint weights.

A publication is one update call, so that the next bucket can be received while vLLM loads the last one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_entropic.weight_sync.gloo import FlatContents, GlooReceiver
from megatron_entropic.weight_sync.plan import PublishPlan
from megatron_entropic.weight_sync.receiving import Arrivals


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Addresses and ranks by which a vLLM worker finds the senders."""

    addresses: list[tuple[str, int]]
    """Host and port of each sender, in the order of pipeline stages."""
    rank_offset: int
    """Rank of this engine's first worker in every sender's group."""
    world_size: int
    """Size of a group: one sender and all workers of all engines."""
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """All buckets of a publication. The lists of tensors are those of vLLM's NCCL engine."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bucket_tensors: list[int]
    """Number of tensors of each bucket."""
    bucket_senders: list[int]
    """Sender of each bucket, by its place in `addresses`."""

    def contents_by_sender(self, senders: int) -> list[list[FlatContents]]:
        """Contents of the buckets of each of `senders` senders, in order."""
        found: list[list[FlatContents]] = [[] for _ in range(senders)]
        first = 0
        for count, sender in zip(self.bucket_tensors, self.bucket_senders, strict=True):
            part = slice(first, first + count)
            found[sender].append(FlatContents.of_update(self.names[part], self.dtype_names[part], self.shapes[part]))
            first += count
        return found


class GlooUpdates:
    """`UpdateCalls` over gloo: one call for all buckets, so that vLLM loads one while the next arrives."""

    def __init__(self, senders: Sequence[dict[str, Any]], ranks: range) -> None:
        """Let every engine worker join the group of every sender."""
        self._senders = len(senders)
        self.init_info: dict[str, Any] = {
            "addresses": [(sender["master_address"], sender["master_port"]) for sender in senders],
            "rank_offset": ranks.start,
            "world_size": senders[0]["world_size"],
            "timeout_s": senders[0]["timeout_s"],
        }

    def of(self, plan: PublishPlan) -> list[AbstractContextManager[dict[str, Any]]]:
        """Arguments of the one update call, as `GlooUpdateInfo` has them."""
        contents = [FlatContents.of_bucket(bucket) for bucket in plan.buckets]
        lists = [bucket.update_info() for bucket in contents]
        together = {key: [value for part in lists for value in part[key]] for key in lists[0]}
        # One sender sends all stages' buckets.
        senders = [bucket.owner_stage if self._senders > 1 else 0 for bucket in plan.buckets]
        return [
            nullcontext(
                together | {"bucket_tensors": [len(bucket.names) for bucket in contents], "bucket_senders": senders}
            )
        ]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receivers of one vLLM worker. vLLM calls start, then update once, then finish."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _receivers: list[GlooReceiver]

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join every sender's group; a second call leaves the first ones."""
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receivers = [
            GlooReceiver(
                host,
                port,
                rank=init_info.rank_offset + worker,
                receivers=init_info.world_size - 1,
                timeout_s=init_info.timeout_s,
            )
            for host, port in init_info.addresses
        ]

    def start_weight_update(self) -> None:
        """Bring the layers back into the form that takes checkpoint weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        _forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive all flat buffers, and load the tensors of each while the next one arrives."""
        contents = update_info.contents_by_sender(len(self._receivers))
        Arrivals(self._receivers, contents).deliver(lambda bucket, flat: self.model.load_weights(bucket.split(flat)))

    def finish_weight_update(self) -> None:
        """Let the layers process their new weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _process_shared_weights(self.model)

    def shutdown(self) -> None:
        """Leave the groups."""
        self._receivers = []


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Let layers with experts pack their new weights as they did the first ones.

    vLLM 0.32 pads and packs the weights of experts for its CPU kernel only where there is no kernel yet, so a reload
    would leave them as they came, and the kernel would take them for packed ones.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None


def _process_shared_weights(model: torch.nn.Module) -> None:
    """Let layers that share a weight with another process its new value.

    vLLM processes a layer when weights arrive under its own name. An output head that is tied to the embedding gets
    none, so on a CPU it would go on multiplying with the packed copy it made of the old embedding.
    """
    layers_of: defaultdict[int, list[Any]] = defaultdict(list)
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None:
            layers_of[id(weight)].append(layer)
    for layers in layers_of.values():
        if len(layers) > 1:
            for layer in layers:
                layer.quant_method.process_weights_after_loading(layer)
