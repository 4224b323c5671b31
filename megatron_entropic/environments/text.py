"""Tokens of texts that an environment says, so that what the policy has read and written stays as it is.

    plain_tokens(tokenizer, text)     a text in which no special token is recognised, whatever it holds
    ChatTurns(tokenizer).after(...)   what a chat template adds behind a turn of the policy, and nothing else

A whole conversation made into tokens anew would not give the tokens that the policy wrote: a text has many.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.errors import UserError

_FIRST, _SAID, _ADDED = "qz1first", "qz2said", "qz3added"
"""Contents that no template has in it."""


def plain_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text from outside, in which `<|im_end|>` and the like are letters and end nothing."""
    # Half a surrogate pair, as decoding a binary answer can leave, has no UTF-8.
    usable = text.encode("utf-8", "replace").decode("utf-8")
    ids: list[int] = tokenizer.encode(usable, add_special_tokens=False, split_special_tokens=True)
    return ids


class ChatTurns:
    """The turns of a chat template, each made of what it adds to those before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look at the template of `tokenizer`.

        Raises:
            UserError: there is none, or it writes earlier turns anew when another one follows, as templates do that
                drop what the model thought: then the policy would have read something else than it wrote.
        """
        self._tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template; use plain_tokens and a format of your own")
        before = self._rendered([("user", _FIRST), ("assistant", _SAID)])
        _, _, self._end = before.partition(_SAID)
        """What the template writes behind a turn of the policy."""
        thinking = [("user", _FIRST), ("assistant", f"<think>\n{_ADDED}\n</think>\n\n{_SAID}")]
        for said in ([("user", _FIRST), ("assistant", _SAID)], thinking):
            whole = self._rendered([*said, ("user", _FIRST)])
            if not whole.startswith(self._rendered(said)):
                what = "drops or changes what the model thought" if said is thinking else "changes earlier turns"
                raise UserError(
                    f"the chat template {what} when another turn follows, so that the policy would be trained on "
                    "tokens that it has not seen: give the tokenizer a template that leaves earlier turns as they "
                    "are, or write turns with plain_tokens in a format of your own"
                )

    def after(self, response: Sequence[int], role: str, content: str) -> list[int]:
        """Token ids behind a turn of the policy, up to where its next turn begins.

        Args:
            response: the turn, with the token that ended it, if one did.
            role: who speaks next, such as `user` or `tool`.
            content: what is said, in which no special token is recognised.
        """
        said = [("user", _FIRST), ("assistant", _SAID)]
        before = self._rendered(said)
        whole = self._rendered([*said, (role, _ADDED)], generation=True)
        opening, found, closing = whole[len(before) :].partition(_ADDED)
        if not whole.startswith(before) or not found:
            raise UserError(f"the chat template has no place for a message of the role {role!r} behind the assistant's")
        end = self._control(self._end)
        # The policy writes the end of its turn itself, or was cut off before it.
        missing = end[1:] if response and end and response[-1] == end[0] else end
        return [
            *missing,
            *self._control(opening),
            *plain_tokens(self._tokenizer, content),
            *self._control(closing),
        ]

    def _control(self, text: str) -> list[int]:
        """Token ids of what the template itself writes."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _rendered(self, messages: Sequence[tuple[str, str]], *, generation: bool = False) -> str:
        as_dicts = [{"role": role, "content": content} for role, content in messages]
        text: str = self._tokenizer.apply_chat_template(as_dicts, tokenize=False, add_generation_prompt=generation)
        return text
