"""One engine, simulated from the end of one response to that of the next: the seconds in which it decodes.

    pass = max(weights read, products) + cache read + all-reduces + what vLLM's Python does

A forward pass reads the weights once, of experts those that some running sequence needs, and the cache of every
sequence. A generation alone (`generation`) and rollouts that run ahead of the policy (`ahead`) are made of this engine.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRates:
    """What a decoding step of one engine costs."""

    weights_s: float
    """Seconds of reading everything but the experts."""
    experts_s: float
    """Seconds of reading all experts."""
    expert_share: float
    """Share of the experts that one token goes through."""
    product_s: float
    """Seconds of a token's products."""
    cache_s: float
    """Seconds of reading a token of the cache."""
    fixed_s: float
    sequence_s: float
    """Seconds of everything else for each sequence: scheduling, sampling, text."""

    def step_s(self, running: float, context: float) -> float:
        """Seconds of a step of `running` sequences with `context` tokens in the cache together."""
        touched = 1 - (1 - self.expert_share) ** running
        weights_s = self.weights_s + touched * self.experts_s
        return (
            max(weights_s, running * self.product_s) + context * self.cache_s + self.fixed_s + running * self.sequence_s
        )


@dataclass(frozen=True)
class EngineLoad:
    """Responses that an engine has to sample in a training step, and what that costs."""

    lengths: list[int]
    """Tokens of responses, each standing for `weight` of them, in the order in which they start."""
    weight: float
    at_once: int
    """Most of `lengths` that run together."""
    rates: StepRates
    prompt_tokens: float
    prefill_token_s: float
    """Seconds of one token of a prompt."""


@dataclass(frozen=True, slots=True, order=True)
class Decoded:
    """A response, by the forward passes of its engine between which it was sampled."""

    end: float
    """Number of passes that the engine had run at its end."""
    start: float
    step: int
    """Training step that it is for."""


class DecodingEngine:
    """An engine at a moment: what waits and what runs in it, and the seconds that have gone by."""

    def __init__(self, load: EngineLoad) -> None:
        self.now_s = 0.0
        self.busy_s = 0.0
        """Seconds of `now_s` in which it worked."""
        self.passes = 0.0
        """Forward passes so far."""
        self._load = load
        self._waiting: deque[tuple[int, int]] = deque()
        self._running: list[Decoded] = []
        self._starts = 0.0

    @property
    def waiting(self) -> int:
        """Number of responses that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of responses that have started."""
        return len(self._running)

    def ask(self, step: int) -> None:
        """Let all responses of a training step wait."""
        self._waiting.extend((length, step) for length in self._load.lengths)

    def admit(self) -> None:
        """Start what waits, as far as there is room; prompts are computed."""
        while self._waiting and len(self._running) < self._load.at_once:
            length, step = self._waiting.popleft()
            heapq.heappush(self._running, Decoded(self.passes + length, self.passes, step))
            self._starts += self.passes
            self._work(self._load.weight * self._load.prompt_tokens * self._load.prefill_token_s)

    def decode(self, until_s: float | None = None) -> list[Decoded]:
        """Run until the next response ends, but no longer than to `until_s`; returns those that ended."""
        self.admit()
        if not self._running:
            assert until_s is not None, "what is waited for runs or waits"
            self.now_s = max(self.now_s, until_s)
            return []
        passes = self._running[0].end - self.passes
        weight = self._load.weight
        # Contexts grow by a token a pass: their mean over these passes.
        context = self._tokens() + len(self._running) * passes / 2
        seconds = passes * self._load.rates.step_s(weight * len(self._running), weight * context)
        if until_s is not None and self.now_s + seconds > until_s:
            left_s = max(0.0, until_s - self.now_s)
            self.passes += passes * left_s / seconds
            self._work(left_s)
            return []
        self.passes = self._running[0].end
        self._work(seconds)
        ended = []
        while self._running and self._running[0].end <= self.passes:
            ended.append(heapq.heappop(self._running))
            self._starts -= ended[-1].start
        return ended

    def compute_again(self) -> None:
        """Compute the keys and values of all that runs once more, as new weights make it necessary."""
        self._work(self._load.weight * self._tokens() * self._load.prefill_token_s)

    def stand_still(self, seconds: float) -> None:
        """Let time go by without work."""
        self.now_s += seconds

    def _tokens(self) -> float:
        """Tokens in the cache, of those in `load.lengths`."""
        return len(self._running) * (self._load.prompt_tokens + self.passes) - self._starts

    def _work(self, seconds: float) -> None:
        self.now_s += seconds
        self.busy_s += seconds
