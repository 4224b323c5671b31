"""Input and output files of `megatron-entropic score`, JSON lines.

    in    {"tokens": [...], "prompt_length": n}
    out   the same line with "logprobs" and "entropies" (nats) of the tokens after the prompt

Any other keys of a line are carried along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError, reading
from megatron_entropic.files.atomic import atomic_write


@dataclass(frozen=True)
class TokenLine:
    """One line of the input: tokens to score."""

    tokens: list[int]
    """Token ids of the prompt followed by those of the response."""
    prompt_length: int
    record: dict[str, Any]
    """Object of the whole line, other keys included."""


def read_token_file(path: Path, vocab_size: int) -> list[TokenLine]:
    """Read and check every line; blank lines are skipped.

    Args:
        vocab_size: size of the vocabulary: token ids must lie in [0, vocab_size).

    Raises:
        UserError: no such file, a file without lines, or one error that lists every bad line.
    """
    lines = []
    problems = []
    with reading(path):
        content = Path(path).read_text(encoding="utf-8")
    # Not splitlines: U+2028 and its like are allowed inside a JSON string and end no line.
    for number, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            lines.append(_parse(text, vocab_size))
        except ValueError as error:
            problems.append(f"  - line {number}: {error}")
    if problems:
        raise UserError(f"{path}: {len(problems)} lines cannot be scored:\n" + "\n".join(problems))
    if not lines:
        raise UserError(f"{path}: no lines to score")
    return lines


def _parse(text: str, vocab_size: int) -> TokenLine:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from error
    if not isinstance(record, dict) or not {"tokens", "prompt_length"} <= record.keys():
        raise UserError('expected an object with "tokens" and "prompt_length"')
    tokens, prompt_length = record["tokens"], record["prompt_length"]
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise UserError('"tokens" must be a list of integers')
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"tokens {outside[:5]} are outside the vocabulary of {vocab_size}")
    if type(prompt_length) is not int or not 1 <= prompt_length < len(tokens):
        raise UserError(
            f"prompt_length {prompt_length!r} must be at least 1 and less than the number of tokens ({len(tokens)})"
        )
    return TokenLine(tokens, prompt_length, record)


def write_scored_file(
    path: Path,
    lines: Sequence[TokenLine],
    logprobs: Sequence[Sequence[float]],
    entropies: Sequence[Sequence[float] | None],
) -> None:
    """Write each line with `logprobs` and `entropies` (nats; null where unknown) of the tokens after its prompt.

    The file appears when it is complete, with the folders above it.

    Raises:
        UserError: values that are no numbers, which JSON does not know; nothing is written.
    """
    broken = [
        number
        for number, values in enumerate(zip(logprobs, entropies, strict=True), start=1)
        if not all(math.isfinite(value) for part in values for value in part or ())
    ]
    if broken:
        raise UserError(
            f"{path}: not written: the model gives NaN or infinite log-probs for {len(broken)} of {len(lines)} lines, "
            f"the first of them sequence {broken[0]}. Look for such values in its weights (`megatron-entropic convert` "
            "names them), or take a higher --temperature"
        )
    with atomic_write(Path(path)) as file:
        for line, line_logprobs, line_entropies in zip(lines, logprobs, entropies, strict=True):
            values = None if line_entropies is None else list(line_entropies)
            record = {**line.record, "logprobs": list(line_logprobs), "entropies": values}
            file.write((json.dumps(record) + "\n").encode())
