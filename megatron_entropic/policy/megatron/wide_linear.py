"""megatron-core's linear layers on a processor that multiplies bfloat16 no faster than float32: all without AMX.

    x, w bfloat16 --> float32 --> product --> bfloat16

The products are those of the bfloat16 numbers, and so is what is kept for the backward pass. In bfloat16 oneDNN is half
as slow again where the processor has instructions for it, and several times slower where it has none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.policy.megatron.unequal_parts import gather_along_first_dim, reduce_scatter_along_first_dim


def wide_linear(
    input_: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    **_unused: Any,
) -> torch.Tensor:
    """Stand-in for `linear_with_grad_accumulation_and_async_allreduce` and `linear_with_frozen_weight`.

    Args:
        input_: [T, ..., H], with `sequence_parallel` this rank's part of the tokens.
        weight: [outputs, H].
        bias: [outputs], or None.
        allreduce_dgrad: whether to sum the gradient of the input over the group.
        sequence_parallel: whether to gather the input over the group, and scatter its gradient.
        tp_group: tensor-parallel group, needed by either.
    """
    group = tp_group if allreduce_dgrad or sequence_parallel else None
    output: torch.Tensor = _WideLinear.apply(input_, weight, group, sequence_parallel)
    return output if bias is None else output + bias


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None, scattered: bool
    ) -> torch.Tensor:
        # A frozen weight needs no gradient, and then nobody needs the input.
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.group, ctx.scattered, ctx.dtype = group, scattered, x.dtype
        whole = _gathered(x, group, scattered)
        # Not a view of a product: megatron-core's cross-entropy writes into logits, which autograd refuses for a view.
        output = torch.empty(*whole.shape[:-1], len(weight), dtype=torch.float32, device=x.device)
        torch.mm(whole.flatten(0, -2).float(), weight.float().t(), out=output.flatten(0, -2))
        return output.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        incoming = gradients[0].flatten(0, -2).float()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(incoming, weight.float()).to(ctx.dtype).unflatten(0, gradients[0].shape[:-1])
            if ctx.scattered:
                dx = reduce_scatter_along_first_dim(dx, ctx.group)
            elif ctx.group is not None and ctx.group.size() > 1:
                dist.all_reduce(dx, group=ctx.group)
        if ctx.needs_input_grad[1]:
            whole = _gathered(x, ctx.group, ctx.scattered).flatten(0, -2)
            dweight = torch.mm(incoming.t(), whole.float()).to(weight.dtype)
        return dx, dweight, None, None


def _gathered(x: torch.Tensor, group: dist.ProcessGroup | None, scattered: bool) -> torch.Tensor:
    if not scattered:
        return x
    assert group is not None
    return gather_along_first_dim(x, group)
