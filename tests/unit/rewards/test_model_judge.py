"""A language model as verifier, over real loopback connections: what it is asked, kept, told, and protected from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Handler, JudgeServer, serving

from megatron_entropic.config.data import RewardConfig
from megatron_entropic.config.names import PROMPT
from megatron_entropic.config.reward_checks import reward_violations
from megatron_entropic.config.run import Config
from megatron_entropic.errors import UserError
from megatron_entropic.rewards.verifier import judge
from megatron_entropic.rewards.verifiers.judge import build, probe
from megatron_entropic.rewards.verifiers.judge_cache import Answer, AnswerCache
from megatron_entropic.types import Verdict

TEMPLATE = "[{prompt}] [{ground_truth}] [{response}]"


def asked_of(question: dict[str, Any]) -> str:
    return str(question["messages"][-1]["content"])


def agreeable(handler: Handler, question: dict[str, Any]) -> None:
    """Judges right what holds the word right."""
    handler.answer(f"Let me see. Verdict: 0? No.\nVerdict: {int('[right' in asked_of(question))}")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving(agreeable) as started:
        yield started


def section(server: JudgeServer | None, cache_file: Path | None = None, **settings: Any) -> RewardConfig:
    urls = [] if server is None else [server.url]
    asked = {"urls": urls, "model": "m", "template": TEMPLATE, "backoff_s": 0, "request_timeout_s": 25}
    return RewardConfig(verifier="judge", judge={**asked, "cache_file": cache_file, **settings})


def verdicts(reward: RewardConfig, *responses: str) -> list[Verdict]:
    return judge(build(reward), [(response, "4", {PROMPT: "2+2"}) for response in responses])


def total(found: list[Verdict], name: str) -> float:
    return sum(verdict.measures[f"judge/{name}"] for verdict in found)


def test_the_last_verdict_counts_and_order_is_kept(server: JudgeServer) -> None:
    responses = ["right", "wrong", "right and {prompt} {ground_truth}", *(f"wrong {n}" for n in range(40))]
    found = verdicts(section(server), *responses)
    assert [verdict.reward for verdict in found] == [1.0, 0.0, 1.0, *[0.0] * 40]
    assert {verdict.status for verdict in found} == {"ok"}
    asked = {asked_of(question) for question in server.questions}
    assert "[2+2] [4] [right and {prompt} {ground_truth}]" in asked, "a response fills no blanks"
    assert total(found, "requests") == 43
    assert total(found, "prompt_tokens") == 43 * 20


def test_equal_questions_are_asked_once_in_the_life_of_a_run(server: JudgeServer, tmp_path: Path) -> None:
    kept = section(server, tmp_path / "run" / "judge.sqlite")
    first = verdicts(kept, "right", "right", "wrong")
    assert (total(first, "requests"), total(first, "cache_hits"), len(server.questions)) == (2, 1, 2)
    server.reply = lambda handler, question: handler.answer("Verdict: 0")
    again = verdicts(kept, "right", "wrong")
    assert [verdict.reward for verdict in again] == [1.0, 0.0]
    assert (total(again, "requests"), total(again, "completion_tokens"), len(server.questions)) == (0, 0, 2)
    (other,) = verdicts(section(server, tmp_path / "run" / "judge.sqlite", max_tokens=9), "right")
    assert other.reward == 0.0, "another question: the settings are part of it"


def test_nothing_is_written_before_there_is_an_answer(tmp_path: Path) -> None:
    with serving(lambda handler, question: handler.say(b"no", status=400)) as server:
        verdicts(section(server, tmp_path / "run" / "judge.sqlite", token_limit=10), "right")
    assert AnswerCache(tmp_path / "run" / "judge.sqlite").get("x") is None


def test_votes_are_asked_with_seeds_of_their_own_and_disagreement_is_measured(server: JudgeServer) -> None:
    server.reply = lambda handler, question: handler.answer(f"Verdict: {question['seed'] % 2}")
    (found,) = verdicts(section(server, votes=4, temperature=0.7), "right")
    assert sorted(question["seed"] for question in server.questions) == [0, 1, 2, 3]
    assert (found.reward, found.measures["judge/disagreement_mean"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("settings", "said", "reward"),
    [
        ({}, "Verdict: 2", None),
        ({}, "I cannot say.", None),
        ({}, None, None),
        ({"best": 10}, "Verdict: 7.5", 0.75),
        ({"verdict_pattern": "yes|no", "verdicts": {"Yes": 1, "no": -1}}, "yes... no, YES: no", -1.0),
        ({"verdict_pattern": r"\b(\w+)$", "verdicts": {"yes": 1}}, "perhaps", None),
    ],
)
def test_reading_a_verdict(server: JudgeServer, settings: dict[str, Any], said: str | None, reward: Any) -> None:
    server.reply = lambda handler, question: handler.answer(said)
    (found,) = verdicts(section(server, **settings), "right")
    if reward is None:
        assert (found.status, found.measures["judge/unreadable"]) == ("error", 1.0)
        assert "no verdict (reward.judge.verdict_pattern)" in found.message
    else:
        assert (found.status, found.reward) == ("ok", reward)


def _trickle(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.released.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def _cut_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


HOSTILE: dict[str, tuple[Any, str, str]] = {
    "hangs": (lambda handler: handler.server.released.wait(60), "timeout", "no answer within"),
    "trickles": (_trickle, "timeout", "did not come to an end in time"),
    "500": (lambda handler: handler.say(b"out of memory", status=500), "error", "HTTP 500: out of memory"),
    "redirects": (lambda handler: handler.say(b"", 302, Location="http://127.0.0.1:1/"), "error", "HTTP 302"),
    "garbage": (lambda handler: handler.say(b"\xff\x00{"), "error", "not a chat completion"),
    "nested": (lambda handler: handler.say(b"[" * 100_000), "error", "not a chat completion"),
    "shape": (lambda handler: handler.say(b'{"choices": [{"message": 5}]}'), "error", "not a chat completion"),
    "large": (lambda handler: handler.say(b" " * 10_000_000), "error", "more than 1,048,576 bytes"),
    "closes": (_cut_off, "error", "RemoteProtocolError"),
}


def test_a_server_that_misbehaves_costs_the_response_alone(server: JudgeServer) -> None:
    def reply(handler: Handler, question: dict[str, Any]) -> None:
        text = asked_of(question)
        kind = next((kind for kind in HOSTILE if f"[{kind}]" in text), None)
        agreeable(handler, question) if kind is None else HOSTILE[kind][0](handler)

    server.reply = reply
    slow = [kind for kind, (_, status, _) in HOSTILE.items() if status == "timeout"]
    quick = [kind for kind in HOSTILE if kind not in slow]
    # The short limit is for those alone that never end: a busy machine takes its time for the others.
    found = [*verdicts(section(server, request_timeout_s=0.3, retries=1), *slow)]
    *failed, last = verdicts(section(server, request_timeout_s=25, retries=1), *quick, "right")
    assert (last.status, last.reward) == ("ok", 1.0)
    for kind, verdict in zip((*slow, *quick), (*found, *failed), strict=True):
        _, status, message = HOSTILE[kind]
        assert verdict.status == status, (kind, verdict)
        # On a busy machine the time may be over before the first byte.
        assert message in verdict.message or (kind in slow and "no answer within" in verdict.message), (kind, verdict)
        assert verdict.measures["judge/failures"] == 1.0


def test_numbers_of_tokens_that_are_none_do_not_count(server: JudgeServer) -> None:
    usage = {"prompt_tokens": "many", "completion_tokens": 10**400}
    reply = {"choices": [{"message": {"content": "Verdict: 1"}}], "usage": usage}
    server.reply = lambda handler, question: handler.say(json.dumps(reply).encode())
    (found,) = verdicts(section(server), "right")
    assert (found.reward, found.measures["judge/prompt_tokens"], found.measures["judge/completion_tokens"]) == (1, 0, 0)


def test_a_request_that_may_succeed_later_is_tried_again_elsewhere(server: JudgeServer) -> None:
    with serving(lambda handler, question: handler.say(b"busy", status=503)) as busy:
        two = section(server, urls=[busy.url, server.url])
        found = verdicts(two, *(f"right {n}" for n in range(16)))
    assert {verdict.reward for verdict in found} == {1.0}
    assert total(found, "retries") == len(busy.questions) > 0


def test_a_refused_request_is_not_repeated(server: JudgeServer) -> None:
    server.reply = lambda handler, question: handler.say(b"no such model", status=404)
    (found,) = verdicts(section(server), "right")
    assert (len(server.questions), found.status) == (1, "error")
    assert "HTTP 404: no such model (1 tries)" in found.message


def test_what_is_not_answered_in_time_is_a_timeout_and_the_process_lives(server: JudgeServer) -> None:
    server.reply = lambda handler, question: handler.server.released.wait(60)
    hurried = section(server, concurrency=1).model_copy(update={"timeout_s": 0.3})
    found = verdicts(hurried, "right", "wrong", "neither")
    assert [verdict.status for verdict in found] == ["timeout"] * 3


def test_a_key_is_sent_and_never_told(server: JudgeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keyed = section(server, tmp_path / "judge.sqlite", api_key_variable="JUDGE_KEY", retries=0)
    with pytest.raises(UserError, match="api_key_variable=JUDGE_KEY: the environment has no such variable"):
        build(keyed)
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    (found,) = verdicts(keyed, "right")
    assert server.keys == ["Bearer s3cret"]
    server.reply = lambda handler, question: handler.say(b"who are you?", status=401)
    (refused,) = verdicts(keyed, "wrong")
    assert b"s3cret" not in (tmp_path / "judge.sqlite").read_bytes()
    assert "s3cret" not in f"{found} {refused} {keyed.model_dump_json()}"
    monkeypatch.setenv("JUDGE_KEY", "s3cret\u20ac")
    with pytest.raises(UserError, match=r"^reward\.judge\.api_key_variable=JUDGE_KEY: not an API key$"):
        build(keyed)


def test_after_the_token_limit_nothing_is_asked(server: JudgeServer, tmp_path: Path) -> None:
    limited = section(server, tmp_path / "judge.sqlite", token_limit=50, concurrency=1)
    assert {verdict.status for verdict in verdicts(limited, "right", "wrong")} == {"ok"}
    later = verdicts(limited, "something else", "right")
    assert [verdict.status for verdict in later] == ["error", "ok"], "answers that are there stay"
    assert "token_limit=50 is reached: 50 tokens were spent" in later[0].message
    assert len(server.questions) == 2


def test_the_first_answer_is_that_of_all_processes(tmp_path: Path) -> None:
    one, other = (AnswerCache(tmp_path / "judge.sqlite") for _ in range(2))
    assert one.keep({"a": Answer("first", 3, 4)}) == {"a": Answer("first", 3, 4)}
    assert other.keep({"a": Answer("second", 3, 4), "b": Answer("x")}) == {"a": Answer("first", 3, 4), "b": Answer("x")}
    assert one.tokens_spent() == 14


def test_a_damaged_file_of_answers_is_said_so(server: JudgeServer, tmp_path: Path) -> None:
    (tmp_path / "judge.sqlite").write_bytes(b"not a database" * 100)
    (found,) = verdicts(section(server, tmp_path / "judge.sqlite"), "right")
    assert found.status == "error"
    assert "cannot be used: file is not a database; make room, or move the file away" in found.message


def test_every_server_is_asked_once_before_a_start(server: JudgeServer, tmp_path: Path) -> None:
    probe(section(server, tmp_path / "judge.sqlite"))
    assert len(server.questions) == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"the judge \(reward\.judge\) does not answer:\n.*ConnectError"):
        probe(section(server, urls=[server.url, "http://127.0.0.1:9/v1"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": []}, "reward.judge.urls: the verifier judge needs it, such as [http://127.0.0.1:8000/v1]"),
        ({"model": ""}, "reward.judge.model: the verifier judge needs it, such as a name"),
        ({"urls": ["ftp://x/v1"]}, "reward.judge.urls: 'x': expected http(s)://HOST[:PORT]/v1"),
        ({"urls": ["http://me:s3cret@x/v1"]}, "reward.judge.urls: 'x': expected http(s)://HOST[:PORT]/v1"),
        ({"urls": ["http://["]}, "reward.judge.urls: an entry: expected http(s)://HOST[:PORT]/v1"),
        ({"template": "right?"}, "reward.judge.template: {response} is not in it, so nothing would be judged"),
        ({"verdict_pattern": "("}, "reward.judge.verdict_pattern: not a regular expression: "),
        (
            {"request_timeout_s": 30},
            "reward.timeout_s=30 is the time of a batch of reward.batch_size=64 responses, and a",
        ),
        ({"votes": 3}, "reward.judge.votes=3 with temperature=0 asks one question 3 times: set a temperature"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    asked = {"urls": ["http://x/v1"], "model": "m", "request_timeout_s": 5, **settings}
    base = {"model": {"hf_dir": "unused"}, "data": {"train_files": ["unused"]}}
    (found,) = reward_violations(Config.model_validate({**base, "reward": {"verifier": "judge", "judge": asked}}))
    assert found.message.startswith(message)
    (unused,) = reward_violations(Config.model_validate({**base, "reward": {"judge": {"model": "m"}}}))
    assert unused.message == "reward.judge has no use: neither reward.verifier nor added is judge"
