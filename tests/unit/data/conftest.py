"""A character tokenizer, saved and loaded as a model's is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_entropic.data import load_tokenizer

CHARACTERS = "0123456789+-*,>:$_ abcdefghijklmnopqrstuvwxyz<|\n"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}|{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant|{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character tokenizer with `$` as end of sequence, saved as transformers saves one."""
    inner = Tokenizer(models.WordLevel({character: i for i, character in enumerate(CHARACTERS)}, unk_token="_"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="$", pad_token="_", unk_token="_")
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)
