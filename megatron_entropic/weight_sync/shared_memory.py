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

import torch

_TOKEN_BYTES = 32


class SharedBlock:
    """Memory that lives as long as a process has it open."""

    def __init__(self, descriptor: int, nbytes: int, token: str) -> None:
        self._descriptor: int | None = descriptor
        self._map = mmap.mmap(descriptor, nbytes)
        self.token = token
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8, offset=_TOKEN_BYTES)
        """[nbytes] uint8; stays mapped as long as any view of it exists."""

    @classmethod
    def create(cls, nbytes: int) -> SharedBlock | None:
        """A new block that other processes of this user can open; None where the system has none or no room."""
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
        """The block that another process created; None if it is not to be seen from here."""
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
        """[elements] at the start of the block, as a tensor with a storage of its own."""
        return torch.frombuffer(self._map, dtype=dtype, count=elements, offset=_TOKEN_BYTES)

    def begins_with(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's values lie at the start of this block."""
        return tensor.data_ptr() == self.bytes.data_ptr()

    @property
    def path(self) -> str:
        """Where other processes find the block while this one admits them."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def admit_nobody_else(self) -> None:
        """Close the file; the memory stays, here and with those who have opened it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
