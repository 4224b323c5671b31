"""Host memory for flat buffers, taken again as soon as no tensor looks at it any more.

Fresh memory costs a page fault every 4 KiB, which takes as long as receiving the bytes. Nor can a buffer be taken again
without asking: vLLM keeps views of it until the last tensor of a layer is there, which may be in a later bucket.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class _Block:
    memory: np.ndarray
    """[bytes] uint8."""
    lent: weakref.ref[np.ndarray] | None = None
    """The array behind the tensor that was handed out last; it lives as long as any view of that tensor."""

    @property
    def is_free(self) -> bool:
        return self.lent is None or self.lent() is None


class FlatMemory:
    """Blocks of host memory; threads may share one."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """[elements] with arbitrary values, in the smallest free block that is large enough, or in a new one.

        Its memory is free again when the tensor and all views of it are gone.
        """
        nbytes = elements * dtype.itemsize
        with self._lock:
            fitting = [block for block in self._blocks if block.is_free and block.memory.nbytes >= nbytes]
            if fitting:
                block = min(fitting, key=lambda block: block.memory.nbytes)
            else:
                # Smaller free blocks would never be asked for again while buckets grow.
                self._blocks = [block for block in self._blocks if not block.is_free]
                block = _Block(np.empty(nbytes, dtype=np.uint8))
                self._blocks.append(block)
            lent = block.memory[:nbytes]
            block.lent = weakref.ref(lent)
        return torch.from_numpy(lent).view(dtype)
