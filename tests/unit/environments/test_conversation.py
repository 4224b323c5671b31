"""Conversations as state machines: what engines are sent, what the policy is trained on."""

from __future__ import annotations

import random

import numpy as np
import pytest
from trajectories import reward_of, task_of

from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.environments.conversation import Answer, Conversation, Limits
from megatron_entropic.errors import RunError
from megatron_entropic.training.conversation_metrics import conversation_metrics
from megatron_entropic.training.step import minibatches, training_batch
from megatron_entropic.types import CUT, Group, Origin, Response, Segment


def _tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def _part(ids: list[int], version: int, reason: str) -> Response:
    return Response(Segment(_tokens(*ids), -_tokens(*ids) / 7, version), reason)


def _conversation(limits: Limits, prompt: list[int] | None = None) -> Conversation:
    return Conversation(task_of(1, prompt or [1, 2]), 0, 77, "3/1", limits)


@pytest.mark.parametrize("seed", range(40))
def test_what_engines_were_sent_is_what_is_trained_on(seed: int) -> None:
    """Random turns, cuts, replies and new contexts: what is learned is what was sent, the mask is what was sampled."""
    draw = random.Random(seed)
    one = _conversation(Limits(draw.randint(1, 6), draw.randint(1, 9), draw.randint(8, 40), 5))
    one.answered(Answer(_tokens(*draw.choices(range(50), k=draw.randint(1, 5)))))
    read, sampled, seeds = [one.task.tokens.tolist()], [[]], []
    while not one.over:
        request = one.request
        seeds.append(request.own_seed)
        assert request.tokens.tolist() == read[-1]
        assert request.limit is not None
        assert request.done < request.limit, "there is something to sample"
        count = draw.randint(1, request.limit - request.done)
        ids = draw.choices(range(50), k=count)
        read[-1] += ids
        sampled[-1] += ids
        full = count == request.limit - request.done
        reason = "length" if full else draw.choice([CUT, "stop"])
        if one.add(_part(ids, draw.randint(0, 3), reason)):
            call = one.call
            said = draw.choices(range(50), k=draw.randint(1, max(1, call.room)))
            if not call.ends and draw.random() < 0.2:
                prompt = draw.choices(range(50), k=draw.randint(1, call.prompt_room))
                one.answered(Answer(_tokens(*prompt), new_context=True))
                read.append(prompt)
                sampled.append([])
            elif not call.last and len(said) <= call.room and draw.random() < 0.8:
                one.answered(Answer(_tokens(*said)))
                read[-1] += said
            else:
                one.answered(Answer(None, call.last or "over", reward=1.0))
    trajectory = one.trajectory(lambda tokens: str(tokens.tolist()))
    assert len(set(seeds)) == len(seeds), "no two pieces are drawn from one seed"
    if not sampled[-1]:
        del sampled[-1], read[-1]
    group = Group((trajectory, trajectory), (reward_of(1.0), reward_of(0.0)))
    batch = training_batch([group], "grpo_no_std")
    assert len(batch.sequences) == len(batch.trajectories) == len(batch.rewards) == 2 * len(read)
    for context, sequence, tokens, own in zip(trajectory.contexts, batch.sequences, read, sampled, strict=False):
        assert sequence.tokens.tolist() == tokens
        assert sequence.tokens[sequence.response_places].tolist() == own
        assert sequence.rollout_logprobs is not None
        assert sequence.advantages is not None
        assert sequence.rollout_logprobs.numel() == sequence.response_length == len(own)
        assert sequence.advantages.tolist() == [0.5] * len(own)
        assert context.turn_numbers.size == len(own)
        assert context.continuation_length <= one.limits.max_tokens
    assert sum(int(context.turn_numbers[-1]) for context in trajectory.contexts) == len(one.turns)
    assert len(one.turns) <= one.limits.max_turns
    assert [part.tolist() for part in one.turns] == [turn.tolist() for turn in one.call.turns]


def test_a_single_answer_is_asked_for_as_before() -> None:
    one = Conversation(task_of(1, [1, 2]), 0, 77, "3/1", Limits.of(None, 10, 99), begun=True)
    assert (one.request.seed, one.request.limit, one.turn_group) == (77, 10, "3/1")
    assert not one.add(_part([4, 5], 1, CUT))
    assert one.add(_part([6], 2, "stop"))
    one.end()
    trajectory = one.trajectory(lambda tokens: str(tokens.tolist()))
    assert trajectory.mask is None
    assert (trajectory.text, trajectory.finish_reason, trajectory.ending) == ("[4, 5, 6]", "stop", "")
    assert conversation_metrics([trajectory]) == {}, "a run without an environment says nothing of conversations"


def test_each_turn_has_a_seed_and_a_name_of_its_own() -> None:
    one = _conversation(Limits.of(EnvironmentConfig(name="guess", max_turns=3), 20, 99))
    one.answered(Answer(_tokens(1, 2)))
    first = one.request
    one.add(_part([4], 1, "stop"))
    assert [turn.tolist() for turn in one.call.turns] == [[4]]
    one.answered(Answer(_tokens(9, 9)))
    second = one.request
    assert (one.turn_group, second.done, second.tokens.tolist()) == ("3/1/turn 2", 0, [1, 2, 4, 9, 9])
    assert second.seed not in (first.seed, first.own_seed)
    one.add(_part([5], 2, CUT))
    assert (one.request.done, one.turn_group) == (1, "3/1/turn 2")
    one.add(_part([6], 3, "stop"))
    assert [answer.tolist() for answer in one.call.answers] == [[1, 2], [9, 9]]
    one.answered(Answer(None, "over", reward=0.5))
    trajectory = one.trajectory(lambda tokens: str(tokens.tolist()))
    assert [segment.origin for segment in trajectory.segments] == [
        Origin.POLICY,
        Origin.ENVIRONMENT,
        Origin.POLICY,
        Origin.POLICY,
    ]
    assert trajectory.mask is not None
    assert trajectory.mask.tolist() == [True, False, False, True, True]
    assert trajectory.turn_numbers.tolist() == [1, 2, 2]
    assert (trajectory.weights_version, trajectory.ending) == (1, "over")
    assert trajectory.verdict is not None
    assert (trajectory.verdict.status, trajectory.verdict.reward) == ("ok", 0.5)


def test_limits_end_a_conversation_and_leave_room_to_answer() -> None:
    one = _conversation(Limits(9, 4, 6, 99))
    one.answered(Answer(_tokens(1)))
    one.add(_part([4, 4, 4], 1, "stop"))
    assert one.call.last == ""
    assert one.call.room == 2, "one more is the policy's"
    one.answered(Answer(_tokens(8, 8)))
    assert one.request.limit == 1
    one.add(_part([4], 1, "length"))
    assert one.call.last == "length"
    last_turn = _conversation(Limits(1, 4, 6, 99))
    last_turn.answered(Answer(_tokens(1)))
    last_turn.add(_part([4], 1, "stop"))
    assert last_turn.call.last == "turns"


@pytest.mark.parametrize(("ending", "status"), [("timeout", "timeout"), ("error", "error"), ("lost", "error")])
def test_a_tool_that_fails_is_not_a_wrong_answer(ending: str, status: str) -> None:
    one = _conversation(Limits(2, 4, 6, 99))
    one.answered(Answer(_tokens(1)))
    one.add(_part([4], 1, "stop"))
    answer = Answer(None, ending, message="broken")  # type: ignore[arg-type]
    one.answered(answer)
    verdict = one.trajectory(lambda tokens: str(tokens.tolist())).verdict
    assert verdict is not None
    assert (verdict.status, verdict.message) == (status, "environment: broken")


def test_an_attempt_without_a_word_counts_and_is_not_learned() -> None:
    failed = _conversation(Limits(2, 4, 6, 99))
    failed.answered(Answer(None, "error", message="no server"))
    spoke = _conversation(Limits(2, 4, 6, 99))
    spoke.answered(Answer(_tokens(1)))
    spoke.add(_part([4], 1, "stop"))
    spoke.answered(Answer(None, "over", reward=1.0))
    attempts = (failed.trajectory(lambda tokens: str(tokens.tolist())), spoke.trajectory(str))
    batch = training_batch([Group(attempts, (reward_of(1.0, "error"), reward_of(1.0)))], "grpo_no_std")
    assert [one.tokens.tolist() for one in batch.sequences] == [[1, 4]]
    assert minibatches(batch, 1, None) == [list(batch.sequences)]
    with pytest.raises(RunError, match="first word: environment: no server"):
        training_batch([Group((attempts[0],) * 2, (reward_of(0.0, "error"),) * 2)], "grpo_no_std")
