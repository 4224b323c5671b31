"""The vLLM backend of `megatron-entropic score`: an engine's log-probs of given tokens."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.config.run import ITEM_BYTES, Dtype, RolloutConfig
from megatron_entropic.data.token_file import read_token_file, write_scored_file
from megatron_entropic.errors import UserError
from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.rollout.engine import RolloutEngine

# vLLM computes full-vocabulary log-probs for every prompt token of a forward pass.
_TOKENS_PER_FORWARD = 2048
_KV_BLOCK_TOKENS = 128


def score_file(hf_dir: Path, tokens_path: Path, output_path: Path, dtype: Dtype, temperature: float) -> None:
    """Score every line of a token file in one engine; entropies are null, vLLM does not report them.

    Args:
        tokens_path: JSON lines {"tokens": [...], "prompt_length": n}.
        output_path: file for the same lines with log-probs added.
        dtype: dtype of weights and activations.
        temperature: must be 1.

    Raises:
        UserError: bad lines, a sequence as long as the model's context, or a temperature other than 1.
    """
    if temperature != 1.0:
        raise UserError(
            f"--temperature {temperature:g}: vLLM reports log-probs of given tokens at temperature 1 only; "
            "use --backend megatron or transformers for another"
        )
    dimensions = HfReader(hf_dir).parameter_map.dimensions  # vLLM reads some checkpoints otherwise than the policy
    lines = read_token_file(tokens_path, dimensions.vocab_size)
    longest = max(len(line.tokens) for line in lines)
    if longest >= dimensions.max_position_embeddings:
        raise UserError(
            f"{tokens_path}: the longest line has {longest} tokens; vLLM needs room for one more within the model's "
            f"{dimensions.max_position_embeddings}"
        )
    engine = RolloutEngine(
        hf_dir,
        dtype,
        RolloutConfig(max_response_tokens=1, kv_cache_gb=_kv_cache_gb(dimensions, dtype, longest + 1)),
        max_model_tokens=longest + 1,
        seed=0,
        device="cuda" if torch.cuda.is_available() else "cpu",
        max_batched_tokens=_TOKENS_PER_FORWARD,
    )
    logprobs = engine.score_tokens([(line.tokens, line.prompt_length) for line in lines])
    write_scored_file(output_path, lines, logprobs, [None] * len(lines))


def _kv_cache_gb(dimensions: ModelDimensions, dtype: Dtype, tokens: int) -> float:
    """GiB of KV cache with room for the longest line and then some, at least half a GiB."""
    token_bytes = dimensions.cached_elements() * ITEM_BYTES[dtype]
    blocks = math.ceil(tokens / _KV_BLOCK_TOKENS) + 1
    return max(0.5, 1.25 * blocks * _KV_BLOCK_TOKENS * token_bytes / 2**30)
