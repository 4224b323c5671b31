"""A block of memory that processes of one machine share.

    owner                                            others
    SharedBlock.create(nbytes)  -- path, token -->   SharedBlock.open(path, token)     None on another machine
    admit_nobody_else()

Whether two processes share a machine's memory is found out by trying: containers of one host may not, and host names
say nothing. The block is a file without a name in any folder, so nothing is left behind however its processes end;
others find it among the owner's open files. Its first bytes hold a random token, since a path of the same name may
exist on other machines.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

_TOKEN_BYTES = 32


class SharedBlock:
    """Block of memory that lives as long as a process has it open."""

    def __init__(self, descriptor: int, nbytes: int, token: str) -> None:
        self._descriptor: int | None = descriptor
        self._map = mmap.mmap(descriptor, nbytes)
        self.token = token
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8, offset=_TOKEN_BYTES)
        """Bytes of the block, [nbytes] uint8; they stay mapped as long as any view of them exists."""

    @classmethod
    def create(cls, nbytes: int) -> SharedBlock | None:
        """Create a block that other processes of this user can open; None where the system has none or no room."""
        if not hasattr(os, "memfd_create"):
            return None
        descriptor = os.memfd_create("megatron-entropic")
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        try:
            # Reserves the memory: without it a lack of room would kill the process at the first write.
            os.posix_fallocate(descriptor, 0, _TOKEN_BYTES + nbytes)
        except OSError:
            os.close(descriptor)
            return None
        os.pwrite(descriptor, token.encode(), 0)
        return cls(descriptor, _TOKEN_BYTES + nbytes, token)

    @classmethod
    def open(cls, path: str, token: str) -> SharedBlock | None:
        """Open the block that another process created; None if it is not to be seen from here."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        if os.pread(descriptor, _TOKEN_BYTES, 0) != token.encode():
            os.close(descriptor)
            return None
        block = cls(descriptor, os.fstat(descriptor).st_size, token)
        block.admit_nobody_else()
        return block

    def tensor(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Tensor [elements] at the start of the block, with a storage of its own."""
        return torch.frombuffer(self._map, dtype=dtype, count=elements, offset=_TOKEN_BYTES)

    def begins_with(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's values lie at the start of this block."""
        return tensor.data_ptr() == self.bytes.data_ptr()

    @property
    def path(self) -> str:
        """Path at which other processes find the block while this one admits them."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def admit_nobody_else(self) -> None:
        """Close the file; the memory stays, here and with those who have opened it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


# Memory of another process that is looked at for a while, by code that may keep views of it.
#
# vLLM loads most layers from what it is given and forgets it. Of layers whose tensors come in several buckets it keeps
# views until the last is there. When the loan ends, these get memory of their own and never notice.


class Loan:
    """Memory that a tensor and its views look at, until it is given back."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Remember the storage of `tensor`, on which there must be no others yet; the tensor itself is not kept."""
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def end(self) -> None:
        """Let go of the memory: views that still exist look at a copy from now on."""
        # None where nothing looks at it any more.
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is not None:
            storage.share_memory_()  # torch's only way to give the storage of all views other memory


# Host memory for flat buffers, taken again as soon as no tensor looks at it any more.
#
# Fresh memory costs a page fault every 4 KiB, which takes as long as receiving the bytes. Nor can a buffer be taken
# again without asking: vLLM keeps views of it until the last tensor of a layer is there, which may be in a later
# bucket.


@dataclass
class _Block:
    memory: np.ndarray
    """Memory of the block, [bytes] uint8."""
    lent: weakref.ref[np.ndarray] | None = None
    """The array behind the tensor that was handed out last; it lives as long as any view of that tensor."""

    @property
    def is_free(self) -> bool:
        return self.lent is None or self.lent() is None


class FlatMemory:
    """Blocks of host memory for flat buffers; threads may share one."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Tensor [elements] with arbitrary values, in the smallest free block that is large enough, or in a new one.

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
