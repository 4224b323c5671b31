"""Operations on tensor-parallel shards with torch and torch.distributed only; usable from any Megatron trainer."""

from megatron_entropic.tensor_parallel.fused_head import fused_logprob_and_entropy
from megatron_entropic.tensor_parallel.fused_policy_loss import TokenLoss, fused_policy_loss
from megatron_entropic.tensor_parallel.logprob_entropy import logprob_and_entropy
from megatron_entropic.tensor_parallel.reverse_kl import fused_reverse_kl

__all__ = ["TokenLoss", "fused_logprob_and_entropy", "fused_policy_loss", "fused_reverse_kl", "logprob_and_entropy"]
