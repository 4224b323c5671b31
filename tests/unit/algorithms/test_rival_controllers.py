"""Controllers beside P and PI, schedules, set points, and that a registry row is all a controller needs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from steered_runs import TOKENS, controller, run

from megatron_entropic.algorithms.entropy_control import (
    CONTROLLERS,
    EntropyController,
    Schedule,
    Setpoint,
    Steering,
)
from megatron_entropic.config.algorithm import EntropyControlConfig
from megatron_entropic.errors import UserError


def test_schedules() -> None:
    linear, cosine = Schedule(1.0, 0.2, "linear", 4), Schedule(1.0, 0.2, "cosine", 4)
    assert [linear.at(step) for step in (0, 1, 4, 9)] == pytest.approx([1.0, 0.8, 0.2, 0.2])
    assert [cosine.at(step) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert cosine.at(1) > linear.at(1)
    assert Schedule(0.3).at(1000) == 0.3


def test_a_target_relative_to_the_initial_entropy() -> None:
    subject = controller(
        target="0.5x", target_schedule={"kind": "linear", "end": 0.1, "steps": 2}, controller="p", kp=1
    )
    assert [s.alpha for s in run(subject, [0.8, 0.8, 0.8, 0.8])] == pytest.approx([0.4, 0.55, 0.7, 0.7])
    assert subject.target == pytest.approx(0.1)
    again = controller(target="0.5x", target_schedule={"kind": "linear", "end": 0.1, "steps": 2}, controller="p", kp=1)
    run(again, [0.8])
    resumed = controller(
        target="0.5x", target_schedule={"kind": "linear", "end": 0.1, "steps": 2}, controller="p", kp=1
    )
    resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert run(resumed, [0.2])[0].alpha == pytest.approx(0.2 - 0.25), "the first entropy of the run, not of the resume"


@pytest.mark.parametrize("bad", ["x", "0.7 x", "half", "-0.5x", -0.1])
def test_a_target_that_is_neither_nats_nor_a_multiple_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="nats"):
        EntropyControlConfig(target=bad)


def test_gain_schedule() -> None:
    subject = controller(
        target=0.1, controller="pi", kp=2, ki=1, gain_schedule={"kind": "linear", "end": 0.5, "steps": 2}
    )
    assert [s.alpha for s in run(subject, [0.2, 0.1, 0.2])] == pytest.approx([0.2, 0.75 * 0.1, 0.5 * (0.2 + 0.1)])


def test_clamp_bounds_the_integral_term() -> None:
    subject = EntropyController(0.5, 0.1, 0.5, anti_windup="clamp")
    run(subject, [1.5] * 50)
    assert subject.ki * subject.integral == pytest.approx(1.0)
    run(subject, [0.4])
    assert subject.alpha < 1.0


@pytest.mark.parametrize("start", ["at_crossing", "integral_at_crossing"])
def test_start_at_the_first_crossing(start: str) -> None:
    subject = EntropyController(0.5, 1.0, 1.0, start=start)
    alphas = [s.alpha for s in run(subject, [0.9, 0.7, 0.55])]
    assert alphas == ([0.0] * 3 if start == "at_crossing" else pytest.approx([0.4, 0.2, 0.05]))
    assert subject.integral == 0.0
    assert run(subject, [0.4])[0].alpha == pytest.approx(-0.1)
    assert subject.integral == pytest.approx(-0.1)
    resumed = EntropyController(0.5, 1.0, 1.0, start=start)
    resumed.load_state_dict(subject.state_dict())
    assert run(resumed, [0.6])[0].alpha == pytest.approx(0.0), "it has crossed, and the integral is that of before"


def test_aec_moves_its_coefficient_and_acts_below_the_target_only() -> None:
    subject = controller(controller="aec", target=0.2, rivals={"aec_step": 0.1, "aec_limit": 0.25})
    asked = [s.entropy_coefficient for s in run(subject, [0.1, 0.1, 0.1, 0.1, 0.3, 0.3, 0.1])]
    assert asked == pytest.approx([0.0, 0.1, 0.2, 0.25, 0.0, 0.0, 0.05])


def test_entrocraft_takes_one_sign_outside_its_annealed_band() -> None:
    subject = controller(
        controller="entrocraft",
        rivals={"entrocraft_upper": [0.7, 0.5], "entrocraft_lower": [0.6, 0.4], "entrocraft_steps": 2},
    )
    assert [s.samples for s in run(subject, [0.71, 0.55, 0.55, 0.45, 0.39])] == [
        "positive", "all", "positive", "all", "negative",
    ]  # fmt: skip


def test_dmmpt_drops_confident_positive_tokens_below_the_target() -> None:
    subject = controller(controller="dmmpt", target=0.2)
    above, below = run(subject, [0.3, 0.1])
    assert above == Steering()
    probabilities = torch.tensor([0.995, 0.995, 0.5])
    kept = below.kept(probabilities.log(), torch.tensor([1.0, -1.0, 1.0]))
    assert kept.tolist() == [False, True, True]


def test_constant_alpha_and_entropy_bonus() -> None:
    assert run(controller(controller="constant", rivals={"alpha": -0.5}), [0.1, 0.9]) == [Steering(alpha=-0.5)] * 2
    bonus = controller(controller="entropy_bonus", rivals={"bonus": 0.02})
    assert run(bonus, [0.1, 0.9]) == [Steering(entropy_coefficient=0.02)] * 2


def test_repo_r_doubles_and_halves_zeta_and_changes_its_sign_at_the_least() -> None:
    subject = controller(controller="repo_r", target=0.5, rivals={"repo_zeta": 0.1, "repo_bounds": [0.06, 0.3]})
    asked = [s.logprob_scale for s in run(subject, [0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.4])]
    assert asked == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.15, 0.075, -0.06, -0.12])
    assert subject.zeta == pytest.approx(-0.06)


def test_repo_r_rescales_advantages_without_changing_their_sign() -> None:
    """zeta .5 at log pi -1 and -4: 1 + .5 and 1 + 2 for A > 0; 1 - .5 and 1 - 2 < 0, so 0, for A < 0."""
    logprobs = torch.tensor([-1.0, -4.0, -1.0, -4.0])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0])
    rescaled = Steering(logprob_scale=0.5).rescaled(logprobs, advantages)
    assert rescaled.tolist() == pytest.approx([3.0, 6.0, -1.0, 0.0])
    assert torch.equal(Steering().rescaled(logprobs, advantages), advantages)


def test_adapo_widens_the_upper_clip_below_the_target() -> None:
    subject = controller(
        controller="adapo", target=0.5, rivals={"adapo_clip": 0.2, "adapo_bounds": [0.15, 0.4], "adapo_factor": 2}
    )
    asked = [s.clip_high for s in run(subject, [0.4, 0.4, 0.6, 0.6, 0.6])]
    assert asked == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.15])


def test_aer_gives_a_bonus_to_difficult_prompts_in_proportion_to_the_error() -> None:
    subject = controller(controller="aer", target="0.5x", rivals={"aer_eta": 0.5, "aer_limit": 0.06, "aer_rho": 0.5})
    steerings = run(subject, [0.8, 0.3, 0.3, 0.6])
    assert [s.entropy_coefficient for s in steerings] == pytest.approx([0.0, 0.0, 0.05, 0.06])
    assert steerings[0].bonus_factors(torch.tensor([0.0, 0.25, 0.5, 1.0])).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_fade_goes_from_hard_and_balanced_to_medium_and_suppressing() -> None:
    first, last = run(controller(controller="fade", rivals={"fade_suppression": 0.5}), [0.8, 0.0])
    success, signs = torch.tensor([0.0, 0.5, 0.5, 0.9]), torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert first.focus is not None
    assert last.focus is not None
    assert first.focus.at(success, signs).tolist() == pytest.approx([1.0, 0.5, 0.5, 0.1])
    assert last.focus.at(success, signs).tolist() == pytest.approx([0.0, 0.5, 1.5, 0.36 * 0.5])


def test_a_controller_of_ones_own_is_named_as_module_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of docs/adding_an_algorithm.md, from a file in the current directory."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "adding_an_algorithm.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(# my_controllers\.py.*?)```", page, re.DOTALL)
    (tmp_path / "my_controllers.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    thermostat = controller(controller="my_controllers:Thermostat", target=0.5, options={"bonus": 0.02})
    assert [steering.entropy_coefficient for steering in run(thermostat, [0.4, 0.6, 0.3])] == [0.02, 0.0, 0.02]
    again = controller(controller="my_controllers:Thermostat", target=0.5)
    again.load_state_dict(json.loads(json.dumps(thermostat.state_dict())))
    assert again.step == 3
    assert again.heated == 2.0
    config = EntropyControlConfig(controller="my_controllers:Thermostat")
    assert config.enabled
    assert config.steers_alpha, "nothing is known of it, so the loss keeps room for the term"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "my_broken cannot be imported: No module named 'my_broken'"),
        ("x = 1", "there is no function or class Mine in my_broken"),
        ("class Mine: pass", "Mine is no subclass of megatron_entropic.algorithms.Controller"),
        ("def Mine(): pass", "is called with 2 arguments: too many positional arguments"),
        ("def broken(", "my_broken cannot be imported: SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "my_broken cannot be imported: SystemExit: 3"),
    ],
)
def test_a_controller_that_cannot_be_used_is_a_message(
    source: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "my_broken", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / "my_broken.py").write_text(source)
    with pytest.raises(UserError) as caught:
        controller(controller="my_broken:Mine")
    assert f"entropy_control.controller=my_broken:Mine: {problem}" in str(caught.value)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_resumes_bit_for_bit_and_stands_still_in_refused_steps(name: str) -> None:
    entropies = [0.9, 0.3, 0.05, 0.2, 0.7, 0.15, 0.1, 0.33]
    section = {"controller": name, "target": "0.3x", "ki": 0.3, "rivals": {"aec_step": 0.002, "alpha": 0.2}}
    whole, first, second = (controller(**section) for _ in range(3))
    expected = run(whole, entropies)
    begun = run(first, entropies[:4])
    first.observe(0.5 * TOKENS, TOKENS)
    first.commit(stepped=False, has_advantage=True)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + run(second, entropies[4:]) == expected
    assert second.step == whole.step == 8
    assert all(isinstance(value, float) for value in second.metrics().values())
    assert {"entropy/mean", "entropy/target", "entropy/error", "entropy/alpha"} <= set(second.metrics())


def test_setpoints_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="target"):
        Setpoint.of(float("nan"))
