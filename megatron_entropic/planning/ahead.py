"""Rollouts that run ahead, simulated: engines and policy side by side over some steps, from event to event.

    engine   the steps k .. k + lag, earliest first, as many sequences at once as there is room for
    policy   learns step k when its last response is there; then weights go over, and what runs is computed again

One engine stands for all: they share a queue, so none has more to do than another. An event is the end of a response or
of an update; between two of them decoding steps cost what `generation.StepRates` says.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from megatron_entropic.planning.generation import EngineLoad

STEPS = 24
"""Simulated steps; the first third, in which the queue fills, is not counted."""


@dataclass(frozen=True)
class Learning:
    """What the policy does in a step, in seconds."""

    learn_s: float
    """Score pass and updates."""
    publish_s: float
    rescore_s: float = 0.0
    """Scoring of older tokens with the weights that sampled them, after the publication."""
    switch_s: float = 0.0
    """Change of turns, where both sides share their GPUs; engines stand still while the policy works."""
    colocated: bool = False


@dataclass(frozen=True)
class AheadTime:
    """A training step with a lag, in the steady state."""

    lag: int
    step_s: float
    engines_busy: float
    """Share of the time in which engines work."""
    policy_busy: float
    mean_age: float
    """Mean number of versions by which a token is older than the policy that learns from it."""
    oldest: int


@dataclass(slots=True)
class _Sequence:
    step: int
    left: float
    done: float = 0.0
    by_version: dict[int, float] = field(default_factory=dict)
    """Tokens by the version that sampled them."""


class _Simulation:
    """State of both sides at a moment."""

    def __init__(self, load: EngineLoad, learning: Learning, lag: int) -> None:
        self.now_s = self.engines_s = self.policy_s = 0.0
        self.ages: Counter[int] = Counter()
        self._load, self._learning, self._lag = load, learning, lag
        self._version = 0
        self._admitted = 0
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._unfinished: Counter[int] = Counter()
        self._ended: dict[int, list[_Sequence]] = {}
        self._admit()

    def finish_step(self, step: int) -> None:
        """Generate until the step is complete, learn it, and publish."""
        while self._unfinished[step]:
            self._decode(None)
        for sequence in self._ended.pop(step, []):
            for version, tokens in sequence.by_version.items():
                self.ages[step - 1 - version] += round(tokens)
        learning = self._learning
        self.policy_s += learning.learn_s + learning.publish_s + learning.rescore_s
        if learning.colocated:
            self.now_s += learning.learn_s + learning.rescore_s + learning.switch_s
        else:
            self._decode(self.now_s + learning.learn_s)
        self.now_s += learning.publish_s
        self._version = step
        context = sum(self._load.prompt_tokens + one.done for one in self._running)
        recompute_s = self._load.weight * context * self._load.prefill_token_s
        self.now_s += recompute_s
        self.engines_s += recompute_s
        self._admit()
        if not learning.colocated:
            self._decode(self.now_s + learning.rescore_s)

    def _admit(self) -> None:
        while self._admitted <= self._version + self._lag:
            self._admitted += 1
            self._waiting.extend(_Sequence(self._admitted, length) for length in self._load.lengths)
            self._unfinished[self._admitted] = len(self._load.lengths)

    def _decode(self, until_s: float | None) -> None:
        """Run forward passes until the next response ends, or, with `until_s`, until then."""
        load = self._load
        while True:
            while self._waiting and len(self._running) < load.at_once:
                self._running.append(self._waiting.popleft())
                prefill_s = load.weight * load.prompt_tokens * load.prefill_token_s
                self.now_s += prefill_s
                self.engines_s += prefill_s
            if until_s is not None and self.now_s >= until_s:
                return
            if not self._running:
                assert until_s is not None, "a step that is waited for has responses"
                self.now_s = until_s
                return
            context = sum(load.prompt_tokens + one.done for one in self._running)
            pass_s = load.rates.step_s(load.weight * len(self._running), load.weight * context)
            passes = min(one.left for one in self._running)
            if until_s is not None:
                passes = min(passes, (until_s - self.now_s) / pass_s)
            self._advance(passes)
            self.now_s += passes * pass_s
            self.engines_s += passes * pass_s
            if until_s is None:
                return

    def _advance(self, passes: float) -> None:
        for one in self._running:
            one.left -= passes
            one.done += passes
            one.by_version[self._version] = one.by_version.get(self._version, 0.0) + passes
        for one in [one for one in self._running if one.left < 1e-9]:
            self._unfinished[one.step] -= 1
            self._ended.setdefault(one.step, []).append(one)
        self._running = [one for one in self._running if one.left >= 1e-9]


def ahead_time(load: EngineLoad, learning: Learning, lag: int) -> AheadTime:
    """Simulate a lag; 0 is the loop in which each side waits for the other."""
    simulation = _Simulation(load, learning, lag)
    first = STEPS // 3
    for step in range(1, first + 1):
        simulation.finish_step(step)
    began_s, engines_s, policy_s = simulation.now_s, simulation.engines_s, simulation.policy_s
    simulation.ages.clear()
    for step in range(first + 1, STEPS + 1):
        simulation.finish_step(step)
    passed_s, tokens = simulation.now_s - began_s, sum(simulation.ages.values())
    return AheadTime(
        lag,
        step_s=passed_s / (STEPS - first),
        engines_busy=(simulation.engines_s - engines_s) / passed_s,
        policy_busy=(simulation.policy_s - policy_s) / passed_s,
        mean_age=sum(age * n for age, n in simulation.ages.items()) / max(1, tokens),
        oldest=max(simulation.ages, default=0),
    )
