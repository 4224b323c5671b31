"""Identification and proposed gains on simulated plants, through the controller that runs would use."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_entropic.algorithms import EntropyController, build_controller
from megatron_entropic.algorithms.entropy_control import Controller
from megatron_entropic.algorithms.entropy_control.tuning import (
    Plant,
    delay_bound,
    identify_plant,
    propose_gains,
    settled_after,
)
from megatron_entropic.cli import main
from megatron_entropic.config.algorithm import EntropyControlConfig

Dynamics = Callable[[float, float], float]
"""(H, alpha) -> change of H in an optimizer step."""


def simulate(
    dynamics: Dynamics, controller: Controller, entropy: float, steps: int, noise: float, seed: int = 0
) -> tuple[list[float], list[float], list[float]]:
    """(true H, measured H, alpha) of each step."""
    source = random.Random(seed)
    true, measured, alphas = [], [], []
    for _ in range(steps):
        seen = entropy + source.gauss(0.0, noise)
        alphas.append(controller.observe(seen, 1.0).alpha)
        controller.commit(stepped=True, has_advantage=True)
        true.append(entropy)
        measured.append(seen)
        entropy = max(entropy + dynamics(entropy, alphas[-1]), 0.0)
    return true, measured, alphas


PLANTS: dict[str, tuple[Dynamics, float, float, float]] = {
    # (change, entropy at the start, target, noise)
    "integrator that drifts down": (lambda h, a: -0.0010 - 0.0040 * a, 0.60, 0.50, 0.003),
    "gain that falls with entropy": (lambda h, a: -0.0006 - 0.0060 * h * a, 0.40, 0.45, 0.002),
    "slow, drawn to an entropy of its own": (lambda h, a: 0.002 * (0.25 - h) - 0.0015 * a, 0.30, 0.27, 0.001),
}


def test_an_exact_plant_is_found_exactly() -> None:
    controller = EntropyController(0.5, 4.0, 0.0)
    _, measured, alphas = simulate(lambda h, a: -0.001 - 0.01 * a, controller, 0.6, 40, noise=0.0)
    plant = identify_plant(measured, alphas)
    assert plant.gain == pytest.approx(0.01, rel=1e-6)
    assert plant.drift == pytest.approx(-0.001, rel=1e-6)


def test_rows_of_several_updates_are_counted() -> None:
    alphas = [0.1, 0.9, -0.3, 0.5] * 5
    entropies = [1.0]
    for alpha in alphas[:-1]:
        entropies.append(entropies[-1] + 4 * (0.002 - 0.01 * alpha))
    plant = identify_plant(entropies, alphas, updates_per_row=4)
    assert (plant.gain, plant.drift) == (pytest.approx(0.01), pytest.approx(0.002))


@pytest.mark.parametrize("name", PLANTS)
def test_proposed_gains_settle_in_time_without_saturating(name: str) -> None:
    """The promise: within twice the asked time, alpha saturated in at most a tenth of the steps."""
    dynamics, start, target, noise = PLANTS[name]
    # The identification run: P alone, towards a target that is not the later one.
    recording = EntropyController(target, 3.0, 0.0)
    _, measured, alphas = simulate(dynamics, recording, start, 120, noise, seed=1)
    plant = identify_plant(measured, alphas)
    proposal = propose_gains(plant, start, target, settling_steps=150)
    controller = EntropyController(target, proposal.kp, proposal.ki, initial_alpha=proposal.initial_alpha)
    true, _, alphas = simulate(dynamics, controller, start, 900, noise, seed=2)
    errors = [entropy - target for entropy in true]
    # The noise that alpha passes on stays, so the band is not narrower than it.
    assert settled_after(errors, max(0.05 * abs(errors[0]), 2.0 * noise)) <= 2 * proposal.settling_steps
    assert proposal.settling_steps <= 2 * 150
    assert sum(abs(alpha) >= 1 for alpha in alphas) <= 0.1 * len(alphas)
    assert abs(sum(errors[-200:]) / 200) < noise, "the integral removes the offset"


def test_p_alone_leaves_the_predicted_offset() -> None:
    """e = b / (g K_p) at rest."""
    controller = EntropyController(0.5, 5.0, 0.0)
    true, _, _ = simulate(lambda h, a: -0.001 - 0.004 * a, controller, 0.5, 2000, noise=0.0)
    assert true[-1] - 0.5 == pytest.approx(-0.001 / (0.004 * 5.0), rel=1e-3)


def test_a_time_that_alpha_cannot_keep_is_said_and_replaced() -> None:
    proposal = propose_gains(Plant(0.001, -0.0002, 0.0, 0.0), entropy=0.6, target=0.1, settling_steps=100)
    assert proposal.initial_alpha + proposal.kp * 0.5 == pytest.approx(1.0)
    assert proposal.settling_steps > 1000
    assert any("alpha would saturate" in line for line in proposal.reasoning)
    assert any("target_schedule linear over 1250" in line for line in proposal.reasoning)
    # What holding needs lies on the side of alpha that leads up, and leaves less of it.
    against = propose_gains(Plant(0.001, -0.0002, 0.0, 0.0), entropy=0.1, target=0.6, settling_steps=100)
    assert against.kp * 0.5 == pytest.approx(0.8)


def test_noise_that_would_saturate_alpha_slows_the_loop() -> None:
    quiet, noisy = (propose_gains(Plant(0.004, -0.002, 0.0, noise), 0.5, 0.49, 50) for noise in (0.001, 0.02))
    assert quiet.settling_steps == pytest.approx(50)
    assert noisy.kp * 0.02 * 1.5 == pytest.approx(0.5), "half of alpha is needed to hold the target"
    assert any("noise would saturate alpha" in line for line in noisy.reasoning)


def test_an_integral_that_begins_where_it_is_needed_leaves_no_dent() -> None:
    def deepest(initial_alpha: float) -> float:
        controller = EntropyController(0.5, 10.0, 0.2, initial_alpha=initial_alpha)
        true, _, alphas = simulate(lambda h, a: -0.002 - 0.004 * a, controller, 0.5, 60, noise=0.0)
        assert alphas[0] == pytest.approx(initial_alpha)
        return 0.5 - min(true)

    assert deepest(-0.5) == pytest.approx(0.0, abs=1e-12)
    assert deepest(0.0) > 0.02


def test_a_probe_tells_alpha_from_drift() -> None:
    section = {"controller": "probe", "rivals": {"alpha": -0.2, "probe_amplitude": 0.5, "probe_half_period": 5}}
    controller = build_controller(EntropyControlConfig.model_validate(section))
    _, measured, alphas = simulate(lambda h, a: -0.002 - 0.01 * a, controller, 0.6, 40, noise=0.005)
    assert alphas == pytest.approx(([-0.7] * 5 + [0.3] * 5) * 4)
    plant = identify_plant(measured, alphas)
    assert plant.gain == pytest.approx(0.01, abs=3 * plant.gain_error)
    assert plant.gain_error < 0.002
    assert plant.drift == pytest.approx(-0.002, abs=1e-3)


def test_a_target_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha = -2\.00, and its limit is 1"):
        propose_gains(Plant(0.001, -0.002, 0.0, 0.0), 0.5, 0.4, 100)


@pytest.mark.parametrize(
    ("entropies", "alphas", "message"),
    [
        ([0.5] * 5, [0.1] * 5, "at least 10 steps"),
        ([0.5 - 0.01 * k for k in range(30)], [1.0] * 30, "alpha was constant"),
        ([0.5 + 0.1 * (k % 3) for k in range(30)], [0.1 * (k % 2) for k in range(30)], "not clearly above 0"),
        ([float("nan")] * 30, [0.1] * 30, "not finite"),
    ],
)
def test_what_says_nothing_about_the_plant_is_refused(
    entropies: list[float], alphas: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        identify_plant(entropies, alphas)


def test_the_command_prints_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = EntropyController(0.5, 3.0, 0.0)
    _, measured, alphas = simulate(PLANTS["integrator that drifts down"][0], recording, 0.6, 120, 0.003)
    rows = [
        {"step": step, "entropy/mean": entropy, "entropy/alpha": alpha, "entropy/target": 0.5}
        for step, (entropy, alpha) in enumerate(zip(measured, alphas, strict=True), start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["tune", str(tmp_path), "--settling-steps", "100"]) == 0
    printed = capsys.readouterr().out
    assert "holding the target needs alpha" in printed
    assert re.search(r"entropy_control.kp=\d+\.\d+ entropy_control.ki=0\.\d+", printed)
    assert re.search(r"entropy_control.initial_alpha=-0\.2\d+ entropy_control.target=0.5$", printed, re.MULTILINE)
    assert main(["tune", str(tmp_path), "--last", "5"]) == 2
    assert "at least 10 steps" in capsys.readouterr().err


@pytest.mark.parametrize(("delay", "bound"), [(0, 2.0), (1, 1.0), (2, 0.618), (4, 0.347), (8, 0.185)])
def test_a_loop_with_old_entropy_oscillates_beyond_its_bound(delay: int, bound: float) -> None:
    assert delay_bound(delay) == pytest.approx(bound, abs=1e-3)
    for gain, grows in ((0.97 * delay_bound(delay), False), (1.03 * delay_bound(delay), True)):
        errors = [1.0] * (delay + 1)
        for _ in range(3000):
            errors.append(errors[-1] - gain * errors[-1 - delay])
        assert (max(map(abs, errors[-50:])) > 1.0) == grows


def test_gains_for_old_entropy_stay_within_half_of_the_bound() -> None:
    plant = Plant(gain=0.05, drift=0.0, gain_error=0.001, noise=0.0)
    for delay in (0, 1, 4):
        proposal = propose_gains(plant, 0.501, 0.5, settling_steps=1, delay=delay)
        assert proposal.kp * plant.gain == pytest.approx(0.5 * delay_bound(delay))
    assert any("4 steps old would make the loop ring" in line for line in proposal.reasoning)
