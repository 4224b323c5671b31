"""Comparison of a distributed checkpoint in the policy's own model with the Hugging Face directory in transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.policy.megatron.parallel import destroy_model_parallel, initialise_model_parallel
from megatron_entropic.policy.megatron.platform import Rendezvous, select_platform
from megatron_entropic.policy.model.load import load_torch_dist
from megatron_entropic.policy.step.score import score_sequences
from megatron_entropic.tensor_parallel import logprob_and_entropy
from megatron_entropic.types import Scores, Sequence

_SEED = 20
_LENGTHS = (5, 17, 64)
_TIMEOUT_S = 300.0


def compare_logits(hf_dir: Path, megatron_dir: Path) -> tuple[float, float]:
    """Compute the largest distance of log-probs and of entropies (nats) over random tokens, in float32 on the CPU.

    Both are taken over the whole vocabulary, so that one logit that differs shows in the entropy. The model is loaded
    through megatron-core in this process, then by transformers: memory for one copy of each is needed.

    Raises:
        ValueError: from `read_dimensions`.
        RunError: the checkpoint does not fit the model.
    """
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = read_dimensions(hf_dir).vocab_size
    sequences = [Sequence(torch.randint(vocabulary, (n,), generator=generator), 1) for n in _LENGTHS]
    expected = _by_transformers(hf_dir, sequences)
    found = _by_policy(hf_dir, megatron_dir, sequences)
    logprobs = max(_distance(a, b) for a, b in zip(found.logprobs, expected.logprobs, strict=True))
    entropies = max(_distance(a, b) for a, b in zip(found.entropies, expected.entropies, strict=True))
    return logprobs, entropies


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def _by_transformers(hf_dir: Path, sequences: list[Sequence]) -> Scores:
    import transformers

    # Experts one after the other: transformers' grouped product refuses sizes that are no multiples of 16 bytes.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, experts_implementation="eager", local_files_only=True, trust_remote_code=False
    ).eval()
    scores = Scores([], [])
    for sequence in sequences:
        with torch.no_grad():
            logits = model(sequence.tokens.unsqueeze(0)).logits[0, sequence.prompt_length - 1 : -1]
            logprobs, entropies = logprob_and_entropy(logits, sequence.tokens[sequence.prompt_length :])
        assert entropies is not None
        scores.logprobs.append(logprobs)
        scores.entropies.append(entropies)
    return scores


def _by_policy(hf_dir: Path, megatron_dir: Path, sequences: list[Sequence]) -> Scores:
    platform = select_platform("cpu")
    platform.init_process_group(Rendezvous.alone(), timeout_s=_TIMEOUT_S)
    try:
        from megatron_entropic.policy.model.build import build_model

        policy = PolicyConfig()
        state = initialise_model_parallel(policy)
        platform.manual_seed(_SEED)
        model = build_model(read_dimensions(hf_dir), policy, "float32", state, platform)
        load_torch_dist(model, megatron_dir)
        tokens = policy.tokens_per_microbatch
        scores = score_sequences(model, sequences, state, temperature=1.0, tokens_per_microbatch=tokens)
        assert scores is not None
        destroy_model_parallel()
        return scores
    finally:
        torch.distributed.destroy_process_group()
