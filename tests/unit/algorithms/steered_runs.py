"""Controllers fed with entropies as an optimizer step feeds them."""

from __future__ import annotations

from typing import Any

from megatron_entropic.algorithms import Controller, Steering, build_controller
from megatron_entropic.config.algorithm import EntropyControlConfig

TOKENS = 100


def controller(**section: Any) -> Controller:
    return build_controller(EntropyControlConfig(**section))


def run(subject: Controller, entropies: list[float]) -> list[Steering]:
    steerings = []
    for entropy in entropies:
        steerings.append(subject.observe(entropy * TOKENS, TOKENS))
        subject.commit(stepped=True, has_advantage=True)
        if subject.measures_again:
            subject.measured_again(1.02 * entropy)
    return steerings
