"""megatron-core's gather and reduce-scatter along tokens, for gloo, which wants equally many from every rank.

Experts that are cut over tensor ranks gather the tokens that each of these received, which are as many as the router
sent there. Exchanges of unequal parts are what gloo's all-to-all can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_along_first_dim(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Gather every rank's rows in rank order, [sum of sizes, ...].

    Args:
        input_: [own size, ...] rows of this rank.
        group: group of the ranks.
        output_split_sizes: number of rows of each rank; None: all have as many.
        use_global_buffer: unused, memory of its own does as well.
    """
    ranks = group.size()
    if ranks == 1:
        return input_
    if output_split_sizes is None:
        output = input_.new_empty(ranks * input_.shape[0], *input_.shape[1:])
        dist.all_gather_into_tensor(output, input_.contiguous(), group=group)
        return output
    output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
    copies = torch.cat([input_] * ranks)
    dist.all_to_all_single(output, copies, list(output_split_sizes), [input_.shape[0]] * ranks, group=group)
    return output


def reduce_scatter_along_first_dim(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Sum rows over the ranks; returns this rank's part of the sum, [own size, ...].

    Args:
        input_: [sum of sizes, ...] rows for all ranks, in rank order.
        group: group of the ranks.
        input_split_sizes: number of rows that each rank gets; None: all get as many.
        use_global_buffer: unused, memory of its own does as well.
    """
    ranks = group.size()
    if ranks == 1:
        return input_
    if input_split_sizes is None:
        output = input_.new_empty(input_.shape[0] // ranks, *input_.shape[1:])
        dist.reduce_scatter_tensor(output, input_.contiguous(), group=group)
        return output
    own = input_split_sizes[group.rank()]
    received = input_.new_empty(ranks * own, *input_.shape[1:])
    dist.all_to_all_single(received, input_.contiguous(), [own] * ranks, list(input_split_sizes), group=group)
    return received.unflatten(0, (ranks, own)).sum(dim=0)
