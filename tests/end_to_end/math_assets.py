"""A tiny random Qwen3 with a real byte-level BPE tokenizer and chat template, and mathematics to go with it."""

from __future__ import annotations

import json
from pathlib import Path

PROBLEMS = [
    (rf"What is ${a} \cdot {b} - {c}$? Give the value of $x = {a}x_0 + \frac{{{b}}}{{{c}}}$ as well.", str(a * b - c))
    for a in range(2, 6)
    for b in (3, 7)
    for c in (1, 4)
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(directory: Path, *, tied: bool = True) -> Path:
    """A Hugging Face directory: 400 BPE tokens trained on the problems, a Qwen3 of two layers with random weights."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    inner = ByteLevelBPETokenizer()
    texts = [text for problem in PROBLEMS for text in problem]
    inner.train_from_iterator(texts, vocab_size=400, show_progress=False, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def write_problems(path: Path, first: int, count: int) -> Path:
    """A verl-layout JSON-lines file of some of the problems."""
    rows = [
        {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": answer}}
        for text, answer in PROBLEMS[first : first + count]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
