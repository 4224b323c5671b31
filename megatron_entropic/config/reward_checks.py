"""Checks of how responses are judged, in training and in benchmarks: combinations that cannot work on any machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_entropic.config.base import Violation
from megatron_entropic.config.data import JudgeConfig
from megatron_entropic.config.names import ANSWERS, VERIFIERS, unknown_name, verifier_entry
from megatron_entropic.config.plugins import compile_pattern
from megatron_entropic.config.run import Config, RewardConfig
from megatron_entropic.errors import UserError


def reward_violations(config: Config) -> Iterator[Violation]:
    """Yields verifiers that do not exist, and rewards that do not go together."""
    reward = config.reward
    for key, name in (("reward.verifier", reward.verifier), *(("reward.added", name) for name in reward.added)):
        if problem := unknown_name(name, VERIFIERS, own="module:function"):
            yield Violation((key,), f"{key}={name!r}: {problem}")
    if reward.verifier in reward.added:
        yield Violation(
            ("reward.added", "reward.verifier"), f"reward.added: {reward.verifier} is reward.verifier already"
        )
    yield from _pattern_violation("reward.format_pattern", reward.format_pattern)
    yield from _judge_violations(reward)
    yield from _answer_violations(reward)
    if reward.overlong_buffer_tokens > config.rollout.max_response_tokens:
        yield Violation(
            ("reward.overlong_buffer_tokens", "rollout.max_response_tokens"),
            f"reward.overlong_buffer_tokens={reward.overlong_buffer_tokens} is more than "
            f"rollout.max_response_tokens={config.rollout.max_response_tokens}",
        )


def _judge_violations(reward: RewardConfig) -> Iterator[Violation]:
    """Yields what keeps the verifier `judge` from asking, or from reading what it is told."""
    judge, key = reward.judge, "reward.judge"
    if "judge" not in (reward.verifier, *reward.added):
        if judge != JudgeConfig():
            yield Violation((key, "reward.verifier"), f"{key} has no use: neither reward.verifier nor added is judge")
        return
    for name, value, example in (("urls", judge.urls, "[http://127.0.0.1:8000/v1]"), ("model", judge.model, "a name")):
        if not value:
            yield Violation((f"{key}.{name}",), f"{key}.{name}: the verifier judge needs it, such as {example}")
    for url in judge.urls:
        host, usable = _host_of(url)
        if not usable:
            # The host alone: somebody may have written a password into the URL.
            named = "an entry" if host is None else repr(host)
            yield Violation((f"{key}.urls",), f"{key}.urls: {named}: expected http(s)://HOST[:PORT]/v1")
    if judge.request_timeout_s >= reward.timeout_s:
        yield Violation(
            ("reward.timeout_s", f"{key}.request_timeout_s", "reward.batch_size"),
            f"reward.timeout_s={reward.timeout_s:g} is the time of a batch of reward.batch_size={reward.batch_size} "
            f"responses, and a single request may take {key}.request_timeout_s={judge.request_timeout_s:g}: allow for "
            f"{-(-reward.batch_size * judge.votes // judge.concurrency)} rounds of {judge.concurrency} requests",
        )
    if judge.template is not None and "{response}" not in judge.template:
        yield Violation((f"{key}.template",), f"{key}.template: {{response}} is not in it, so nothing would be judged")
    yield from _pattern_violation(f"{key}.verdict_pattern", judge.verdict_pattern)
    if judge.votes > 1 and judge.temperature == 0:
        yield Violation(
            (f"{key}.votes", f"{key}.temperature"),
            f"{key}.votes={judge.votes} with temperature=0 asks one question {judge.votes} times: set a temperature",
        )


def _host_of(url: str) -> tuple[str | None, bool]:
    """Host of a base URL, and whether requests can be sent to it."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        return None, False
    return host, parts.scheme in ("http", "https") and host is not None and not parts.username and not parts.query


def _answer_violations(reward: RewardConfig) -> Iterator[Violation]:
    """Yields ways to find an answer that do not exist, lack their pattern, or that no verifier asks for."""
    if reward.answer is not None:
        if problem := unknown_name(reward.answer, ANSWERS):
            yield Violation(("reward.answer",), f"reward.answer={reward.answer!r}: {problem}")
        verifiers = (reward.verifier, *reward.added)
        if all(verifier_entry(name).answer is None for name in verifiers):
            readers = ", ".join(name for name, entry in VERIFIERS.items() if entry.answer is not None)
            yield Violation(
                ("reward.answer", "reward.verifier", "reward.added"),
                f"reward.answer={reward.answer} has no use: {' and '.join(verifiers)} looks at the response as it is; "
                f"verifiers that read an answer are {readers}. Leave reward.answer away or choose one of these",
            )
    keys = ("reward.answer", "reward.answer_pattern")
    if reward.answer == "regex" and not reward.answer_pattern:
        yield Violation(keys, "reward.answer_pattern: reward.answer=regex needs one")
    elif reward.answer == "regex":
        yield from _pattern_violation("reward.answer_pattern", reward.answer_pattern)
    elif reward.answer_pattern:
        yield Violation(keys, "reward.answer_pattern has no use without reward.answer=regex")


def _pattern_violation(key: str, pattern: str) -> Iterator[Violation]:
    try:
        compile_pattern(key, pattern)
    except UserError as error:
        yield Violation((key,), str(error))


def benchmark_violations(config: Config) -> Iterator[Violation]:
    """Yields benchmarks that cannot be named or sampled so."""
    evaluation = config.evaluation
    key = "evaluation.benchmarks"
    for name in evaluation.benchmarks:
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            yield Violation(
                (key,), f"{key}: {name!r}: a name becomes a file name; use letters, digits, dots, dashes, underscores"
            )
    if evaluation.every_steps and not evaluation.benchmarks:
        yield Violation(
            (key, "evaluation.every_steps"),
            f"evaluation.every_steps={evaluation.every_steps}, but evaluation.benchmarks names no file",
        )
    for field, numbers in (
        ("samples_of", evaluation.samples_of),
        ("max_response_tokens_of", evaluation.max_response_tokens_of),
    ):
        own = f"evaluation.{field}"
        for name, number in numbers.items():
            if name not in evaluation.benchmarks:
                yield Violation((own, key), f"{own}: no benchmark is called {name!r}")
            if number < 1:
                yield Violation((own,), f"{own}: {name}={number}: at least 1")
    if any(
        evaluation.samples(name) > 1 and config.evaluation_sampling(name).temperature == 0
        for name in evaluation.benchmarks
    ):
        yield Violation(
            ("evaluation",), "evaluation.temperature=0 gives the same response every time: use 1 sample per prompt"
        )
