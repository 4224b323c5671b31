"""Transfer of one tensor's bytes from a sender to all its receivers, once both have agreed that they are next.

On several machines, one gloo broadcast. On one machine, in pieces through a block of shared memory:

    sender      copies a piece in --> "it is there" (gloo)   ...   waits for all (gloo) --> next piece
    receivers                         wait --> copy it out --> "done" (gloo)

Gloo only says when, so its time limits and its notice of lost peers hold in both cases. Over TCP the same bytes would
be copied several times for each receiver, with a system call for every few of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_entropic.weight_sync.shared_memory import SharedBlock

BLOCK_BYTES = 16 * 2**20
"""Bytes of the shared block: small enough for a processor's cache, large enough that gloo's messages cost little."""


@dataclass
class Channel:
    """One end of a transfer; errors are gloo's, `transport.named_wait` gives them names."""

    group: dist.ProcessGroupGloo
    """Process group: rank 0 sends, all others receive."""
    block: SharedBlock | None
    """Block of rank 0, seen by all; None: bytes go through gloo."""

    def send(self, tensor: torch.Tensor) -> None:
        """Bring a contiguous tensor of any dtype to all receivers; it may change afterwards."""
        if self.block is None:
            self._broadcast(tensor)
            return
        for piece in _bytes_of(tensor).split(self.block.bytes.numel()):
            self.block.bytes[: piece.numel()].copy_(piece)
            self._broadcast(torch.zeros(1))
            self.wait_for_all()

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor of the size that rank 0 sends."""
        if self.block is None:
            self._broadcast(tensor)
            return
        for piece in _bytes_of(tensor).split(self.block.bytes.numel()):
            self._broadcast(torch.zeros(1))
            piece.copy_(self.block.bytes[: piece.numel()])
            self.wait_for_all()

    def wait_for_all(self) -> None:
        """Return when both ends have called this."""
        self.group.barrier().wait()  # type: ignore[attr-defined]

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)
