"""One question to an OpenAI-compatible server: tries, waits and limits, and what its answer may be.

httpx because transformers brings it along (through huggingface_hub); the client `openai` retries on its own terms and
has no limit for what it reads. Nothing a server says is trusted: length, JSON, fields and times are bounded, redirects
are not followed, and the key goes to no other place than the header of a request.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Literal

import httpx

from megatron_entropic.config.data import JudgeConfig
from megatron_entropic.errors import UserError
from megatron_entropic.rewards.verifiers.judge_cache import Answer

LARGEST_BODY_BYTES = 1 << 20
"""An answer of 512 tokens is some kB; a server that sends more than this is not read to its end."""

LARGEST_TEXT = 1 << 16
"""Characters of an answer that are kept, from its end, where the verdict is."""

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which the same request may succeed."""


class NoAnswer(Exception):
    """A question that got no answer.

    Attributes:
        status: "timeout" where time ran out, else "error".
        retries: tries after the first.
    """

    def __init__(self, status: Literal["timeout", "error"], message: str, *, retries: int = 0, final: bool = False):
        super().__init__(message)
        self.status, self.retries, self.final = status, retries, final


class JudgeClient:
    """Connections to the servers of one judge, for any number of threads.

    Raises:
        UserError: the environment variable of the key is not set.
    """

    def __init__(self, settings: JudgeConfig) -> None:
        self._settings = settings
        # Not compressed: what is limited are bytes as they come.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if settings.api_key_variable is not None:
            key = os.environ.get(settings.api_key_variable, "")
            if not key:
                raise UserError(
                    f"reward.judge.api_key_variable={settings.api_key_variable}: the environment has no such variable"
                )
            try:
                headers["Authorization"] = f"Bearer {key.encode('ascii').decode()}"
            except UnicodeEncodeError:
                raise UserError(f"reward.judge.api_key_variable={settings.api_key_variable}: not an API key") from None
        limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._http = httpx.Client(headers=headers, limits=limits, follow_redirects=False)

    def ask(self, question: dict[str, Any], first_url: int, deadline: float) -> tuple[Answer, int]:
        """Ask until there is an answer; returns it with the number of retries.

        Args:
            question: body of a request for a chat completion.
            first_url: number of the server that is asked first; each retry asks the next.
            deadline: time, by time.monotonic(), at which nobody waits any more.

        Raises:
            NoAnswer: no try succeeded.
        """
        settings = self._settings
        body, retries = json.dumps(question).encode(), 0
        while True:
            url = settings.urls[(first_url + retries) % len(settings.urls)]
            try:
                return self._try(f"{url.rstrip('/')}/chat/completions", body, deadline), retries
            except NoAnswer as failure:
                wait_s = settings.backoff_s * 2**retries
                if failure.final or retries == settings.retries or time.monotonic() + wait_s >= deadline:
                    message = f"{url}: {failure} ({retries + 1} tries)"
                    raise NoAnswer(failure.status, message, retries=retries) from failure
            time.sleep(wait_s)
            retries += 1

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def _try(self, url: str, body: bytes, deadline: float) -> Answer:
        limit_s = min(self._settings.request_timeout_s, deadline - time.monotonic())
        if limit_s <= 0:
            raise NoAnswer("timeout", "no time was left to ask", final=True)
        end = time.monotonic() + limit_s
        try:
            with self._http.stream("POST", url, content=body, timeout=limit_s) as response:
                content = _read(response, end)
        except httpx.TimeoutException as error:
            raise NoAnswer("timeout", f"no answer within {limit_s:.3g} s ({type(error).__name__})") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoAnswer("error", f"{type(error).__name__}: {error}") from error
        if response.status_code != httpx.codes.OK:
            said = content[:200].decode("utf-8", "replace")
            raise NoAnswer("error", f"HTTP {response.status_code}: {said}", final=response.status_code not in RETRIED)
        return _answer(content)


def _read(response: httpx.Response, end: float) -> bytes:
    """The body of a response that ends in time and is not too long."""
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > LARGEST_BODY_BYTES:
            raise NoAnswer("error", f"more than {LARGEST_BODY_BYTES:,} bytes", final=True)
        if time.monotonic() > end:
            # A limit of httpx is one of silence: a server that sends a byte now and then never passes it.
            raise NoAnswer("timeout", "the answer did not come to an end in time")
    return bytes(content)


def _answer(content: bytes) -> Answer:
    try:
        reply = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
        usage = reply.get("usage") or {}
        tokens = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        said = content[:200].decode("utf-8", "replace")
        raise NoAnswer("error", f"not a chat completion: {said!r}") from error
    # A model that only thought has said nothing.
    text = text if isinstance(text, str) else ""
    counts = [count if type(count) is int and 0 <= count < 1 << 31 else 0 for count in tokens]
    return Answer(text[-LARGEST_TEXT:].encode("utf-8", "replace").decode(), *counts)
