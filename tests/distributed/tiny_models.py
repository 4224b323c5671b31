"""Tiny random models of every supported family, as transformers writes them, with transformers' own statistics.

Sizes are odd on purpose: with reduction lengths such as 256 two implementations can agree to the last bit, and a
comparison that compares nothing goes unnoticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 251
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 202,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
LATENT: dict[str, Any] = COMMON | {
    "hidden_size": 90,
    "num_key_value_heads": 6,
    "kv_lora_rank": 26,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
    "moe_intermediate_size": 22,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}
"""Of models with latent attention."""
LENGTHS = [(1, 1), (3, 14), (17, 1), (17, 21), (2, 45), (30, 7), (30, 12), (17, 33), (4, 5)]
"""(prompt, response) tokens of each sequence; prompts of one length are one prompt, which some layouts compute once."""


def write_tiny_model(family: str, directory: Path) -> Path:
    """Writes a Hugging Face directory with random weights; norms and biases are not trivial."""
    import transformers

    plain_rope = {"rope_type": "default", "rope_theta": 1e6}
    llama_rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        # Short, so that all three branches of the formula matter within a few dozen tokens.
        "original_max_position_embeddings": 64,
    }
    yarn_rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4,
        "beta_slow": 1,
        # Unequal, so that cosine and sine are scaled besides attention.
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
    config = {
        "qwen3": lambda: transformers.Qwen3Config(
            hidden_size=90, head_dim=22, tie_word_embeddings=False, rope_parameters=plain_rope, **COMMON
        ),
        "qwen2": lambda: transformers.Qwen2Config(
            hidden_size=132, tie_word_embeddings=True, rope_parameters=plain_rope, **COMMON
        ),
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=102, head_dim=26, tie_word_embeddings=False, rope_parameters=llama_rope, **COMMON
        ),
        # Layer 1 is dense; the probabilities of a token's experts do not add up to 1.
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            hidden_size=90,
            head_dim=22,
            moe_intermediate_size=38,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            tie_word_embeddings=False,
            rope_parameters=plain_rope,
            **COMMON,
        ),
        "mixtral": lambda: transformers.MixtralConfig(
            hidden_size=102,
            head_dim=26,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=plain_rope,
            **(COMMON | {"intermediate_size": 46}),
        ),
        # Layer 0 is dense; a token's 4 experts are in 2 of 3 groups.
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            q_lora_rank=34, n_group=3, topk_group=2, rope_parameters=yarn_rope, **LATENT
        ),
        # The same architecture: queries of hidden states, no groups of experts.
        "moonlight": lambda: transformers.DeepseekV3Config(
            q_lora_rank=None, n_group=1, topk_group=1, rope_parameters=plain_rope, **LATENT
        ),
    }[family]()
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(directory)
    return directory


def write_tiny_adapter(
    model_dir: Path, directory: Path, *, rank: int, alpha: float, target_modules: list[str], spread: float = 0.3
) -> Path:
    """Writes an adapter as peft does, whose B has values of the standard deviation `spread`."""
    import peft

    torch.manual_seed(13)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_reference(model_dir), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=spread)
    model.save_pretrained(directory)
    return directory


def load_reference(hf_dir: Path) -> Any:
    """The model in float32; experts one after the other, transformers' grouped product wants multiples of 16 bytes."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def random_sequences(seed: int = 5) -> list[tuple[list[int], int]]:
    """(tokens, prompt length) of sequences of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = {length: torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in dict(LENGTHS)}
    return [
        ([*prompts[prompt], *torch.randint(VOCABULARY, (response,), generator=generator).tolist()], prompt)
        for prompt, response in LENGTHS
    ]


def write_token_file(path: Path, sequences: list[tuple[list[int], int]]) -> Path:
    """The input of `score_file`."""
    lines = [json.dumps({"tokens": tokens, "prompt_length": prompt}) for tokens, prompt in sequences]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def transformers_statistics(
    hf_dir: Path, sequences: list[tuple[list[int], int]], temperature: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(log-probs, entropies) [R] of each response: one float32 forward a sequence, the softmax in float64."""
    model = load_reference(hf_dir)
    statistics = []
    for tokens, prompt in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, prompt - 1 : -1].double() / temperature
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(tokens[prompt:]).unsqueeze(-1)).squeeze(-1)
        statistics.append((chosen, -(logprobs.exp() * logprobs).sum(-1)))
    return statistics
