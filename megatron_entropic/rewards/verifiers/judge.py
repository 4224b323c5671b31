"""A language model that judges responses, asked over an OpenAI-compatible API.

    response, prompt, ground truth --template--> question --> cache, else server --> answer --pattern--> reward

Each question is asked once in the life of a run. A judge that does not answer is a failure of the verifier, and no word
about the response.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from megatron_entropic.config.data import JudgeConfig, RewardConfig
from megatron_entropic.config.names import PROMPT
from megatron_entropic.config.plugins import compile_pattern
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.rewards.verifiers.judge_cache import Answer, AnswerCache, question_key
from megatron_entropic.rewards.verifiers.judge_client import JudgeClient, NoAnswer
from megatron_entropic.types import Verdict

TEMPLATE = """Task:
{prompt}

Reference answer:
{ground_truth}

Answer to be judged:
{response}

Is the answer to be judged right? Think if you need to, then end with a line that says "Verdict: 1" if it is and \
"Verdict: 0" if it is not."""
"""The question where `reward.judge.template` says none."""

SHARE_OF_TIMEOUT = 0.9
"""Part of reward.timeout_s after which unanswered questions are given up: then a process need not be ended for them."""


def build(reward: RewardConfig) -> ModelJudge:
    """The judge of a configuration's section `reward`.

    Raises:
        UserError: the section lacks what the judge needs, or the environment the key.
    """
    return ModelJudge(reward.judge, time_limit_s=SHARE_OF_TIMEOUT * reward.timeout_s)


def probe(reward: RewardConfig) -> None:
    """Ask every server once; nothing is kept of it.

    Raises:
        UserError: one does not answer, with what happened instead.
    """
    build(reward).check_servers()


@dataclass(frozen=True, slots=True)
class _Asked:
    """How one question ended."""

    answer: Answer | None
    failure: NoAnswer | None = None
    retries: int = 0
    cached: bool = False


class ModelJudge:
    """A verifier that takes batches, whose questions are asked at the same time.

    Args:
        settings: `reward.judge`.
        time_limit_s: seconds for all questions of a batch.

    Raises:
        UserError: see `build`.
    """

    takes_batches = True

    def __init__(self, settings: JudgeConfig, *, time_limit_s: float) -> None:
        if not settings.urls or not settings.model:
            raise UserError("verifier 'judge': reward.judge needs urls and model")
        self._settings, self._time_limit_s = settings, time_limit_s
        self._pattern = compile_pattern("reward.judge.verdict_pattern", settings.verdict_pattern)
        self._client = JudgeClient(settings)
        self._cache = AnswerCache(settings.cache_file)
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")

    def __call__(
        self, responses: list[str], ground_truths: list[Any], extra_infos: list[Mapping[str, Any]]
    ) -> list[Verdict]:
        """Judge a batch; verdicts in its order."""
        deadline = time.monotonic() + self._time_limit_s
        votes = range(self._settings.votes)
        asked: dict[str, Future[_Asked]] = {}
        keys: list[list[str]] = []
        for response, truth, extra_info in zip(responses, ground_truths, extra_infos, strict=True):
            questions = [self._question(response, truth, extra_info, vote) for vote in votes]
            keys.append([question_key(question) for question in questions])
            for key, question in zip(keys[-1], questions, strict=True):
                if key not in asked:
                    asked[key] = self._threads.submit(self._ask, key, question, deadline)
        ended = self._kept({key: future.result() for key, future in asked.items()})
        counted: set[str] = set()
        verdicts = []
        for of_one in keys:
            # A question that several responses share is counted with the first of them.
            new = [ended[key] for key in of_one if key not in counted]
            counted.update(of_one)
            verdicts.append(self._verdict([ended[key] for key in of_one], new))
        return verdicts

    def check_servers(self) -> None:
        """Ask every server one question, without retries.

        Raises:
            UserError: a server does not answer.
        """
        question = self._question("2", "2", {PROMPT: "What is 1 + 1?"}, 0)
        failures = []
        for url in self._settings.urls:
            alone = self._settings.model_copy(update={"urls": [url], "retries": 0})
            client = JudgeClient(alone)
            try:
                client.ask(question, 0, time.monotonic() + self._settings.request_timeout_s)
            except NoAnswer as failure:
                failures.append(str(failure))
            finally:
                client.close()
        if failures:
            raise UserError("the judge (reward.judge) does not answer:\n" + "\n".join(f"  {one}" for one in failures))

    def _question(self, response: str, truth: Any, extra_info: Mapping[str, Any], vote: int) -> dict[str, Any]:
        settings = self._settings
        values = {"prompt": str(extra_info.get(PROMPT, "")), "response": response, "ground_truth": str(truth)}
        # In one pass: what a response says of braces is text.
        text = re.sub(
            r"\{(prompt|response|ground_truth)\}", lambda found: values[found[1]], settings.template or TEMPLATE
        )
        system = [] if settings.system_prompt is None else [{"role": "system", "content": settings.system_prompt}]
        question = {
            "model": settings.model,
            "messages": [*system, {"role": "user", "content": text}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        return question if settings.temperature == 0 else question | {"seed": vote}

    def _ask(self, key: str, question: dict[str, Any], deadline: float) -> _Asked:
        try:
            if (known := self._cache.get(key)) is not None:
                return _Asked(known, cached=True)
            limit = self._settings.token_limit
            if limit is not None and (spent := self._cache.tokens_spent()) >= limit:
                raise NoAnswer("error", f"reward.judge.token_limit={limit} is reached: {spent} tokens were spent")
            answer, retries = self._client.ask(question, int(key[:8], 16), deadline)
            return _Asked(answer, retries=retries)
        except NoAnswer as failure:
            return _Asked(None, failure, failure.retries)
        except RunError as error:
            return _Asked(None, NoAnswer("error", str(error)))

    def _kept(self, asked: dict[str, _Asked]) -> dict[str, _Asked]:
        """The same with the answers that count: those that another process got first, where one did."""
        fresh = {key: one.answer for key, one in asked.items() if one.answer is not None and not one.cached}
        try:
            kept = self._cache.keep(fresh)
        except RunError as error:
            # A verdict that nobody could give again is none.
            failure = NoAnswer("error", str(error))
            return asked | {key: replace(asked[key], answer=None, failure=failure) for key in fresh}
        return asked | {key: replace(asked[key], answer=answer) for key, answer in kept.items()}

    def _verdict(self, asked: list[_Asked], new: list[_Asked]) -> Verdict:
        """Verdict of one response, of the answers to its questions, of which some are `new` in this batch."""
        answers = [one.answer for one in asked if one.answer is not None]
        rewards = [self._reward(answer.text) for answer in answers]
        readable = [reward for reward in rewards if reward is not None]
        paid = [one.answer for one in new if one.answer is not None and not one.cached]
        requests = sum(not one.cached for one in new)
        measures = {
            "judge/requests": float(requests),
            "judge/cache_hits": float(len(asked) - requests),
            "judge/retries": float(sum(one.retries for one in new)),
            "judge/failures": float(len(asked) - len(answers)),
            "judge/unreadable": float(len(rewards) - len(readable)),
            "judge/prompt_tokens": float(sum(answer.prompt_tokens for answer in paid)),
            "judge/completion_tokens": float(sum(answer.completion_tokens for answer in paid)),
        }
        if self._settings.votes > 1 and readable:
            measures["judge/disagreement_mean"] = max(readable) - min(readable)
        if readable:
            return Verdict("ok", fmean(readable), measures=measures)
        for one in asked:
            if one.failure is not None:
                return Verdict(one.failure.status, message=str(one.failure)[:500], measures=measures)
        end = answers[0].text[-200:]
        message = f"no verdict (reward.judge.verdict_pattern) in the judge's answer, which ends {end!r}"
        return Verdict("error", message=message, measures=measures)

    def _reward(self, text: str) -> float | None:
        """Reward that an answer of the judge says; None if it says none."""
        matches = list(self._pattern.finditer(text))
        if not matches:
            return None
        found = matches[-1]
        said = (found[1] if self._pattern.groups else found[0]) or ""
        if self._settings.verdicts:
            words = {word.casefold(): reward for word, reward in self._settings.verdicts.items()}
            return words.get(said.strip().casefold())
        try:
            reward = float(said) / self._settings.best
        except ValueError:
            return None
        return reward if 0 <= reward <= 1 else None
