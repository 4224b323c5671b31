"""Messages and ground truth from a row: the columns they are in, and the text put around the problem."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_entropic.config.run import DataConfig
from megatron_entropic.data.rows import Row
from megatron_entropic.data.tokenizer import RenderedPrompt, Tokenizer, lone_surrogate, render_prompts
from megatron_entropic.errors import UserError

Messages = list[dict[str, Any]]
"""Messages of a prompt, each with `role` and `content`, both strings."""

_PLAIN_PROMPT_KEYS = ("problem", "question")
_INSTRUCTIONS = "instruction_id_list"
_TRUTH_KEYS = ("reward_model.ground_truth", "answer", "ground_truth")


@dataclass(frozen=True, slots=True)
class PromptForm:
    """Column of the prompt in a row, and the texts and template put around it."""

    key: str = "prompt"
    """Column of the prompt, or a path into nested ones with dots; `problem` and `question` are looked at after it."""
    system: str | None = None
    """System message of prompts that have none."""
    suffix: str = ""
    """Text after the last user message."""
    apply_chat_template: bool = False
    template_date: datetime.date | None = None
    """Date that a chat template gets if it asks for one."""

    @classmethod
    def of(cls, config: DataConfig) -> PromptForm:
        """The form that the configuration asks for."""
        return cls(
            config.prompt_key,
            config.system_prompt,
            config.prompt_suffix,
            config.apply_chat_template,
            config.template_date,
        )

    def messages(self, row: Row) -> Messages:
        """Messages of a row's prompt, with system prompt and suffix.

        Raises:
            UserError: the row has no prompt, or one that cannot be used; saying why.
        """
        messages = [dict(message) for message in read_messages(row, self.key)]
        if self.suffix:
            last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
            messages[last]["content"] += self.suffix
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def render(self, prompts: Sequence[Messages], tokenizer: Tokenizer) -> list[RenderedPrompt]:
        """Make texts and tokens of prompts; see `render_prompts`."""
        return render_prompts(
            prompts, tokenizer, apply_chat_template=self.apply_chat_template, template_date=self.template_date
        )


def read_messages(row: Row, key: str) -> Messages:
    """Read the prompt of a row as messages; a string is one message of the user.

    Raises:
        UserError: no such column, or something else in it than a string or messages, or nothing.
    """
    keys = dict.fromkeys((key, *_PLAIN_PROMPT_KEYS))
    name, prompt = next(((k, v) for k in keys if (v := lookup(row.values, k)) is not None), (None, None))
    if name is None:
        columns = ", ".join(sorted(row.values)) or "none"
        raise UserError(f"no prompt (looked for {', '.join(keys)}; columns: {columns})")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise _wrong_type(name, prompt)
    messages = [_message(message, name, prompt, columnar=row.unit == "row") for message in prompt]
    if not any(message["content"].strip() for message in messages):
        raise UserError(f"the prompt in {name} is empty")
    if half := lone_surrogate(_texts(messages)):
        raise UserError(f"the prompt in {name} has half of a character, which is no Unicode ({half})")
    return messages


def read_truth(row: Row, key: str | None) -> Any:
    """Read the ground truth of a row: a string, a number, or whatever nested value a verifier takes.

    Args:
        key: column or path; None looks for IFEval's two columns, the verl layout's, then `answer` and `ground_truth`.

    Raises:
        UserError: there is none, it is empty, or it is no value that could be one.
    """
    if key is None and row.values.get(_INSTRUCTIONS):
        return {name: row.values.get(name) for name in (_INSTRUCTIONS, "kwargs")}
    keys = _TRUTH_KEYS if key is None else (key,)
    name, truth = next(((k, v) for k in keys if (v := lookup(row.values, k)) is not None), (None, None))
    if name is None:
        columns = ", ".join(sorted(row.values)) or "none"
        raise UserError(f"no ground truth (looked for {', '.join(keys)}; columns: {columns})")
    if not isinstance(truth, str | int | float | dict | list) or (
        isinstance(truth, float) and not math.isfinite(truth)
    ):
        raise UserError(f"the ground truth in {name} is of the wrong type ({_kind(truth)})")
    if isinstance(truth, str | dict | list) and not (truth.strip() if isinstance(truth, str) else truth):
        raise UserError(f"the ground truth in {name} is empty")
    if half := lone_surrogate(_texts(truth)):
        raise UserError(f"the ground truth in {name} has half of a character, which is no Unicode ({half})")
    return truth


def lookup(values: dict[str, Any], path: str) -> Any:
    """The value of a column, or of a path such as `reward_model.ground_truth`; None if there is none."""
    if path in values:
        return values[path]
    value: Any = values
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def problem_text(messages: Messages) -> str:
    """Contents of all messages but the system prompt, joined by blank lines."""
    return "\n\n".join(message["content"] for message in messages if message["role"] != "system")


def _message(value: Any, name: str, prompt: Any, *, columnar: bool) -> dict[str, Any]:
    """Turn a value into a message with text as its content.

    A column of parquet or Arrow gives every message the fields that any row's messages have, null where the row has
    none: these are no fields of the message, and chat templates ask whether a field is there.
    """
    if not isinstance(value, dict):
        raise _wrong_type(name, prompt)
    message: dict[str, Any] = _without_nulls(value) if columnar else {k: v for k, v in value.items() if v is not None}
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list) and content:
        content = _joined_parts(content, name)
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise _wrong_type(name, prompt)
    return message | {"content": content}


def _joined_parts(parts: list[Any], name: str) -> str:
    """Text of content given as parts; the models here read text alone."""
    kinds = {str(part.get("type")) if isinstance(part, dict) else _kind(part) for part in parts}
    if kinds != {"text"} or not all(isinstance(part.get("text"), str) for part in parts):
        raise UserError(
            f"the prompt in {name} has content in parts ({', '.join(sorted(kinds))}): only text is understood, "
            '{"type": "text", "text": ...}'
        )
    return "".join(part["text"] for part in parts)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    """Yields every string in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _wrong_type(name: str, prompt: Any) -> UserError:
    return UserError(
        f"the prompt in {name} is of the wrong type ({_kind(prompt)}): expected a string, or messages with role and "
        "content"
    )


def _kind(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"list of {type(value[0]).__name__}"
    return f"{value}" if isinstance(value, float) and not math.isfinite(value) else type(value).__name__
