"""(prompt, response) pairs of the supervised warm start, tokenised exactly as reinforcement learning will see them."""

from __future__ import annotations

from pathlib import Path

from megatron_entropic.data.dataset import read_prompt
from megatron_entropic.data.rows import Problems, read_rows
from megatron_entropic.data.tokenizer import Tokenizer, render_prompts


class WarmStartPairs:
    """Token lists of a parquet or JSON-lines file with the columns prompt and response, indexed by row.

    Prompt and response are tokenised apart, so the boundary falls where sampling will put it; the response ends
    with the end-of-sequence token, added where the text does not have it.
    """

    def __init__(
        self,
        file: Path,
        tokenizer: Tokenizer,
        max_sequence_tokens: int,
        *,
        prompt_key: str = "prompt",
        apply_chat_template: bool = False,
    ):
        """Read, tokenise and check every pair.

        Args:
            max_sequence_tokens: longest prompt and response together, end-of-sequence token included.
            prompt_key, apply_chat_template: as in `DataConfig`.

        Raises:
            ValueError: listing every row that cannot be used, too long ones included.
        """
        what = "the warm-start data cannot be used"
        problems = Problems()
        prompts, responses, places = [], [], []
        for row in read_rows([file], problems):
            prompt, response = read_prompt(row, prompt_key), row.values.get("response")
            if prompt is None or not isinstance(response, str) or not response:
                problems.add(f"{row.place}: needs a prompt and a non-empty string in the column 'response'")
                continue
            prompts.append(prompt)
            responses.append(response)
            places.append(row.place)
        problems.raise_if_any(what)
        _, prompt_tokens = render_prompts(prompts, tokenizer, apply_chat_template=apply_chat_template)
        response_tokens = tokenizer(responses, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        self._pairs: list[tuple[list[int], list[int]]] = []
        for place, before, after in zip(places, prompt_tokens, response_tokens, strict=True):
            if after[-1:] != [tokenizer.eos_token_id]:
                after = [*after, tokenizer.eos_token_id]
            if len(before) + len(after) > max_sequence_tokens:
                problems.add(
                    f"{place}: {len(before)} + {len(after)} tokens, more than the budget of {max_sequence_tokens}"
                )
            self._pairs.append((before, after))
        problems.raise_if_any(what)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self._pairs[index]
