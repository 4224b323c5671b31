"""Operations on tensor-parallel shards with torch and torch.distributed only; usable from any Megatron trainer."""

from megatron_entropic.tensor_parallel.logprob_entropy import logprob_and_entropy

__all__ = ["logprob_and_entropy"]
