"""The transformers backend of `megatron-entropic score`: the reference, one forward a sequence in one process."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.config.run import Dtype
from megatron_entropic.data.token_file import read_token_file, write_scored_file
from megatron_entropic.tensor_parallel import logprob_and_entropy


def score_file(hf_dir: Path, tokens_path: Path, output_path: Path, temperature: float, dtype: Dtype) -> None:
    """Score every line of a token file on the CPU, or on a GPU where torch finds one.

    Raises:
        UserError: bad input, before the model is loaded.
    """
    import transformers

    lines = read_token_file(tokens_path, HfReader(hf_dir).parameter_map.dimensions.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
        )
        .to(device)
        .eval()
    )
    statistics = functools.partial(logprob_and_entropy, temperature=temperature)
    logprobs, entropies = [], []
    for line in lines:
        tokens = torch.tensor(line.tokens, device=device)
        with torch.no_grad():
            logits = model(tokens.unsqueeze(0)).logits[0, line.prompt_length - 1 : -1]
            line_logprobs, line_entropies = statistics(logits, tokens[line.prompt_length :])
        assert line_entropies is not None
        logprobs.append(line_logprobs.tolist())
        entropies.append(line_entropies.tolist())
    write_scored_file(output_path, lines, logprobs, entropies)
