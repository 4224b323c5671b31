"""Flat buffers that the ranks of one gathering share, so that each writes its own values to where they belong."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_entropic.weight_sync.shared_memory import SharedBlock

_COUNT = 2


class SharedFlats:
    """Two flat buffers in turn, which ranks of one group on one machine share; tensors in host memory."""

    def __init__(self, group: dist.ProcessGroup, blocks: list[SharedBlock]) -> None:
        self._group = group
        self._blocks = blocks

    @classmethod
    def open(cls, group: dist.ProcessGroup, nbytes: int) -> SharedFlats | None:
        """Open the buffers, on all ranks of `group` together; None on all if one does not share the others' memory.

        Args:
            group: a gloo group.
            nbytes: size of each buffer.
        """
        first, rank = dist.get_global_rank(group, 0), dist.get_rank(group)
        created = [SharedBlock.create(nbytes) for _ in range(_COUNT)] if rank == 0 else []
        places = [[(block.path, block.token) if block else None for block in created]]
        dist.broadcast_object_list(places, src=first, group=group)
        blocks = created if rank == 0 else [SharedBlock.open(*place) if place else None for place in places[0]]
        opened = [block for block in blocks if block is not None]
        complete = torch.tensor(int(len(opened) == _COUNT))
        dist.all_reduce(complete, op=dist.ReduceOp.MIN, group=group)
        if not complete:
            for block in opened:
                block.admit_nobody_else()
        return cls(group, opened) if complete else None

    @property
    def blocks(self) -> tuple[SharedBlock, ...]:
        """The memory of the buffers; the first rank's admit others until it closes them."""
        return tuple(self._blocks)

    def admit_nobody_else(self) -> None:
        """Close the files of the memory; see `SharedBlock`."""
        for block in self._blocks:
            block.admit_nobody_else()

    def take(self, number: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Tensor [elements] in buffer `number` (0 or 1)."""
        return self._blocks[number].tensor(elements, dtype)

    def wait_for_all(self) -> None:
        """Return when every rank of the group has called this."""
        if self._group.size() > 1:
            dist.barrier(group=self._group)
