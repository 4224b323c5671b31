"""Whether the files of a model directory agree on how a response ends: one look at start, before anything is loaded.

tokenizer files: eos_token          what the warm start appends, what texts end with
config.json, generation_config.json: eos_token_id   what engines stop at
config.json: vocab_size             rows of the embedding; ids of prompts are compared as they are made (`tokenizer`)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_entropic.data.tokenizer import Tokenizer, embedding_rows, load_tokenizer
from megatron_entropic.errors import UserError

_END_FILES = ("generation_config.json", "config.json")


def load_checked_tokenizer(hf_dir: Path) -> Tokenizer:
    """The tokenizer of a model that is going to answer, after a comparison with the model's own files.

    Raises:
        UserError: it cannot be loaded (`load_tokenizer`), or its end-of-sequence token is none that engines stop at, or
            an end token is beyond the embedding; all of it in one message.
    """
    tokenizer = load_tokenizer(hf_dir)
    ends, own, rows = stop_token_ids(hf_dir), tokenizer.eos_token_id, embedding_rows(tokenizer)
    problems = []
    if own not in ends:
        named = ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in ends) or "none"
        problems.append(
            f"the tokenizer ends a text with {own} {tokenizer.eos_token!r}, but config.json and generation_config.json "
            f"name other end tokens (eos_token_id: {named}), so that responses would run on past it: set eos_token_id "
            f"in generation_config.json to {[*ends, own] if ends else own}, or eos_token in tokenizer_config.json"
        )
    beyond = sorted({token for token in [*ends, own] if rows is not None and token >= rows})
    if beyond:
        problems.append(
            f"the end token {', '.join(map(str, beyond))} is beyond the embedding (vocab_size in config.json: {rows}): "
            "the model can never say it"
        )
    if problems:
        raise UserError("\n".join(f"{hf_dir}: {problem}" for problem in problems))
    return tokenizer


def stop_token_ids(hf_dir: Path) -> list[int]:
    """End-of-sequence ids of generation_config.json and config.json, ascending; empty if neither names one.

    Raises:
        UserError: one of the files cannot be read, or its eos_token_id is no token id.
    """
    found: set[int] = set()
    for file in _END_FILES:
        path = hf_dir / file
        if not path.exists():
            continue
        value = _object(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{path}: eos_token_id {value!r} is no token id and no list of token ids")
        found |= set(ids)
    return sorted(found)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {str(error)[:200] or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
