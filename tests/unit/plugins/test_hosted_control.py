"""The controller as other trainers see it: what it asks for, what it saves, what it refuses, and what it needs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_entropic.algorithms import Steering, build_controller, find_policy_loss, policy_loss
from megatron_entropic.algorithms.entropy_control.steering import Focus, PromptAlpha
from megatron_entropic.config.algorithm import AlgorithmConfig, EntropyControlConfig
from megatron_entropic.config.names import CONTROLLERS
from megatron_entropic.errors import UserError
from megatron_entropic.plugins.control import STATE_FILE, HostedControl, window_sums
from megatron_entropic.policy.step.loss import MicrobatchLoss, Normalizers
from megatron_entropic.policy.step.loss_fields import LossSettings, TokenFields

FIELDS = {field.name for field in fields(Steering)}
SETTINGS = {"target": 0.5, "kp": 2.0, "ki": 0.5, "tau": 0.6}


STEERINGS = (
    Steering(alpha=-0.6),
    Steering(alpha=0.4, tau=0.8),
    Steering(prompt_alpha=PromptAlpha(gain=1.0, limit=0.8, low=-1.0, high=1.0)),
    Steering(focus=Focus(explore=0.3, suppression=0.5)),
    Steering(logprob_scale=0.2),
    Steering(samples="positive"),
    Steering(drop_positive_above=0.7),
)


@pytest.mark.parametrize("steering", STEERINGS, ids=str)
def test_a_clipped_loss_of_scaled_advantages_is_our_trainers_loss(steering: Steering) -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(400, generator=generator)
    old = logprobs + 0.5 * torch.randn(400, generator=generator)
    advantages = torch.randn(400, generator=generator)
    success = torch.rand(400, generator=generator)
    algorithm = AlgorithmConfig(clip_low=0.2, clip_high=0.3, dual_clip=1.8)
    settings = LossSettings(
        algorithm=algorithm,
        loss=find_policy_loss("clipped"),
        max_response_tokens=400,
        correction="none",
        staleness_correction="none",
        correction_level="token",
        correction_cap=2.0,
        tau=0.6,
        ratio_clip="ppo",
        high_prob_denominator=False,
    )
    fields = TokenFields(torch.tensor([400]), old, advantages, success=success)
    x = logprobs.clone().requires_grad_()
    ours, _ = MicrobatchLoss(fields, settings, Normalizers(tokens=400, sequences=1), steering).share(x, None)
    control = HostedControl(SETTINGS, host="a trainer")
    control.steering = steering
    y = logprobs.clone().requires_grad_()
    scaled = control.scale(advantages, y, success)
    theirs = policy_loss(y, old, scaled, clip_low=0.2, clip_high=0.3, dual_clip=1.8).loss.mean()
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss, z in ((theirs, y), (ours, x))))


def test_every_wish_of_a_controller_is_known_here() -> None:
    """A field that neither `scale` nor a host reads would be a wish that nobody hears."""
    read_by_hosts = {"entropy_coefficient", "bonus_threshold", "clip_high"}
    tested = {name for one in STEERINGS for name in FIELDS if getattr(one, name) != getattr(Steering(), name)}
    assert {*tested, *read_by_hosts} == FIELDS
    assert set().union(*(entry.asks for entry in CONTROLLERS.values())) <= FIELDS


def test_scaled_advantages_take_the_shape_of_the_tokens() -> None:
    control = HostedControl({"controller": "constant", "rivals": {"alpha": 1.0}, "tau": 0.5}, host="a trainer")
    control.begin([1.0, 2.0, 2.0])
    logprobs = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    scaled = control.scale(torch.tensor([[2.0], [-2.0]]), logprobs)
    assert scaled.tolist() == [[4.0, 2.0], [0.0, -2.0]]


def test_window_sums_count_masked_tokens_only() -> None:
    entropies = torch.tensor([[0.5, float("nan")], [0.25, 1.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert window_sums(entropies, mask, torch.tensor([[0.0], [2.0]])).tolist() == [1.75, 3.0, 2.0]


def test_a_saved_controller_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    windows = [[300.0 + 7 * step, 500.0, 500.0] for step in range(8)]
    whole, other = (HostedControl(SETTINGS, host="a trainer") for _ in range(2))
    alphas = []
    for step, window in enumerate(windows):
        alphas.append(whole.begin(window if step == 0 else None).alpha)
        whole.end(window, stepped=True)
        if step == 3:
            whole.save(tmp_path)
    other.load(tmp_path)
    resumed = []
    for window in windows[4:]:
        resumed.append(other.begin().alpha)
        other.end(window, stepped=True)
    assert resumed == alphas[4:]


def test_a_first_step_that_was_not_steered_counts() -> None:
    late, early = (HostedControl(SETTINGS, host="a trainer") for _ in range(2))
    window = [350.0, 500.0, 500.0]
    early.begin(window)
    for control in (late, early):
        control.end(window, stepped=True)
    assert late.begin().alpha == early.begin().alpha != 0


def test_sums_of_a_broken_step_are_no_measurement() -> None:
    control = HostedControl(SETTINGS, host="a trainer")
    first = control.begin([350.0, 500.0, 500.0]).alpha
    control.end([float("nan"), 500.0, 500.0], stepped=False)
    assert control.begin().alpha == first


def test_a_checkpoint_without_control_starts_it_fresh_and_a_broken_one_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control = HostedControl(SETTINGS, host="a trainer")
    control.load(tmp_path)
    assert "starts fresh" in caplog.text
    (tmp_path / STATE_FILE).write_text('{"kind": "replicated"}', encoding="utf-8")
    with pytest.raises(UserError, match=STATE_FILE):
        control.load(tmp_path)


def test_everything_that_is_wrong_with_settings_is_one_message() -> None:
    wrong = {"controller": "aec", "feedback": "sampling", "denominator": "high_prob_tokens"}
    with pytest.raises(UserError) as caught:
        HostedControl(wrong, host="verl", lacks={"entropy_coefficient": "it is fixed"})
    assert all(word in str(caught.value) for word in ("verl", "aec", "fixed", "sampling", "all_tokens"))


def test_what_a_host_cannot_do_is_refused_and_not_left_out() -> None:
    lacks = {"clip_high": "its clip is fixed", "bonus_threshold": "it knows no success"}
    for controller, reason in (("aer", "it knows no success"), ("adapo", "its clip is fixed")):
        with pytest.raises(UserError, match=f"{controller} asks for .*{reason}"):
            HostedControl({"controller": controller}, host="a trainer", lacks=lacks)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"measure": "responses"}, "measure: responses exists in our own trainer only"),
        ({"ratio_clip": "none"}, "ratio_clip: in this loss of a trainer the term is as ppo has it"),
        ({"reanchor": "measured"}, "choose detected"),
        ({"weight_limit": 1.0}, "weight_limit"),
        ({"guard": "ceiling", "controller": "aec"}, "overrides alpha, and controller=aec has none"),
        ({"guard": "band", "guards": {"bottom": 1.3}}, "bottom=1.3 is not below top=1.2"),
        ({"controller": "cascade", "tau": 0.3}, "must lie within rivals.cascade_tau"),
        ({"controller": "probe", "rivals": {"alpha": 0.5}}, "beyond 1"),
        ({"controller": "unsovled"}, "did you mean unsolved"),
    ],
)
def test_what_would_have_no_effect_or_no_sense_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        HostedControl(wrong, host="a trainer")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("guard", ["off", "ceiling", "band"])
@pytest.mark.parametrize("reanchor", ["off", "detected"])
def test_every_controller_guard_and_anchor_steers_as_in_our_trainer(
    name: str, guard: str, reanchor: str, tmp_path: Path
) -> None:
    """Over an entropy that rises, jumps with the data and falls, with a checkpoint on the way."""
    own = guard if CONTROLLERS[name].steers_alpha else "off"
    settings = {"controller": name, "guard": own, "reanchor": reanchor, "target": "0.7x", "tau": 0.9}
    ours = build_controller(EntropyControlConfig(**settings))
    theirs = HostedControl(settings, host="a trainer")
    for step, entropy in enumerate([0.5] * 5 + [0.6, 0.7, 0.8, 1.6, 1.5, 0.6, 0.4, 0.1]):
        steering = ours.observe(10 * entropy, 10.0)
        ours.commit(stepped=True, has_advantage=True)
        if step == 9:
            theirs.save(tmp_path)
            theirs = HostedControl(settings, host="a trainer")
            theirs.load(tmp_path)
        assert theirs.begin((10 * entropy, 10.0)) == steering
        theirs.end((10 * entropy, 10.0, 5.0), stepped=True)


def test_parts_for_other_trainers_import_with_torch_alone() -> None:
    """`pip install megatron_entropic` brings neither Megatron nor Ray nor vLLM, and nothing of them is imported."""
    script = (
        "import sys, torch; before = {name.split('.')[0] for name in sys.modules}\n"
        "import megatron_entropic.algorithms, megatron_entropic.tensor_parallel, megatron_entropic.plugins.control\n"
        "new = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "sys.exit(', '.join(sorted(new - {'megatron_entropic'})) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
