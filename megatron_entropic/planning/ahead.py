"""Rollouts that run ahead, simulated: engines and policy side by side over some steps, from event to event.

    engine   the steps k .. k + lag, earliest first, as many sequences at once as there is room for
    policy   learns step k when its last response is there; then weights go over, and what runs is computed again

One engine (`decoding`) stands for all: they share a queue, so none has more to do than another. An event is
the end of a response or of an update.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_entropic.planning.decoding import Decoded, DecodingEngine, EngineLoad

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


class _Simulation:
    """Both sides at a moment."""

    def __init__(self, load: EngineLoad, learning: Learning, lag: int) -> None:
        self.engine = DecodingEngine(load)
        self.policy_s = 0.0
        self.ages: Counter[int] = Counter()
        self._responses = len(load.lengths)
        self._learning, self._lag = learning, lag
        self._admitted = 0
        self._unfinished: Counter[int] = Counter()
        self._ended: dict[int, list[Decoded]] = {}
        self._first_pass = [0.0]
        """First forward pass of the engine with each version of the weights."""
        self._admit()

    def finish_step(self, step: int) -> None:
        """Generate until the step is complete, learn it, and publish."""
        while self._unfinished[step]:
            self._decode(None)
        self._count_ages(step)
        engine, learning = self.engine, self._learning
        self.policy_s += learning.learn_s + learning.publish_s + learning.rescore_s
        if learning.colocated:
            engine.stand_still(learning.learn_s + learning.rescore_s + learning.switch_s)
        else:
            self._decode_until(engine.now_s + learning.learn_s)
        engine.stand_still(learning.publish_s)
        self._first_pass.append(engine.passes)
        engine.compute_again()
        self._admit()
        if not learning.colocated:
            self._decode_until(engine.now_s + learning.rescore_s)

    def _admit(self) -> None:
        while self._admitted < len(self._first_pass) + self._lag:
            self._admitted += 1
            self.engine.ask(self._admitted)
            self._unfinished[self._admitted] = self._responses

    def _decode_until(self, until_s: float) -> None:
        while self.engine.now_s < until_s:
            self._decode(until_s)

    def _decode(self, until_s: float | None) -> None:
        for response in self.engine.decode(until_s):
            self._unfinished[response.step] -= 1
            self._ended.setdefault(response.step, []).append(response)

    def _count_ages(self, step: int) -> None:
        """Count the tokens of a step by the number of versions by which they are older than the policy now."""
        ends = [*self._first_pass[1:], self.engine.passes]
        for response in self._ended.pop(step):
            for version in range(max(0, step - 1 - self._lag), step):
                first, last = max(response.start, self._first_pass[version]), min(response.end, ends[version])
                self.ages[step - 1 - version] += round(max(0.0, last - first))


def ahead_time(load: EngineLoad, learning: Learning, lag: int) -> AheadTime:
    """Simulate a lag; 0 is the loop in which each side waits for the other."""
    simulation = _Simulation(load, learning, lag)
    first = STEPS // 3
    for step in range(1, first + 1):
        simulation.finish_step(step)
    engine = simulation.engine
    began_s, engines_s, policy_s = engine.now_s, engine.busy_s, simulation.policy_s
    simulation.ages.clear()
    for step in range(first + 1, STEPS + 1):
        simulation.finish_step(step)
    passed_s, tokens = engine.now_s - began_s, sum(simulation.ages.values())
    return AheadTime(
        lag,
        step_s=passed_s / (STEPS - first),
        engines_busy=(engine.busy_s - engines_s) / passed_s,
        policy_busy=(simulation.policy_s - policy_s) / passed_s,
        mean_age=sum(age * n for age, n in simulation.ages.items()) / max(1, tokens),
        oldest=max((age for age, n in simulation.ages.items() if n), default=0),
    )
