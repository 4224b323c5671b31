"""Memory of another process that is looked at for a while, by code that may keep views of it.

vLLM loads most layers from what it is given and forgets it. Of layers whose tensors come in several buckets it keeps
views until the last is there. When the loan ends, these get memory of their own and never notice.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Loan:
    """A tensor whose memory goes back to its owner when the loan ends."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """`tensor` must be the only one on its storage; whoever makes a loan of it forgets it."""
        self._tensor: torch.Tensor | None = tensor

    def take(self) -> torch.Tensor:
        """The tensor, once."""
        tensor, self._tensor = self._tensor, None
        assert tensor is not None, "a loan is taken once"
        self._storage = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def end(self) -> int:
        """Let go of the memory: views that still exist look at a copy from now on.

        Returns:
            Bytes that were copied, 0 if there were no views.
        """
        if self._storage.expired():
            return 0
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:  # the last view has gone since
            return 0
        storage.share_memory_()  # torch's only way to give the storage of all views other memory
        return int(storage.nbytes())
