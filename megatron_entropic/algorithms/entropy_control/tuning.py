"""Gains from a recorded run: how strongly alpha moves entropy, and which K_p and K_i make that settle in a wanted time.

The plant, one row an optimizer step, entropy in nats:

    H[k+1] = H[k] + b - g alpha[k]              b what learning does by itself, g what full alpha takes away
    summed:  H[k] = h0 + b k - g A[k] + noise   A[k] = alpha[0] + .. + alpha[k-1]

The summed form is fitted: in the differences, the measurement's noise sits on both sides once alpha follows it, and the
estimate of g is biased.

With alpha = K_p e + K_i sum(e), and K_i sum(e) = b / g at first, which holds H, the error obeys
(z - 1)^2 + g K_p (z - 1) + g K_i = 0. Two equal poles at z = 1 - p need

    K_p = 2 p / g,   K_i = p^2 / g,   and then e(t) = e(0) (1 - p t) exp(-p t), within 5 % of e(0) from p t = 4.15 on
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

SETTLED = 0.05
"""Fraction of the first error within which the error stays once it has settled."""
SETTLING_POLE_STEPS = 4.15
"""Value of p t from which on |(1 - p t) exp(-p t)| <= SETTLED."""
MIN_STEPS = 10
MIN_SIGNIFICANCE = 3.0
"""Number of standard errors that g must be above 0; else the run says nothing about it."""
USABLE_ALPHA = 0.9
"""Largest |alpha| that may be needed just to hold the target."""
DELAY_MARGIN = 0.5
"""Largest g K_p as a share of `delay_bound`: a loop nearer to it rings, and without delay chases the noise of single
measurements."""
NOISE_WIDTH = 1.5
"""Standard deviations of noise that alpha has room for: about 7 % of the measurements are further out on one side."""
START_SATURATES = "alpha would saturate"


@dataclass(frozen=True, slots=True)
class Plant:
    """Response of a run's entropy to alpha, as identified from its records."""

    gain: float
    """Gain g > 0, nats per optimizer step and unit of alpha."""
    drift: float
    """Drift b, nats per optimizer step."""
    gain_error: float
    """Standard error of g, in its unit."""
    noise: float
    """Standard deviation of H around the fit, nats."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Proposed gains, with the reasoning that leads to them."""

    kp: float
    ki: float
    initial_alpha: float
    """Value at which the integral's part of alpha begins: b / g."""
    settling_steps: float
    """Optimizer steps in which entropy settles; more than wanted where alpha would saturate."""
    reasoning: tuple[str, ...]


def delay_bound(delay: int) -> float:
    """Value of g K_p from which on control by P oscillates when it answers to entropy that is `delay` steps old.

    With alpha[k] = K_p e[k - d] the error obeys z^(d + 1) - z^d + g K_p = 0, whose roots are inside the unit circle
    for 0 < g K_p < 2 sin(pi / (2 (2 d + 1))): 2, 1, 0.62, 0.45, 0.35 for d = 0 .. 4.

    Args:
        delay: optimizer steps by which the entropy that is fed back is older than the policy.
    """
    return 2.0 * math.sin(math.pi / (2.0 * (2.0 * delay + 1.0)))


def identify_plant(entropies: Seq[float], alphas: Seq[float], updates_per_row: int = 1) -> Plant:
    """Identify the plant by least squares of the summed form over consecutive rows.

    Args:
        entropies: [n] entropies measured before the update of each row, nats.
        alphas: [n] alphas used in that update.
        updates_per_row: optimizer steps between one row and the next; alpha stands for all of them.

    Raises:
        ValueError: too few rows, a value is not finite, or alpha varied so little that g cannot be told from noise.
    """
    if len(entropies) != len(alphas) or len(entropies) < MIN_STEPS:
        raise ValueError(
            f"identification needs at least {MIN_STEPS} steps with entropy and alpha, not {len(entropies)}"
        )
    h, a = torch.tensor(list(entropies), dtype=torch.float64), torch.tensor(list(alphas), dtype=torch.float64)
    if not bool(torch.isfinite(h).all() and torch.isfinite(a).all()):
        raise ValueError("identification: an entropy or alpha is not finite")
    steps = updates_per_row * torch.arange(len(h), dtype=torch.float64)
    summed = updates_per_row * (a.cumsum(0) - a)
    trend = torch.stack([torch.ones_like(h), steps], dim=1)
    # What of the summed alpha is not a straight line: a constant alpha cannot be told from drift.
    excitation = summed - trend @ torch.linalg.lstsq(trend, summed.unsqueeze(1)).solution.squeeze(1)
    energy = float(excitation.square().sum())
    if energy <= 1e-12 * max(float(summed.square().sum()), 1.0):
        raise ValueError("identification: alpha was constant, so its effect cannot be told from drift; vary the target")
    gain = -float(excitation @ h) / energy
    rest = h + gain * summed
    (start, drift) = torch.linalg.lstsq(trend, rest.unsqueeze(1)).solution.squeeze(1).tolist()
    residual = rest - start - drift * steps
    noise = math.sqrt(float(residual.square().sum()) / (len(h) - 3))
    error = noise / math.sqrt(energy)
    if not gain > MIN_SIGNIFICANCE * error:
        raise ValueError(
            f"identification: g = {gain:.3g} +- {error:.1g} nats per step and alpha is not clearly above 0; record "
            "more steps, or let alpha vary more (a target that moves, a lower tau)"
        )
    return Plant(gain, drift, error, noise)


def propose_gains(plant: Plant, entropy: float, target: float, settling_steps: float, delay: int = 0) -> Proposal:
    """Propose K_p and K_i that bring `entropy` to `target` within `settling_steps` optimizer steps without saturating
    alpha.

    Where the wanted time needs |alpha| > 1 at the start, or lets noise take alpha there, the shortest time that does
    not is taken, and said.

    Args:
        plant: response of entropy to alpha.
        entropy: entropy now, nats.
        target: where it is to go, nats.
        settling_steps: optimizer steps to get there.
        delay: optimizer steps by which the entropy that is fed back is old.

    Raises:
        ValueError: settling_steps < 1, or holding the target needs more than alpha can do.
    """
    if not settling_steps >= 1:
        raise ValueError(f"settling_steps must be at least 1, not {settling_steps}")
    holding = plant.drift / plant.gain
    says = [
        f"plant: alpha = 1 takes {plant.gain:.3g} +- {plant.gain_error:.1g} nats an optimizer step; by itself entropy "
        f"moves by {plant.drift:+.3g}; noise of a measurement {plant.noise:.2g} nats",
        f"holding the target needs alpha = b / g = {holding:+.2f}, where the integral begins",
    ]
    if abs(holding) > USABLE_ALPHA:
        raise ValueError(
            f"holding any target needs alpha = {holding:+.2f}, and its limit is 1: lower tau or the learning rate, or "
            f"use denominator=high_prob_tokens, so that alpha has more effect ({says[0]})"
        )
    error = entropy - target
    wanted = SETTLING_POLE_STEPS / settling_steps
    limits = _pole_limits(plant, error, holding, delay)
    reason = min(limits, key=lambda name: limits[name])
    pole = min(wanted, limits[reason])
    says.append(
        f"from H = {entropy:.3g} to {target:.3g} in {settling_steps:g} optimizer steps: p = {SETTLING_POLE_STEPS} / "
        f"{settling_steps:g} = {wanted:.3g}"
    )
    if pole < wanted:
        reached = SETTLING_POLE_STEPS / pole
        says.append(f"that is too fast, {reason}: p = {pole:.3g}, settled after {reached:.0f} steps")
        if reason == START_SATURATES:
            ramp = math.ceil(abs(error) / ((1.0 - abs(holding)) * plant.gain))
            says.append(f"or move the target: entropy_control.target_schedule linear over {2 * ramp} optimizer steps")
    kp, ki = 2.0 * pole / plant.gain, pole**2 / plant.gain
    says.append(f"K_p = 2 p / g = {kp:.3g}, K_i = p^2 / g = {ki:.3g}")
    says.append(f"noise alone moves alpha by {kp * plant.noise:.2g} (standard deviation)")
    return Proposal(kp, ki, holding, SETTLING_POLE_STEPS / pole, tuple(says))


def _pole_limits(plant: Plant, error: float, holding: float, delay: int) -> dict[str, float]:
    """Largest p before each thing that goes wrong beyond it, by its name."""
    # The first alpha is b / g + K_p e = b / g + 2 p e / g, and has to stay within 1 on the side of e.
    room = 1.0 - math.copysign(holding, holding * error)
    # Around b / g, noise moves alpha by K_p times itself; it is to stay within 1 on the nearer side.
    spare = 1.0 - abs(holding)
    return {
        START_SATURATES: room * plant.gain / (2.0 * abs(error)) if error else math.inf,
        "noise would saturate alpha": spare * plant.gain / (2.0 * NOISE_WIDTH * plant.noise)
        if plant.noise
        else math.inf,
        # g K_p = 2 p.
        f"entropy that is {delay} steps old would make the loop ring"
        if delay
        else "the loop would chase noise": DELAY_MARGIN * delay_bound(delay) / 2.0,
    }


def settled_after(errors: Seq[float], tolerance: float) -> int:
    """Number of steps after which every |error| is within `tolerance`; len(errors) if the last one is not."""
    outside = [index for index, error in enumerate(errors) if abs(error) > tolerance]
    return outside[-1] + 1 if outside else 0
