"""What a process of environments makes of what environments do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Hostile, Sync
from trajectories import task_of

from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.environments.conversation import Answer, Call, Ending, Key
from megatron_entropic.environments.host import EnvironmentHost
from megatron_entropic.environments.worker import Conversations, environment_maker
from megatron_entropic.errors import UserError


def _call(
    what: str, turns: list[list[int]], *, answers: list[list[int]] | None = None, room: int = 100, last: Ending = ""
) -> Call:
    task = task_of(1, [1, 2], truth=what)
    arrays = [np.array(turn, np.int32) for turn in turns]
    said = [np.array(answer, np.int32) for answer in answers or []]
    return Call(Key("1/0", 0, len(turns)), task, tuple(arrays), tuple(said), room, 50, last)


def _answers(calls: list[Call], made: type = Hostile, timeout_s: float = 0.2) -> list[Answer]:
    conversations = Conversations(lambda: made(None), timeout_s, vocabulary=1000)

    async def talk() -> list[Answer]:
        return [await conversations.answer(call) for call in calls]

    return asyncio.run(talk())


@pytest.mark.parametrize("made", [Hostile, Sync])
def test_a_conversation_from_begin_to_reward(made: type) -> None:
    began, first, second, last = _answers(
        [
            _call("", []),
            _call("", [[3]], answers=[[1, 2]]),
            _call("", [[3], [4]], answers=[[1, 2], [4]]),
            _call("", [[3], [4], [5]], answers=[[1, 2], [4], [5]]),
        ],
        made,
    )
    assert [one.tokens.tolist() for one in (began, first, second) if one.tokens is not None] == [[1, 2], [4], [5]]
    assert (last.tokens, last.ending, last.reward) == (None, "over", 12.0)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raises", "ValueError: no such tool"),
        ("raises a timeout of its own", "TimeoutError: the tool's own"),
        ("exits", "SystemExit"),
        ("empty", "no list of token ids; None ends the conversation"),
        ("text", "returned 'result'"),
        ("beyond the vocabulary", "the token 1000000, but the model knows 0 to 999"),
        ("negative", "the token -1"),
        ("floats", "no list of token ids"),
        ("nested", "no list of token ids"),
    ],
)
def test_what_goes_wrong_is_an_event_with_words(what: str, words: str) -> None:
    (answer,) = _answers([_call(what, [[3]], answers=[[1, 2]])])
    assert (answer.tokens, answer.ending, answer.reward) == (None, "error", None)
    assert words in answer.message
    assert answer.verdict is not None
    assert answer.verdict.status == "error"


@pytest.mark.parametrize(("made", "what"), [(Hostile, "hangs"), (Sync, "sleeps")])
def test_what_hangs_ends_its_own_conversation_alone(made: type, what: str) -> None:
    late, fine = _answers([_call(what, [[3]], answers=[[1, 2]]), _call("", [[3]], answers=[[1, 2]])], made)
    assert (late.ending, late.message) == ("timeout", "no answer within 0.2 s")
    assert late.verdict is not None
    assert late.verdict.status == "timeout"
    assert fine.tokens is not None


def test_an_answer_that_has_no_room_ends_the_conversation_with_its_reward() -> None:
    (answer,) = _answers([_call("10 MB", [[3]], answers=[[1, 2]])], timeout_s=30)
    assert (answer.tokens, answer.ending, answer.reward) == (None, "length", 3.0)


def test_a_reply_may_replace_the_context() -> None:
    (new,) = _answers([_call("summarises", [[3]], answers=[[1, 2]])])
    assert new.tokens is not None
    assert (new.tokens.tolist(), new.new_context) == ([7, 8], True)
    full, over, long = _answers(
        [
            _call("summarises", [[3]], answers=[[1, 2]], last="length"),
            _call("summarises", [[3], [4]], answers=[[1, 2], [7, 8]], last="turns"),
            _call("summarises at length", [[3]], answers=[[1, 2]]),
        ]
    )
    assert full.new_context, "there is room in another context"
    assert (over.tokens, over.ending) == (None, "turns")
    assert (long.ending, long.message) == (
        "error",
        "UserError: reply() returned a prompt of 60 tokens, data.max_prompt_tokens=50",
    )


def test_the_last_turn_is_heard_though_nothing_can_follow() -> None:
    (answer,) = _answers([_call("", [[3]], answers=[[1, 2]], last="turns")])
    assert (answer.tokens, answer.ending, answer.reward) == (None, "turns", 3.0)


def test_rewards_that_are_none_or_no_number() -> None:
    kwargs: dict[str, Any] = {"answers": [[1, 2]], "last": "turns"}
    unjudged, odd = _answers([_call("unjudged", [[3]], **kwargs), _call("no number", [[3]], **kwargs)])
    assert (unjudged.reward, unjudged.verdict) == (None, None), "a verifier is asked"
    assert (odd.ending, odd.message) == ("error", "UserError: reward() returned nan")


def test_another_process_gets_to_the_same_state_and_counts_what_is_different_now() -> None:
    same, different = _answers(
        [
            _call("", [[3], [4]], answers=[[1, 2], [4]]),
            _call("", [[3], [4], [5]], answers=[[1, 2], [99], [5]]),
        ]
    )
    assert same.tokens is not None
    assert (same.tokens.tolist(), same.differences) == ([5], 0)
    # The object of the call before is at this turn already: nothing is asked again.
    assert (different.ending, different.reward, different.differences) == ("over", 12.0, 0)
    (fresh,) = _answers([_call("", [[3], [4], [5]], answers=[[1, 2], [99], [5]])])
    assert (fresh.ending, fresh.reward, fresh.differences) == ("over", 12.0, 1)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("hostile:NoReward", {}, "lacks reward"),
        ("hostile:Hostile", {"speed": 3}, r"cannot be made with environment.settings=\{'speed': 3\}: TypeError"),
        ("hostile:Missing", {}, "there is no function or class Missing"),
        ("no.such.module:Class", {}, "cannot be imported"),
    ],
)
def test_an_environment_that_cannot_be_made_says_why(name: str, settings: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        environment_maker(EnvironmentConfig(name=name, settings=settings), None)


def test_a_setting_may_be_an_argument_without_a_default() -> None:
    """The class was refused before its settings were looked at: `missing a required argument`."""
    made = environment_maker(EnvironmentConfig(name="hostile:Wants", settings={"url": "http://here"}), None)()
    assert made.url == "http://here"
    with pytest.raises(UserError, match=r"environment.settings=\{\}: TypeError: .*'url'"):
        environment_maker(EnvironmentConfig(name="hostile:Wants"), None)


@pytest.mark.parametrize(("name", "extra"), [("verifiers", "verifiers"), ("openenv", "openenv"), ("trl_tools", "trl")])
def test_a_package_that_is_not_there_is_named(name: str, extra: str) -> None:
    with pytest.raises(UserError, match=rf"pip install 'megatron_entropic\[{extra}\]'"):
        environment_maker(EnvironmentConfig(name=name), None)


def test_a_folder_of_packages_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = EnvironmentConfig(name="guess", packages_dir=tmp_path / "none")
    with pytest.raises(UserError, match=r"environment.packages_dir=.*/none: there is no such folder"):
        EnvironmentHost(config, tmp_path)
