"""vLLM's weight-transfer engine for CPU: receives flat buffers over gloo and loads them as checkpoint weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_entropic.weights.transport import FlatContents, GlooReceiver


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """How a vLLM worker finds the sender. The first four fields are those of vLLM's NCCL engine."""

    master_address: str
    master_port: int
    rank_offset: int
    """Rank of this engine's first worker in the transfer group."""
    world_size: int
    """Sender and all workers of all engines."""
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What the next flat buffer holds; the same fields as of vLLM's NCCL engine."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """One vLLM worker's receiver. vLLM calls start, then update for each bucket, then finish."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _receiver: GlooReceiver | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the sender's group; a second call leaves the first group."""
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = GlooReceiver(
            init_info.master_address,
            init_info.master_port,
            rank=init_info.rank_offset + worker,
            receivers=init_info.world_size - 1,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Bring the layers back into the form that takes checkpoint weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive one flat buffer and load its tensors.

        vLLM keeps the views until their layer is complete, which is why every buffer is a new one.
        """
        if self._receiver is None:
            raise RuntimeError("init_weight_transfer_engine comes before update_weights")
        contents = FlatContents.of_update(update_info.names, update_info.dtype_names, update_info.shapes)
        self.model.load_weights(contents.split(self._receiver.receive(contents)))

    def finish_weight_update(self) -> None:
        """Let the layers process their new weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _process_shared_weights(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        self._receiver = None


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
