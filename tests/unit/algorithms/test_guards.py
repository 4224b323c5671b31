"""Guards and sources of alpha: a ceiling that costs nothing within it, an anchor that follows the data, cascades."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from steered_runs import TOKENS, controller, run

from megatron_entropic.algorithms.entropy_control import (
    GUARDS,
    Controller,
    EntropyController,
    PromptAlpha,
)
from megatron_entropic.algorithms.entropy_control.guards import Anchor
from megatron_entropic.errors import UserError

FLAT = [0.5] * 8
GUARD_NAMES = list(GUARDS)


def alphas(subject: Controller, entropies: list[float]) -> list[float]:
    return [steering.alpha for steering in run(subject, entropies)]


def constant(alpha: float, **section: Any) -> Controller:
    return controller(controller="constant", rivals={"alpha": alpha}, **section)


@pytest.mark.parametrize("guard", GUARD_NAMES)
def test_within_its_limits_a_guard_changes_nothing(guard: str) -> None:
    entropies = [0.5, 0.49, 0.51, 0.5, 0.5, 0.45, 0.48, 0.52]
    assert run(constant(-0.7, guard=guard), entropies) == run(constant(-0.7), entropies)
    section = {"controller": "pi", "target": 0.5, "kp": 2.0, "ki": 0.1}
    assert run(controller(**section, guard=guard), entropies) == run(controller(**section), entropies)


def test_a_ceiling_takes_alpha_back_to_zero_and_no_further() -> None:
    rising = [*FLAT, *(0.5 + 0.03 * n for n in range(1, 12))]
    found = alphas(constant(-1.0, guard="ceiling"), rising)
    assert found[:8] == [-1.0] * 8
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] == 0.0
    assert alphas(constant(0.4, guard="ceiling"), rising) == [0.4] * len(rising), "it lowers entropy already"


def test_a_ceiling_by_hand() -> None:
    """top 1, k 10, k_i 0.5: x = 1 for five steps, then .8 + .2 * 1.2 = 1.04, then .8 * 1.04 + .2 * 1.2 = 1.072.

    u = 10 * .04 = .4, then 10 * .072 + .5 * .04 = .74.
    """
    subject = constant(-1.0, guard="ceiling", guards={"top": 1.0})
    assert alphas(subject, [0.5] * 5 + [0.6, 0.6])[5:] == pytest.approx([-0.6, -0.26])
    assert subject.metrics()["entropy/relative"] == pytest.approx(1.072)
    assert subject.metrics()["entropy/band_action"] == pytest.approx(0.74)
    assert subject.metrics()["entropy/alpha"] == pytest.approx(-0.26)


def test_the_ceilings_integral_has_a_limit_and_goes_back() -> None:
    subject = constant(-1.0, guard="ceiling", guards={"top": 1.0, "gain": 0.0, "integral_gain": 1.0, "jump": 0.9})
    assert alphas(subject, [0.5] * 5 + [0.65] * 200)[-1] == 0.0
    assert subject.state_dict()["guard_integral"] == 1.5
    back = alphas(subject, [0.35] * 60)
    assert back[-1] == -1.0


def test_a_band_also_lowers_alpha_below_its_bottom() -> None:
    falling = [*FLAT, 0.35, 0.25, 0.2, 0.15, 0.12, *[0.1] * 20]
    found = alphas(constant(0.0, guard="band", guards={"jump": 0.9}), falling)
    assert found[:10] == [0.0] * 10
    assert found[-1] == -1.0


def test_new_and_harder_prompts_are_no_reason_to_lower_entropy() -> None:
    """What was seen: prompts of another kind double H in one step, and alpha stays at +1 to the end of the run."""
    entropies = [0.43] * 10 + [0.87] * 30
    section = {"controller": "pi", "target": "1.2x", "kp": 5.0, "ki": 0.05}
    stale = alphas(controller(**section), entropies)
    assert stale[-30:] == [1.0] * 30
    anchored = alphas(controller(**section, reanchor="detected"), entropies)
    assert anchored[:10] == stale[:10]
    assert max(anchored) < 0
    guarded = alphas(constant(-1.0, guard="ceiling"), entropies)
    assert guarded == [-1.0] * 40


def test_an_anchor_keeps_its_ratio_over_a_jump() -> None:
    anchor = Anchor()
    for entropy in (0.5, 0.52, 0.48, 0.5, 0.5, 0.45, 0.42):
        anchor = anchor.after(entropy, jump=0.35)
    moved = anchor.after(2 * anchor.smoothed, jump=0.35)
    assert moved.relative == pytest.approx(anchor.relative)
    assert moved.entropy == pytest.approx(2 * anchor.entropy)
    assert anchor.after(1.1 * anchor.smoothed, jump=0.35).entropy == anchor.entropy
    assert Anchor().after(0.0, jump=0.35).relative == 1.0, "no entropy, nothing to compare with"


def test_a_jump_that_the_policy_made_is_not_put_down_to_the_data_where_it_is_measured() -> None:
    """H goes from 0.5 to 0.9 in one step. Scored again after the step, the same responses say whose doing it was."""
    section = {"controller": "p", "target": "0.8x", "kp": 1.0, "reanchor": "measured"}

    def target_after(again: float) -> float:
        subject = controller(**section)
        assert subject.measures_again
        run(subject, [0.5] * 8)
        subject.measured_again(again)
        subject.observe(0.9 * TOKENS, TOKENS)
        return subject.target

    assert target_after(0.88) == pytest.approx(0.8 * 0.5), "the policy's: the target stays"
    assert target_after(0.5) == pytest.approx(0.8 * 0.9), "the data's: the target follows"
    assert not controller(**{**section, "reanchor": "detected"}).measures_again


def test_unsolved_retires_as_prompts_are_solved() -> None:
    subject = controller(controller="unsolved", denominator="high_prob_tokens")
    (steering,) = run(subject, [0.5])
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert steering.alphas(shares).tolist() == [-1.5, -1.5, -1.0, -0.5, 0.0]
    assert controller(controller="unsolved").observe(1, 1).prompt_alpha == PromptAlpha(2.0, 1.0, -1.0, 0.0)


def test_a_ceiling_over_unsolved_is_the_tighter_one_and_lifts_every_prompt() -> None:
    subject = controller(controller="unsolved", guard="ceiling", denominator="high_prob_tokens")
    *_, last = run(subject, [0.5] * 5 + [0.6])
    assert last.alpha == pytest.approx(0.4)
    assert last.alphas(torch.tensor([0.0, 0.5, 0.9])).tolist() == pytest.approx([-1.1, -0.6, 0.0])


def test_a_cascade_moves_tau_with_the_error_and_never_alpha() -> None:
    subject = controller(controller="cascade", target=0.5, tau=0.8)
    steerings = run(subject, [0.5, 0.6, 0.4, 0.5])
    assert {steering.alpha for steering in steerings} == {-1.0}
    assert [steering.tau for steering in steerings] == pytest.approx([0.8, 0.8 + 0.5 * 0.2, 0.8 - 0.1 + 0.002, 0.8])
    far = run(subject, [3.0] * 100)
    assert far[-1].tau == 0.98
    assert abs(subject.state_dict()["acc"]) < 1e-9, "the sum stands still while tau is at its bound"


SUBJECTS = [
    {"controller": source, "guard": guard, "reanchor": reanchor}
    for source in ("constant", "pi", "unsolved", "cascade")
    for guard in ("off", *GUARD_NAMES)
    for reanchor in ("off", "detected", "measured")
]


@pytest.mark.parametrize("section", SUBJECTS, ids=lambda section: "-".join(section.values()))
def test_every_composition_resumes_bit_for_bit_and_stands_still_in_refused_steps(section: dict[str, Any]) -> None:
    section = {**section, "target": "0.9x", "ki": 0.3, "rivals": {"alpha": -0.9}}
    entropies = [0.5, 0.52, 0.5, 0.47, 0.5, 0.6, 0.66, 1.2, 1.3, 1.4, 0.3, 0.28, 0.3]
    for cut in (3, 7, 9):
        whole, first, second = (controller(**section) for _ in range(3))
        expected = run(whole, entropies)
        begun = run(first, entropies[:cut])
        first.observe(3.0 * TOKENS, TOKENS)
        first.commit(stepped=False, has_advantage=True)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + run(second, entropies[cut:]) == expected
        assert second.kind == whole.kind
        assert second.step == whole.step == len(entropies)
        assert all(isinstance(value, float) for value in second.metrics().values())


def test_a_controller_without_guard_is_the_bare_one() -> None:
    assert isinstance(controller(controller="pi"), EntropyController)
    assert controller(controller="pi").kind != controller(controller="pi", guard="ceiling").kind


def test_a_guard_of_ones_own_is_named_as_module_and_class() -> None:
    name = "megatron_entropic.algorithms.entropy_control.guards:Ceiling"
    subject = constant(-1.0, guard=name, guards={"top": 1.0, "gain": 10.0, "integral_gain": 0.5})
    assert alphas(subject, [0.5] * 5 + [0.6, 0.6])[5:] == pytest.approx([-0.6, -0.26])
    with pytest.raises(UserError, match=r"is no subclass of .*Guard"):
        constant(-1.0, guard="megatron_entropic.algorithms.entropy_control.guards:Anchor")
    with pytest.raises(UserError, match="did you mean ceiling"):
        constant(-1.0, guard="celing")
