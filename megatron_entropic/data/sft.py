"""Pairs of prompt and response for the warm start, tokenised exactly as reinforcement learning will see them."""

from __future__ import annotations

from pathlib import Path

from megatron_entropic.data.prompts import PromptForm
from megatron_entropic.data.rows import RowProblems, read_rows
from megatron_entropic.data.tokenizer import RenderedPrompt, Tokenizer, encode, lone_surrogate


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
        form: PromptForm | None = None,
    ):
        """Read, tokenise and check every pair.

        Args:
            file: parquet or JSON lines.
            max_sequence_tokens: longest prompt and response together, end-of-sequence token included.
            form: form of the prompts, as training has it (default: `PromptForm()`).

        Raises:
            UserError: listing every row that cannot be used, too long ones included.
        """
        what = "the warm-start data cannot be used"
        form = form or PromptForm()
        problems = RowProblems()
        prompts, responses, rows = [], [], []
        for row in read_rows([file], problems):
            response = row.values.get("response")
            if not isinstance(response, str) or not response:
                problems.add_row(row, "needs a non-empty string in the column 'response'")
                continue
            if half := lone_surrogate([response]):
                problems.add_row(row, "the response has half of a character, which is no Unicode", half)
                continue
            try:
                prompts.append(form.messages(row))
            except ValueError as error:
                problems.add_row(row, str(error))
                continue
            responses.append(RenderedPrompt(response))
            rows.append(row)
        problems.raise_if_any(what)
        rendered = form.render(prompts, tokenizer)
        encode(responses, tokenizer, special_tokens=False)
        self._pairs: list[tuple[list[int], list[int]]] = []
        for row, prompt, response in zip(rows, rendered, responses, strict=True):
            for name, one in (("prompt", prompt), ("response", response)):
                if one.problem:
                    problems.add_row(row, f"the {name} cannot be used: {one.problem}", one.detail)
            before, after = prompt.tokens, response.tokens
            if after[-1:] != [tokenizer.eos_token_id]:
                after = [*after, tokenizer.eos_token_id]
            if len(before) + len(after) > max_sequence_tokens:
                limit = f"more than the budget of {max_sequence_tokens} tokens"
                problems.add_row(row, limit, f"{len(before)} + {len(after)} tokens")
            self._pairs.append((before, after))
        problems.raise_if_any(what)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self._pairs[index]
