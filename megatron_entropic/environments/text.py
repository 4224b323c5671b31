"""Tokens of texts that an environment says, so that what the policy has read and written stays as it is.

    plain_tokens(tokenizer, text)     a text in which no special token is recognised, whatever it holds
    ChatTurns(tokenizer).opening(...) the first messages of a conversation
    ChatTurns(tokenizer).after(...)   what a chat template adds behind a turn of the policy, and nothing else

A whole conversation made into tokens anew would not give the tokens that the policy wrote: a text has many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.errors import UserError

_FIRST, _SAID, _ADDED = "qz1first", "qz2said", "qz3added"
"""Contents that no template has in it."""
Message = tuple[str, str]
"""Who speaks, such as `user` or `tool`, and what is said, in which no special token is recognised."""


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

    def opening(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of the first messages of a conversation, up to where the policy's first turn begins.

        Args:
            messages: system message, user's message.
            tools: functions with type hints, or their JSON schemas, for templates that show tools to the policy.
        """
        marked = [(role, _mark(place)) for place, (role, _) in enumerate(messages)]
        return self._filled(self._rendered(marked, generation=True, tools=tools), messages)

    def after(self, response: Sequence[int], role: str, content: str) -> list[int]:
        """Token ids of one message behind a turn of the policy; see `after_messages`."""
        return self.after_messages(response, [(role, content)])

    def after_messages(self, response: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Token ids behind a turn of the policy, up to where its next turn begins.

        Args:
            response: the turn, with the token that ended it, if one did.
            messages: what is said next, by one or several.
        """
        said = [("user", _FIRST), ("assistant", _SAID)]
        before = self._rendered(said)
        marked = [(role, _mark(place)) for place, (role, _) in enumerate(messages)]
        whole = self._rendered([*said, *marked], generation=True)
        if not whole.startswith(before):
            raise _no_place(messages[0][0])
        end = self._control(self._end)
        # The policy writes the end of its turn itself, or was cut off before it.
        missing = end[1:] if response and end and response[-1] == end[0] else end
        return [*missing, *self._filled(whole[len(before) :], messages)]

    def _filled(self, text: str, messages: Sequence[Message]) -> list[int]:
        """Token ids of what the template wrote around marks, with the contents of `messages` in their places."""
        ids: list[int] = []
        for place, (role, content) in enumerate(messages):
            opening, found, text = text.partition(_mark(place))
            if not found:
                raise _no_place(role)
            ids += [*self._control(opening), *plain_tokens(self._tokenizer, content)]
        return [*ids, *self._control(text)]

    def _control(self, text: str) -> list[int]:
        """Token ids of what the template itself writes."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _rendered(
        self, messages: Sequence[Message], *, generation: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        as_dicts = [{"role": role, "content": content} for role, content in messages]
        text: str = self._tokenizer.apply_chat_template(
            as_dicts, tokenize=False, add_generation_prompt=generation, tools=list(tools) if tools else None
        )
        return text


def _mark(place: int) -> str:
    return f"{_ADDED}{place}z"


def _no_place(role: str) -> UserError:
    return UserError(f"the chat template has no place there for a message of the role {role!r}")
