"""The controllers: the specification's vectors, freezes, anti-windup, state."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.algorithms import EntropyController, MicrobatchLocalController, build_controller
from megatron_entropic.config.algorithm import EntropyControlConfig

TOKENS = 1000


def run(
    controller: EntropyController, entropies: list[float], *, stepped: bool = True, has_advantage: bool = True
) -> list[float]:
    alphas = []
    for entropy in entropies:
        alphas.append(controller.observe(entropy * TOKENS, TOKENS).alpha)
        controller.commit(stepped=stepped, has_advantage=has_advantage)
    return alphas


def test_vectors_of_the_specification() -> None:
    controller = EntropyController(0.1, 10, 0.01)
    alphas = run(controller, [0.12, 0.11, 0.095, 0.1, 0.25])
    assert alphas == pytest.approx([0.2, 0.1002, -0.0497, 0.00025, 1.0], abs=1e-12)
    assert controller.alpha_unclipped == pytest.approx(1.50025)
    assert controller.proportional_term == pytest.approx(1.5)
    assert controller.integral_term == pytest.approx(0.00025)
    assert controller.integral == pytest.approx(0.025), "frozen: alpha is saturated and e > 0"


def test_too_much_entropy_gives_positive_alpha() -> None:
    assert run(EntropyController(0.1, 1, 0), [0.3, 0.05]) == pytest.approx([0.2, -0.05])


def test_proportional_only_ignores_but_keeps_the_integral() -> None:
    controller = EntropyController(0.1, 2, 0)
    assert run(controller, [0.15] * 50) == pytest.approx([0.1] * 50)
    assert controller.integral == pytest.approx(50 * 0.05)
    assert controller.integral_term == 0


@pytest.mark.parametrize(("stepped", "has_advantage"), [(False, True), (True, False), (False, False)])
def test_integral_stands_still(stepped: bool, has_advantage: bool) -> None:
    controller = EntropyController(0.1, 1, 0.1)
    run(controller, [0.2, 0.15])
    integral, step = controller.integral, controller.step
    run(controller, [0.3, 0.0, 0.2], stepped=stepped, has_advantage=has_advantage)
    assert controller.integral == integral
    assert controller.step == step + (3 if stepped else 0)


def test_alpha_is_fixed_between_observe_and_commit() -> None:
    controller = EntropyController(0.1, 1, 1)
    alpha = controller.observe(0.3 * TOKENS, TOKENS).alpha
    controller.commit(stepped=True, has_advantage=True)
    assert controller.alpha == alpha
    assert controller.observe(0.3 * TOKENS, TOKENS).alpha == pytest.approx(alpha + 0.2)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("kp", "ki"), [(10, 0.01), (1, 0.01), (3, 0.5), (2, 2)])
def test_leaves_saturation_at_the_sign_flip(sign: int, kp: float, ki: float) -> None:
    """200 saturated steps, then the error changes sign: with K_p >= K_i the very first alpha is off the limit."""
    target = 5.0
    high, low = target + sign * 1.2, target - sign * 1e-3
    controller = EntropyController(target, kp, ki)
    assert run(controller, [high] * 200)[-1] == sign
    assert abs(ki * controller.integral) <= 1 + 1e-12
    assert abs(run(controller, [low])[0]) < 1

    winding = EntropyController(target, kp, ki, anti_windup="none")
    run(winding, [high] * 200)
    assert run(winding, [low])[0] == sign, "without anti-windup the integral holds alpha at its limit"


@given(
    st.floats(0, 20),
    st.floats(0, 20),
    st.lists(st.floats(0, 3), min_size=1, max_size=60),
)
@settings(deadline=None)
def test_anti_windup_bound(kp: float, ki: float, entropies: list[float]) -> None:
    """K_i |acc| <= max(1, 1 + (K_i - K_p) max |e|): the bound that the code states, for any sequence of errors."""
    controller = EntropyController(1.0, kp, ki)
    worst = 0.0
    for entropy in entropies:
        run(controller, [entropy])
        worst = max(worst, abs(entropy - 1.0))
        assert ki * abs(controller.integral) <= max(1.0, 1.0 + (ki - kp) * worst) + 1e-9
        assert -1 <= controller.alpha <= 1


def test_saturated_error_of_the_other_sign_unwinds() -> None:
    """Saturated upwards while e < 0 (the integral is what saturates): the integral must move."""
    controller = EntropyController(0.5, 0.1, 1)
    run(controller, [1.4, 0.9])
    controller.observe(0.4 * TOKENS, TOKENS)
    before = controller.integral
    assert controller.alpha == 1
    assert controller.error < 0
    controller.commit(stepped=True, has_advantage=True)
    assert controller.integral < before


def test_limit_leak_and_dead_band() -> None:
    limited = EntropyController(0.1, 0, 0.001, integral_limit=0.2)
    run(limited, [0.2] * 5)
    assert limited.integral == pytest.approx(0.2)
    run(limited, [0.0] * 9)
    assert limited.integral == pytest.approx(-0.2)

    leaking = EntropyController(0.1, 0, 0.001, integral_leak=0.25)
    run(leaking, [0.5, 0.1])
    assert leaking.integral == pytest.approx(0.3)
    run(leaking, [0.5] * 100)
    assert leaking.integral == pytest.approx(0.4 / 0.25)

    dead = EntropyController(0.1, 3, 0.002, dead_band=0.02)
    assert run(dead, [0.119, 0.081]) == [0, 0]
    assert (dead.integral, dead.entropy) == (0, pytest.approx(0.081))
    assert run(dead, [0.13]) == pytest.approx([0.09])


def test_measurement_is_the_token_mean() -> None:
    controller = EntropyController(0.1, 1, 0)
    controller.observe(90.0, 300)
    assert controller.entropy == pytest.approx(0.3)


@given(
    entropies=st.lists(st.floats(0, 1), min_size=2, max_size=30),
    cut=st.integers(0, 29),
    leak=st.sampled_from([0.0, 0.01]),
)
@settings(deadline=None)
def test_resume_gives_the_same_alphas(entropies: list[float], cut: int, leak: float) -> None:
    """Bit for bit, through JSON, as a checkpoint carries it."""
    cut = min(cut, len(entropies))
    whole = EntropyController(0.3, 3, 0.1, integral_leak=leak)
    first = EntropyController(0.3, 3, 0.1, integral_leak=leak)
    second = EntropyController(0.3, 3, 0.1, integral_leak=leak)
    expected = run(whole, entropies)
    begun = run(first, entropies[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + run(second, entropies[cut:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_changing_ki_on_resume_rescales_nothing() -> None:
    first = EntropyController(0.1, 1, 0.01)
    run(first, [0.2] * 4)
    second = EntropyController(0.1, 1, 0.02)
    second.load_state_dict(first.state_dict())
    assert second.integral == first.integral
    assert run(second, [0.1]) == pytest.approx([0.02 * 0.4])


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"acc": None},
        {"extra": 2},
        {"acc": float("nan")},
    ],
)
def test_broken_state_is_refused(state: dict[str, float]) -> None:
    controller = EntropyController(0.1, 1, 0)
    changed = {**controller.state_dict(), **state} if state else {}
    with pytest.raises(ValueError, match="entropy controller state"):
        controller.load_state_dict({name: value for name, value in changed.items() if value is not None})


def test_metrics() -> None:
    controller = EntropyController(0.1, 10, 0.01)
    run(controller, [0.12])
    controller.observe(0.25 * TOKENS, TOKENS)
    assert controller.metrics() == pytest.approx(
        {
            "entropy/mean": 0.25,
            "entropy/target": 0.1,
            "entropy/error": 0.15,
            "entropy/proportional": 1.5,
            "entropy/integral_term": 0.0002,
            "entropy/alpha": 1.0,
            "entropy/coefficient": 0.0,
            "entropy/alpha_unclipped": 1.5002,
            "entropy/integral": 0.02,
        }
    )


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"target": -1.0}, "target"),
        ({"kp": -0.1}, "kp"),
        ({"ki": float("inf")}, "ki"),
        ({"anti_windup": "sometimes"}, "anti_windup"),
        ({"integral_limit": 0.0}, "integral_limit"),
        ({"integral_leak": 1.0}, "integral_leak"),
        ({"dead_band": -0.1}, "dead_band"),
    ],
)
def test_bad_settings_are_refused(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntropyController(**{"target": 0.1, "kp": 1.0, "ki": 0.0, **settings_})


@pytest.mark.parametrize(("entropy_sum", "tokens"), [(0.0, 0), (float("nan"), 10), (float("inf"), 10)])
def test_no_measurement_is_an_error(entropy_sum: float, tokens: int) -> None:
    controller = EntropyController(0.1, 1, 0.1)
    with pytest.raises(ValueError, match="entropy control"):
        controller.observe(entropy_sum, tokens)
    assert controller.state_dict() == EntropyController(0.1, 1, 0.1).state_dict()


def test_commit_needs_an_observation() -> None:
    controller = EntropyController(0.1, 1, 0.1)
    with pytest.raises(AssertionError):
        controller.commit(stepped=True, has_advantage=True)


def test_target_zero_is_a_target() -> None:
    assert run(EntropyController(0.0, 2, 0), [0.2]) == pytest.approx([0.4])


def test_from_config() -> None:
    section = EntropyControlConfig(
        controller="pi", target=0.2, kp=3, ki=0.002, integral_limit=20, integral_leak=0.01, dead_band=0.02
    )
    controller = build_controller(section)
    assert isinstance(controller, EntropyController)
    assert (controller.target, controller.kp, controller.ki) == (0.2, 3, 0.002)
    assert (controller.rule.anti_windup, controller.rule.limit) == ("conditional", 20)
    assert (controller.rule.leak, controller.dead_band) == (0.01, 0.02)
    assert build_controller(EntropyControlConfig(controller="p")).ki == 0
    assert MicrobatchLocalController.from_config(EntropyControlConfig(controller="p")).ki == 0
    with pytest.raises(ValueError, match="off"):
        build_controller(EntropyControlConfig(controller="off"))
    for refused in ({"controller": "off"}, {"controller": "aec"}, {"target": "0.5x"}):
        with pytest.raises(ValueError, match="fixed target"):
            MicrobatchLocalController.from_config(EntropyControlConfig(**refused))


def test_microbatch_local_reproduces_the_published_arithmetic() -> None:
    """The published formulas by hand: K = (1, 0.01), target 0.1, a mini-batch of 8 sequences as 2, 4, 2."""
    controller = MicrobatchLocalController(0.1, 1, 0.01)
    given = [(0.30, 2), (0.50, 4), (0.05, 2), (1.40, 8)]
    alphas = [controller.step(entropy, n, 8) for entropy, n in given]
    acc = [0.0, 0.2 * 2 / 8, 0.05 + 0.4 * 4 / 8, 0.25 - 0.05 * 2 / 8]
    assert acc == pytest.approx([0, 0.05, 0.25, 0.2375])
    assert alphas == pytest.approx([0.2, 0.4005, -0.0475, 1.0])
    assert controller.alpha_unclipped == pytest.approx(1.3 + 0.01 * 0.2375)
    assert controller.integral == pytest.approx(0.2375 + 1.3), "no anti-windup there"
    assert controller.microbatches == 4


def test_microbatch_local_depends_on_packing() -> None:
    """The defect that EntropyController does not have, kept on purpose."""
    together = MicrobatchLocalController(0.1, 1, 1)
    apart = MicrobatchLocalController(0.1, 1, 1)
    together.step((10 * 0.2 + 30 * 0.6) / 40, 2, 2)
    apart.step(0.2, 1, 2)
    apart.step(0.6, 1, 2)
    assert together.integral == pytest.approx(0.4)
    assert apart.integral == pytest.approx(0.3)


def test_microbatch_local_resumes() -> None:
    source = random.Random(0)
    given = [(source.random(), source.randint(1, 4)) for _ in range(20)]
    whole, first, second = (MicrobatchLocalController(0.3, 1, 0.1) for _ in range(3))
    expected = [whole.step(entropy, n, 4) for entropy, n in given]
    begun = [first.step(entropy, n, 4) for entropy, n in given[:7]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [second.step(entropy, n, 4) for entropy, n in given[7:]] == expected
    with pytest.raises(ValueError, match="not finite"):
        second.step(float("nan"), 1, 4)


def test_a_checkpoint_file_keeps_every_bit(tmp_path: Path) -> None:
    controller = EntropyController(0.1, 3, 0.07)
    run(controller, [0.1 + 1 / 3, 0.2, 0.123456789])
    path = tmp_path / "controller.json"
    path.write_text(json.dumps(controller.state_dict()))
    assert json.loads(path.read_text()) == controller.state_dict()


def test_to_reinforce_a_token_above_one_half_never_raises_entropy() -> None:
    """docs/algorithm.md, "Why it acts on entropy": by autograd on random distributions, tau = 1/2 as the edge."""
    generator = torch.Generator().manual_seed(0)
    seen_below = False
    for _ in range(400):
        logits = (
            (4 * torch.rand(1, generator=generator) * torch.randn(6, generator=generator)).double().requires_grad_()
        )
        p = logits.softmax(0)
        (slope,) = torch.autograd.grad(-(p * p.log()).sum(), logits)
        for token in range(6):
            step = torch.nn.functional.one_hot(torch.tensor(token), 6) - p.detach()
            change = float(slope @ step)
            assert p[token] <= 0.5 or change <= 1e-12
            seen_below |= p[token] < 0.5 and change > 1e-3
    assert seen_below, "below one half both signs occur"
