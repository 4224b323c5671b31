"""Sentences about a run's entropy control: each rule looks at the last steps and names the setting to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from megatron_entropic.config.names import OFF, controller_entry
from megatron_entropic.observability.metrics import ENTROPY_BAND
from megatron_entropic.reports.run import Run

WINDOW = 40
"""Number of last steps that a verdict looks at."""
SATURATED_STEPS = 10
"""Number of steps at the limit before alpha counts as stuck there."""
LEAST_AUTHORITY = 0.05
"""Share of tokens with pi > tau and A != 0 below which alpha has little to act on."""
LEAST_ADVANTAGE = 0.2
"""Share of tokens with A != 0 below which the prompts are at fault."""
OSCILLATION = 1 / 3
"""Share of steps on which the error may change its sign while it leaves the band."""
JUMP = 0.35
"""Change of entropy from one step to the next, as a share of the first entropy, that training alone does not make."""
LEAST_EFFECTIVE = 0.5
"""Share of the sample that importance correction may leave."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sentence about a run."""

    tone: Literal["good", "warn"]
    text: str


def verdicts(run: Run) -> list[Verdict]:
    """Everything that can be said of a run's last steps under the same settings."""
    run = run.stretches[-1]
    of_samples = [*_mismatch(run), *_importance(run)]
    if len(run.finite("entropy/mean")) < 2:
        return of_samples
    controller = str(run.setting("entropy_control.controller", "pi"))
    found = list(_feedback(run, controller)) if controller_entry(controller).answers_error else []
    if controller == OFF:
        found += _uncontrolled(run)
    if controller_entry(controller).steers_alpha:
        found += _authority(run)
    return found + of_samples


def saturated_steps(alphas: Sequence[float]) -> int:
    """Number of alphas at the end of the list that are at the same limit."""
    count = 0
    for alpha in reversed(alphas):
        if not abs(alpha) >= 1 or alpha * alphas[-1] < 0:
            break
        count += 1
    return count


def _feedback(run: Run, controller: str) -> Iterator[Verdict]:
    """Yields the first verdict that holds: stuck at a limit, swinging, on target, or off target."""
    errors = _errors(run)
    if not errors:
        return
    stuck = saturated_steps(run.series("entropy/alpha"))
    target, mean = run.finite("entropy/target")[-1], fmean(errors)
    band = ENTROPY_BAND * target
    swings = sum(one * other < 0 for one, other in pairwise(errors))
    jump = _jump(run)
    if stuck >= SATURATED_STEPS and jump and run.setting("entropy_control.reanchor", OFF) == OFF:
        yield Verdict(
            "warn",
            f"entropy jumped from {jump[0]:.3g} to {jump[1]:.3g} nats with the data and alpha has been at "
            f"{run.series('entropy/alpha')[-1]:+.0f} for {stuck} steps since: the target is stale, take a new one, "
            "entropy_control.reanchor=detected with a target such as 0.7x, or a one-sided guard=ceiling",
        )
    elif stuck >= SATURATED_STEPS:
        yield _stuck(stuck, run.series("entropy/alpha")[-1], errors[-1], band)
    elif swings > OSCILLATION * len(errors) and max(map(abs, errors)) > 2 * band:
        yield Verdict(
            "warn",
            f"entropy swings around its target by up to {max(map(abs, errors)):.2g} nats: lower K_p (megatron-entropic "
            "tune proposes gains), or take more responses a step",
        )
    elif abs(mean) <= band:
        yield Verdict("good", f"entropy is within {ENTROPY_BAND:.0%} of its target, and alpha is not at its limit")
    elif controller == "p":
        yield Verdict(
            "warn",
            f"entropy rests {abs(mean):.2g} nats {_side(mean)} its target: P alone leaves an offset, use controller=pi "
            "or a larger K_p",
        )
    else:
        yield Verdict(
            "warn",
            f"entropy is {abs(mean):.2g} nats {_side(mean)} its target on average and alpha is not at its limit: give "
            "the integral time, or raise K_p and K_i (megatron-entropic tune proposes gains)",
        )


def _jump(run: Run) -> tuple[float, float] | None:
    """Entropies before and after the last jump that alpha has been stuck since, nats; None where there is none."""
    entropies, alphas = run.series("entropy/mean"), run.series("entropy/alpha")
    found = None
    for step, (before, after) in enumerate(pairwise(entropies), start=1):
        pushes_back = (after - before) * alphas[-1] > 0
        if (
            abs(after - before) > JUMP * entropies[0]
            and pushes_back
            and saturated_steps(alphas[step:]) == len(alphas[step:])
        ):
            found = before, after
    return found


def _stuck(steps: int, alpha: float, error: float, band: float) -> Verdict:
    where = f"alpha has been saturated at {alpha:+.0f} for {steps} steps"
    if alpha * error <= 0:
        return Verdict("warn", f"{where} with the error on the other side: the integral is wound up, set anti_windup")
    if abs(error) <= band:
        return Verdict("warn", f"{where}: it holds the target with nothing in reserve, lower tau")
    cure = "lower the target or tau" if alpha < 0 else "raise the target or lower tau"
    return Verdict("warn", f"{where} and entropy is {abs(error):.2g} nats {_side(error)} its target: {cure}")


def _uncontrolled(run: Run) -> Iterator[Verdict]:
    entropies = run.finite("entropy/mean")
    if entropies[-1] < 0.5 * entropies[0]:
        yield Verdict("warn", f"without control entropy fell from {entropies[0]:.3g} to {entropies[-1]:.3g} nats")


def _authority(run: Run) -> Iterator[Verdict]:
    actuated = run.finite("entropy/actuated_fraction")[-WINDOW:]
    advantage = run.finite("entropy/nonzero_advantage_fraction")[-WINDOW:]
    if not actuated or fmean(actuated) >= LEAST_AUTHORITY:
        return
    text = f"alpha acts on {fmean(actuated):.1%} of the tokens only (pi > tau and A != 0): "
    if advantage and fmean(advantage) < LEAST_ADVANTAGE:
        text += "most prompts are solved by all or none of their responses, change the prompts or sample more"
    else:
        text += "lower tau"
    yield Verdict("warn", text)


def _mismatch(run: Run) -> Iterator[Verdict]:
    usual, mismatch = run.mismatch_yardstick, run.finite("mismatch/logprob_abs_mean")[-WINDOW:]
    if usual and mismatch and fmean(mismatch) > usual.limit:
        yield Verdict(
            "warn",
            f"the engines sample from another policy than the one that is trained: log-probs of the same tokens differ "
            f"by {fmean(mismatch):.2g} nats on average ({usual}): compare them by `megatron-entropic score` with "
            "--backend megatron, vllm and transformers",
        )


def _importance(run: Run) -> Iterator[Verdict]:
    far = "importance weights", "the policy is far from the one that sampled"
    old = "staleness weights", "tokens are too old for this learning rate, lower rollout.lag"
    for metric, (weights, meaning) in {"effective_fraction": far, "staleness_effective_fraction": old}.items():
        effective = run.finite(f"importance/{metric}")[-WINDOW:]
        if effective and fmean(effective) < LEAST_EFFECTIVE:
            yield Verdict("warn", f"{weights} leave {fmean(effective):.0%} of the sample: {meaning}")


def _errors(run: Run) -> list[float]:
    """Values of H - target of the last steps that have both, in nats."""
    pairs = zip(run.series("entropy/mean"), run.series("entropy/target"), strict=True)
    return [h - target for h, target in pairs if math.isfinite(h) and math.isfinite(target)][-WINDOW:]


def _side(error: float) -> str:
    return "above" if error > 0 else "below"
