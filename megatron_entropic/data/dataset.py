"""The prompts of a run, read, tokenised and checked before anything is allocated.

Two layouts are understood, in parquet or JSON lines:
- verl: `prompt` (a list of messages, or a string; data.prompt_key names it), `reward_model.ground_truth`, and
  optionally `data_source` and `extra_info`;
- plain: `problem` (or `question`) and `answer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_entropic.config import DataConfig
from megatron_entropic.data.order import EpochOrder
from megatron_entropic.data.rows import Problems, Row, read_rows
from megatron_entropic.data.tokenizer import Tokenizer, render_prompts
from megatron_entropic.types import Prompt

_PLAIN_PROMPT_KEYS = ("problem", "question")
_GROUND_TRUTH_KEYS = ("answer", "ground_truth")


class PromptDataset:
    """All prompts in memory, indexed by row; `at_step` says which of them a step takes."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, seed: int):
        """Read every file, tokenise every prompt and check all of them.

        Raises:
            ValueError: listing every file and row that cannot be used: no such file, no rows, missing columns,
                prompts that are empty or longer than `max_prompt_tokens` (unless `too_long: drop`).
        """
        what = "the training data cannot be used"
        problems = Problems()
        rows = read_rows(config.train_files, problems)
        usable = [(row, *found) for row in rows if (found := _prompt_and_truth(row, config.prompt_key, problems))]
        problems.raise_if_any(what)
        texts, tokens = render_prompts(
            [prompt for _, prompt, _ in usable], tokenizer, apply_chat_template=config.apply_chat_template
        )
        self.dropped = 0
        """Prompts left out for their length."""
        self._prompts: list[Prompt] = []
        for index, ((row, _, truth), text, ids) in enumerate(zip(usable, texts, tokens, strict=True)):
            if not ids:
                problems.add(f"{row.place}: the prompt has no tokens")
            elif len(ids) <= config.max_prompt_tokens:
                self._prompts.append(_prompt(index, row, text, ids, truth))
            elif config.too_long == "drop":
                self.dropped += 1
            else:
                problems.add(
                    f"{row.place}: {len(ids)} tokens, more than data.max_prompt_tokens={config.max_prompt_tokens}"
                )
        if not self._prompts and not problems.messages:
            problems.add(
                f"all {self.dropped} prompts are longer than data.max_prompt_tokens={config.max_prompt_tokens}"
            )
        problems.raise_if_any(what)
        self._order = EpochOrder(len(self._prompts), seed=seed, shuffle=config.shuffle)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, position: int) -> Prompt:
        return self._prompts[position]

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt once, in the order of the files."""
        return list(self._prompts)

    def at_step(self, step: int, count: int) -> list[Prompt]:
        """The `count` prompts of `step` (counted from 1), every step of the run taking as many.

        A pure function of the files, the seed and the arguments: a resumed run continues with the same prompts.
        """
        assert step >= 1, "steps are counted from 1"
        return [self._prompts[row] for row in self._order.rows((step - 1) * count, count)]


def read_prompt(row: Row, prompt_key: str) -> str | list[dict[str, Any]] | None:
    """The prompt of a row: a string or messages with string contents; None if there is none that can be used."""
    for key in (prompt_key, *_PLAIN_PROMPT_KEYS):
        prompt = row.values.get(key)
        if isinstance(prompt, str) and prompt:
            return prompt
        if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
            return prompt
    return None


def _prompt_and_truth(row: Row, prompt_key: str, problems: Problems) -> tuple[str | list[dict[str, Any]], Any] | None:
    prompt, truth = read_prompt(row, prompt_key), _ground_truth(row.values)
    found = ", ".join(sorted(row.values)) or "none"
    if prompt is None:
        keys = ", ".join((prompt_key, *_PLAIN_PROMPT_KEYS))
        problems.add(f"{row.place}: no prompt (looked for a string or messages in {keys}; columns: {found})")
    if truth is None:
        keys = ", ".join(("reward_model.ground_truth", *_GROUND_TRUTH_KEYS))
        problems.add(f"{row.place}: no ground truth (looked for {keys}; columns: {found})")
    return None if prompt is None or truth is None else (prompt, truth)


def _ground_truth(values: dict[str, Any]) -> Any:
    reward_model = values.get("reward_model")
    if isinstance(reward_model, dict) and reward_model.get("ground_truth") is not None:
        return reward_model["ground_truth"]
    return next((values[key] for key in _GROUND_TRUTH_KEYS if values.get(key) is not None), None)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _prompt(index: int, row: Row, text: str, tokens: list[int], truth: Any) -> Prompt:
    extra = row.values.get("extra_info")
    return Prompt(
        index=index,
        tokens=tokens,
        text=text,
        ground_truth=truth,
        data_source=str(row.values.get("data_source") or Path(row.file).stem),
        extra_info=extra if isinstance(extra, dict) else {},
    )
