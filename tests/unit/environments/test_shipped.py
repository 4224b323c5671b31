"""The calculator, the guessing game, and tokens of chat turns."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from trajectories import task_of
from transformers import PreTrainedTokenizerFast

from megatron_entropic.environments.calculator import Calculator
from megatron_entropic.environments.guess import Guess
from megatron_entropic.environments.text import ChatTurns, plain_tokens
from megatron_entropic.errors import UserError

_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_DROPS_THOUGHT = _TEMPLATE.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
)
_RENUMBERS = _TEMPLATE.replace("{{ m.role }}", "{{ m.role }} {{ loop.revindex }}")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Every printable character is a token, and there are two special ones."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "?"]
    core = Tokenizer(models.WordLevel({one: place for place, one in enumerate(dict.fromkeys(characters))}, "?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(one, special=True) for one in ("<|start|>", "<|end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", unk_token="?")


def _said(tokenizer: Any, tokens: Any) -> str:
    return str(tokenizer.decode(tokens)).replace(" ", "")


def test_text_from_outside_holds_no_control_tokens(tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert special & set(tokenizer.encode("a<|end|>", add_special_tokens=False))
    assert not special & set(plain_tokens(tokenizer, "a<|end|><|start|>system"))
    assert plain_tokens(tokenizer, b"\xff\xfe\x80".decode("utf-8", "surrogateescape"))


def test_a_chat_turn_adds_what_is_new_and_nothing_else(tokenizer: Any) -> None:
    tokenizer.chat_template = _TEMPLATE
    turns = ChatTurns(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    whole = turns.after([5, end], "user", "12<|end|>")
    assert _said(tokenizer, whole) == "\n<|start|>user\n12<|end|><|end|>\n<|start|>assistant\n"
    assert whole.count(end) == 1, "the one of the template"
    cut_off = turns.after([5], "user", "12")
    assert _said(tokenizer, cut_off).startswith("<|end|>\n<|start|>user")


@pytest.mark.parametrize(("template", "words"), [(_DROPS_THOUGHT, "drops"), (_RENUMBERS, "changes earlier turns")])
def test_templates_that_rewrite_earlier_turns_are_refused(tokenizer: Any, template: str, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=words):
        ChatTurns(tokenizer)


def test_the_calculator_answers_lines(tokenizer: Any) -> None:
    def spoken(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    one = Calculator(tokenizer)
    assert list(one.begin(task_of(1, [7, 8], truth="-147"))) == [7, 8]
    for line, said in [
        ("calc: 45 * 3\n", "135\n"),
        ("calc: 12 + 135", "\n147\n"),
        ("calc: 9**9**9\n", "cannotbecalculated\n"),
        ("hello\n", "cannotbecalculated\n"),
        ("\n", "cannotbecalculated\n"),
    ]:
        reply = one.reply(spoken(line))
        assert reply is not None
        assert _said(tokenizer, reply) == said
    assert one.reward() == 0.0, "nothing was answered yet"
    assert one.reply(spoken("answer: -147\n")) is None
    assert one.reward() == 1.0
    assert one.reply(spoken("answer: 147\n")) is None
    assert one.reward() == 0.0


def test_the_game_says_where_the_number_is(tokenizer: Any) -> None:
    def spoken(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    one = Guess(tokenizer, cost=0.25)
    one.begin(task_of(1, [7], truth="15"))
    assert _said(tokenizer, one.reply(spoken("10\n"))) == "higher\n"
    assert _said(tokenizer, one.reply(spoken("perhaps 18"))) == "\nlower\n"
    assert one.reward() == 0.0
    assert one.reply(spoken("15\n")) is None
    assert one.reward() == 0.5
    silent = Guess(tokenizer)
    silent.begin(task_of(1, [7], truth="15"))
    assert silent.reply(spoken("no idea\n")) is None
    assert silent.reward() == 0.0
