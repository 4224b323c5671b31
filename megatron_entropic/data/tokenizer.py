"""The tokenizer of a Hugging Face directory, and how a prompt becomes tokens with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError

Tokenizer = Any
"""transformers.PreTrainedTokenizerBase; not named here, so that importing this file stays quick."""


def load_tokenizer(hf_dir: Path) -> Tokenizer:
    """The tokenizer of a local directory; nothing is downloaded and no code of the directory is run.

    Raises:
        UserError: no tokenizer in it, an unreadable one, or one without an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: no such model directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{hf_dir}: its tokenizer cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{hf_dir}: the tokenizer has no end-of-sequence token (eos_token), so no response could end")
    return tokenizer


def render_prompts(
    prompts: Sequence[str | Sequence[Mapping[str, Any]]], tokenizer: Tokenizer, *, apply_chat_template: bool
) -> tuple[list[str], list[list[int]]]:
    """Texts and tokens of prompts, each a string or a list of messages with role and content.

    With the chat template a string is a single user message, and the text ends where the assistant begins. Without
    it the contents of the messages are joined by blank lines, and the tokenizer adds its own special tokens (a
    beginning-of-sequence token, where the model has one).

    Raises:
        UserError: the chat template is asked for and the tokenizer has none.
    """
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("data.apply_chat_template=true, but the tokenizer has no chat template")
    texts = [_text(prompt, tokenizer, apply_chat_template) for prompt in prompts]
    if not texts:
        return [], []
    # The template writes the special tokens itself; adding them again would double the first one.
    encoded = tokenizer(texts, add_special_tokens=not apply_chat_template, return_attention_mask=False)
    return texts, encoded["input_ids"]


def _text(prompt: str | Sequence[Mapping[str, Any]], tokenizer: Tokenizer, apply_chat_template: bool) -> str:
    if not apply_chat_template:
        return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text
