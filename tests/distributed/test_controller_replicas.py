"""Entropy control as ranks run it: one alpha for all, refusals that leave no trace, the published code's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_sequences, write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "controller_replicas.py"
LAYOUTS = ("tp2", "pp2", "dp2")
KP, KI, TARGET = 0.1, 0.03, 4.0


@pytest.fixture(scope="module")
def ranks(run_ranks_once, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank reported; one launch serves all tests here."""
    directory = tmp_path_factory.mktemp("controller")
    model = write_tiny_model("qwen3", directory / "model")
    generator = torch.Generator().manual_seed(23)
    fields = [
        {
            "tokens": tokens,
            "prompt_length": prompt,
            "advantages": torch.randn(len(tokens) - prompt, generator=generator),
            "old_logprobs": -5.0 + 0.3 * torch.randn(len(tokens) - prompt, generator=generator),
        }
        for tokens, prompt in random_sequences()
    ]
    torch.save(fields, directory / "sequences.pt")
    outputs = run_ranks_once(SCRIPT, 2, model, directory / "sequences.pt", timeout_s=540)
    return [json.loads(output) for output in outputs]


def _number(text: str) -> float:
    return float.fromhex(text)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("feedback", ["score_pass", "previous_step"])
def test_alpha_is_the_same_on_every_rank_and_follows_the_law(ranks, layout, feedback):
    first, second = (report[f"{layout}/{feedback}"] for report in ranks)
    assert first == second
    integral = 0.0
    for step in first:
        error = _number(step["entropy/mean"]) - TARGET
        assert _number(step["entropy/alpha"]) == pytest.approx(KP * error + KI * integral, rel=1e-12)
        integral += error
        assert _number(step["entropy/integral"]) == pytest.approx(integral, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_feedback_says_which_entropy_is_used(ranks, layout):
    scored = [step["entropy/mean"] for step in ranks[0][f"{layout}/score_pass"]]
    assert len(set(scored)) == 1, "one scoring pass, so one measurement"
    previous = [_number(step["entropy/mean"]) for step in ranks[0][f"{layout}/previous_step"]]
    # Step 1 uses the scoring pass; step 2 what step 1 measured before it moved, the same weights again.
    assert previous[0] == _number(scored[0])
    assert previous[1] == pytest.approx(previous[0], rel=1e-6)
    assert abs(previous[2] - previous[1]) > 1e-4


def test_layouts_measure_the_same_entropy(ranks):
    means = [_number(ranks[0][f"{layout}/score_pass"][0]["entropy/mean"]) for layout in LAYOUTS]
    assert means == pytest.approx([means[0]] * len(LAYOUTS), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refused_step_leaves_no_trace(ranks, layout):
    for report in ranks:
        outcome = report[f"{layout}/refused"]
        assert outcome["refused"] == 1.0
        assert outcome["untouched"], "parameters, Adam state or schedule moved in a refused step"
        assert outcome["integral held"]
        assert outcome["next refused"] == 0.0
        assert outcome["next moved"], "the digest does not notice steps"
    assert ranks[0][f"{layout}/refused"]["next"] == ranks[1][f"{layout}/refused"]["next"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_any_advantage_the_integral_stands_still(ranks, layout):
    before = _number(ranks[0][f"{layout}/refused"]["next"]["entropy/integral"])
    step = ranks[0][f"{layout}/no advantage"]
    assert _number(step["entropy/integral"]) == before
    assert _number(step["entropy/nonzero_advantage_fraction"]) == 0.0
    assert _number(step["loss/policy"]) == 0.0
    assert _number(step["loss/entropic"]) == 0.0


def test_a_replica_without_sequences_takes_part(ranks):
    assert sorted(report["dp2/lonely"]["sequences"] for report in ranks) == [0, 1]
    assert ranks[0]["dp2/lonely"]["metrics"] == ranks[1]["dp2/lonely"]["metrics"]
    with_all, alone = (ranks[0][f"{layout}/lonely"]["metrics"] for layout in ("tp2", "dp2"))
    for name in ("loss/policy", "grad_norm", "entropy/mean", "entropy/alpha", "response/tokens"):
        assert _number(alone[name]) == pytest.approx(_number(with_all[name]), rel=1e-5), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replica_led_astray_is_noticed_by_all_and_named(ranks, layout):
    for report in ranks:
        assert "ranks [1] differ from rank 0" in report[f"{layout}/astray"]
        assert "acc by rank" in report[f"{layout}/astray"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_off_is_the_base_loss_bit_for_bit_and_computes_no_entropy(ranks, layout):
    for report in ranks:
        assert report[f"{layout}/off"] == {
            "same loss": True,
            "same gradients": True,
            "entropy computed": False,
            "entropy reported": True,
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_keeps_the_starting_weights(ranks, layout):
    reports = [report[f"{layout}/reference"] for report in ranks if report[f"{layout}/reference"]]
    assert len(reports) == (2 if layout == "dp2" else 1), "one rank of each replica has the scores"
    assert all(outcome for report in reports for outcome in report.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_microbatch_local_is_the_published_arithmetic(ranks, layout):
    alphas, integrals = [], []
    for report in ranks:
        local = report[f"{layout}/local"]
        if not local["is last stage"]:
            assert local["applied"] == []
            continue
        integral = 0.0
        assert len(local["applied"]) > 2, "one micro-batch a step: its weights were not tested"
        for entropy, n_sequences, minibatch_sequences, alpha in local["applied"]:
            assert minibatch_sequences == local["sequences"]
            assert alpha == pytest.approx(max(-1, min(1, KP * (entropy - TARGET) + KI * integral)), rel=1e-12)
            integral += (entropy - TARGET) * n_sequences / minibatch_sequences
        assert sum(n for _, n, _, _ in local["applied"]) == 2 * local["sequences"]
        assert local["integral"] == pytest.approx(integral, rel=1e-12)
        if layout == "dp2" or not alphas:
            alphas.append([alpha for *_, alpha in local["applied"]])
            integrals.append(integral)
    assert ranks[0][f"{layout}/local"]["metrics"] == ranks[1][f"{layout}/local"]["metrics"]
    if layout == "dp2":
        assert alphas[0] != alphas[1], "each rank has its own alpha"
    reported = _number(ranks[0][f"{layout}/local"]["metrics"][0]["entropy/alpha"])
    first_step = [alpha for own in alphas for alpha in own[: len(own) // 2]]
    assert reported == pytest.approx(sum(first_step) / len(first_step), rel=1e-9)
