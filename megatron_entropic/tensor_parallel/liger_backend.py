"""Liger's tensor-parallel fused linear cross-entropy (liger-kernel >= 0.8.3) behind `fused_logprob_and_entropy`.

Liger chooses between kernels of its own and chunks of PyTorch without saying so. In the latter logits are rounded to
the dtype of the model, the gradient of the weight is summed in it, and the entropy is not centred; so it is here to be
compared with, and never chosen by "auto".
"""

from __future__ import annotations

import importlib.util

import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel.statistics import Shard


def liger_logprob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float | Tensor,
    entropy_gradient: bool,
    vocab_size: int | None,
    need_entropy: bool,
    sequence_parallel: bool,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies as of `fused_logprob_and_entropy`, for the same hidden [N, H] on all ranks.

    Raises:
        ValueError: Liger cannot do this; all reasons in one message.
    """
    shard = Shard.of(len(weight), group, vocab_size)
    reasons = {
        "liger-kernel is not installed": importlib.util.find_spec("liger_kernel") is None,
        f"it needs a GPU, not {hidden.device}": not hidden.is_cuda,
        "it needs a group: torch.distributed's world would be taken for None": group is None,
        "it has one temperature for all tokens": isinstance(temperature, Tensor),
        "it counts padding of the vocabulary": shard.vocab_size != shard.width * shard.ranks,
        "it gathers no hidden states (sequence_parallel)": sequence_parallel,
        "it does not write to main_grad": main_grad is not None,
        "it takes no empty selection": len(target) == 0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError("backend='liger' cannot be used here: " + "; ".join(found))
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    result = liger_fused_linear_scaled_cross_entropy_tp(
        hidden, weight, target, group, temperature=temperature, return_entropy=need_entropy
    )
    if not need_entropy:
        return -result.float(), None
    loss, entropy = result
    return -loss.float(), entropy.float() if entropy_gradient else entropy.detach().float()
