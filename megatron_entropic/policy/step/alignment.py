"""Micro-batches of which every replica runs equally many, because replicas meet in collectives within them."""

from __future__ import annotations

import torch

from megatron_entropic.policy.batch.microbatch import MicroBatch, pack
from megatron_entropic.policy.megatron.collectives import largest
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.types import Sequence


def pack_alike(
    sequences: list[Sequence], tokens_per_microbatch: int, parallel: ParallelState, device: torch.device
) -> list[MicroBatch]:
    """Pack this replica's sequences into a number of micro-batches that all replicas agree on; called by all ranks.

    A replica with too few sequences gets micro-batches without any: they run through the model and every collective
    like the others.
    """
    own = pack(sequences, tokens_per_microbatch, parallel.packing)
    count = largest(len(own), device)
    if count == len(own):
        return own
    return pack(sequences, tokens_per_microbatch, parallel.packing, at_least=count)
