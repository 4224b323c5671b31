"""What context-parallel ranks tell each other beside keys and values: the statistics of their response tokens.

Every rank of the group gets the statistics of all R response tokens of a micro-batch, computes the same loss of them
and differentiates it for its own tokens only. Summed over the group, gradients are those of the whole loss, and a loss
that looks at several tokens of a sequence needs to know nothing of the cut.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_tokens(values: torch.Tensor, owned: torch.Tensor, count: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Values of all ranks' tokens, bit for bit the same on every rank; one all-reduce.

    Args:
        values: [k, r] of this rank's tokens.
        owned: [r] int64, which of the `count` tokens they are; each token is one rank's.
        count: tokens of all ranks.
        group: context-parallel.

    Returns:
        [k, count]. Its gradient reaches this rank's tokens and is not summed over ranks.
    """
    gathered: torch.Tensor = _GatherTokens.apply(values, owned, count, group)
    return gathered


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, owned: torch.Tensor, count: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(owned)
        # The other ranks add zeros, which changes nothing.
        gathered = values.new_zeros(values.shape[0], count)
        gathered[:, owned] = values
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (owned,) = ctx.saved_tensors
        return gradients[0][:, owned], None, None, None
