"""Memory of another process that is looked at for a while, by code that may keep views of it.

vLLM loads most layers from what it is given and forgets it. Of layers whose tensors come in several buckets it keeps
views until the last is there. When the loan ends, these get memory of their own and never notice.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Loan:
    """What a tensor and its views look at, until it is given back."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Remember the storage of `tensor`, on which there must be no others yet; the tensor itself is not kept."""
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def end(self) -> None:
        """Let go of the memory: views that still exist look at a copy from now on."""
        # None where nothing looks at it any more.
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is not None:
            storage.share_memory_()  # torch's only way to give the storage of all views other memory
