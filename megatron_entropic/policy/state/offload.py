"""Device memory of a policy rank, given back while engines generate.

    parameters, optimizer state    copied to host memory (pinned beside a GPU), then released
    gradient buffers               released only: every step begins by clearing them

What is released is the storage, not the tensor: megatron-core's many views of parameters, buffers and shards stay valid
and see the old bits once the storage is back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from megatron_entropic.config.policy import OFFLOAD_PARTS, OffloadPart
from megatron_entropic.policy.megatron.platform import Platform
from megatron_entropic.policy.step.optimizer import PolicyOptimizer


class DeviceMemory:
    """Memory of this rank's large tensors, on its device or given back.

    Args:
        platform: platform of this rank.
        chunks: chunks from `optimizer.wrap_data_parallel`.
        frozen: other modules whose parameters count as parameters: the reference model.
    """

    def __init__(self, platform: Platform, chunks: Iterable[Any], frozen: Iterable[torch.nn.Module] = ()) -> None:
        self._platform = platform
        self._chunks = list(chunks)
        self._modules = [*self._chunks, *frozen]
        self._released: dict[OffloadPart, list[tuple[torch.UntypedStorage, int]]] = {}
        # Host memory is kept from one time to the next: pinning it takes longer than copying.
        self._host: dict[OffloadPart, list[torch.Tensor]] = {part: [] for part in OFFLOAD_PARTS}

    @property
    def released_bytes(self) -> int:
        """Number of bytes of all that is released now."""
        return sum(size for storages in self._released.values() for _, size in storages)

    def on_device(self, part: OffloadPart) -> bool:
        """Whether a part has not been released."""
        return part not in self._released

    def release(self, parts: Iterable[OffloadPart], optimizer: PolicyOptimizer) -> None:
        """Give the memory of these parts back; parts that are gone already stay gone.

        Args:
            parts: parts to release.
            optimizer: optimizer of the chunks, as it is now; its parameters must be synchronised.
        """
        for part in parts:
            if part in self._released:
                continue
            storages = self._storages(part, optimizer)
            if part != "gradients":
                self._copy_to_host(part, storages)
            self._released[part] = [(storage, storage.nbytes()) for storage in storages]
            for storage in storages:
                storage.resize_(0)
        self._platform.empty_cache()

    def restore(self, parts: Iterable[OffloadPart]) -> None:
        """Bring these parts back, bit for bit, and gradient buffers as zeros."""
        for part in parts:
            storages = self._released.pop(part, [])
            for index, (storage, size) in enumerate(storages):
                storage.resize_(size)
                content = _bytes_of(storage)
                if part == "gradients":
                    content.zero_()
                else:
                    content.copy_(self._host[part][index], non_blocking=True)
        self._platform.synchronize()

    def bytes_on_device(self, optimizer: PolicyOptimizer) -> dict[OffloadPart, int]:
        """Number of bytes that each part has on the device now."""
        return {
            part: 0 if part in self._released else sum(s.nbytes() for s in self._storages(part, optimizer))
            for part in OFFLOAD_PARTS
        }

    def _copy_to_host(self, part: OffloadPart, storages: list[torch.UntypedStorage]) -> None:
        old = self._host[part]
        if [buffer.nbytes for buffer in old] != [storage.nbytes() for storage in storages]:
            pinned = self._platform.device.type == "cuda"
            self._host[part] = old = []  # frees the old ones first
            old.extend(torch.empty(s.nbytes(), dtype=torch.uint8, pin_memory=pinned) for s in storages)
        for buffer, storage in zip(old, storages, strict=True):
            buffer.copy_(_bytes_of(storage), non_blocking=True)
        self._platform.synchronize()

    def _storages(self, part: OffloadPart, optimizer: PolicyOptimizer) -> list[torch.UntypedStorage]:
        """Storages of a part, each once, in an order that does not change while the optimizer is the same."""
        parameters = _distinct(parameter.data for module in self._modules for parameter in module.parameters())
        if part == "parameters":
            return list(parameters.values())
        gradients = _distinct(
            buffer.grad_data for chunk in self._chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers
        )
        if part == "gradients":
            return list(gradients.values())
        state = _distinct(tensor for tensor in optimizer.state_tensors() if tensor.device == self._platform.device)
        # Shards of float32 parameters are the parameters' own memory.
        return [storage for key, storage in state.items() if key not in parameters and key not in gradients]


def _distinct(tensors: Iterator[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Storages by address, without empty ones."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """View of a storage as bytes, [nbytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
