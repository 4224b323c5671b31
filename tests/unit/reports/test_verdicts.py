"""Verdicts name what is wrong and the knob to turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.reports.advice import saturated_steps, verdicts
from megatron_entropic.reports.run import Run, summarise


def run(entropies: list[float], controller: str = "pi", target: float = 0.5, **columns: Any) -> Run:
    alphas = columns.pop("alpha", [0.0] * len(entropies))
    rows = [
        {"step": k, "entropy/mean": h, "entropy/target": target, "entropy/alpha": a}
        | {f"entropy/{name}": value for name, value in columns.items() if "/" not in name}
        for k, (h, a) in enumerate(zip(entropies, alphas, strict=True), start=1)
    ]
    return Run(Path("."), "run", rows, {"entropy_control": {"controller": controller}}, "", [])


def only(subject: Run) -> tuple[str, str]:
    (verdict,) = verdicts(subject)
    return verdict.tone, verdict.text


def test_saturated_alpha() -> None:
    tone, text = only(run([0.3] * 50, alpha=[0.5] * 10 + [-1.0] * 40))
    assert tone == "warn"
    assert text == (
        "alpha has been saturated at -1 for 40 steps and entropy is 0.2 nats below its target: lower the target or tau"
    )
    assert "raise the target or lower tau" in only(run([0.9] * 50, alpha=[1.0] * 50))[1]
    assert "wound up" in only(run([0.4] * 50, alpha=[1.0] * 50))[1]
    assert "nothing in reserve" in only(run([0.49] * 50, alpha=[-1.0] * 50))[1]


def test_a_target_that_new_data_made_stale() -> None:
    shifted = run([0.43] * 20 + [0.87] * 30, alpha=[0.2] * 20 + [1.0] * 30)
    tone, text = only(shifted)
    assert tone == "warn"
    assert "entropy jumped from 0.43 to 0.87 nats with the data and alpha has been at +1 for 30 steps since" in text
    assert "the target is stale" in text
    assert "reanchor=detected" in text
    follows = replace(shifted, config={"entropy_control": {"controller": "pi", "reanchor": "detected"}})
    assert "stale" not in only(follows)[1]
    drifted = [0.43 + 0.01 * k for k in range(50)]
    assert "stale" not in only(run(drifted, alpha=[0.2] * 20 + [1.0] * 30))[1]


def test_streaks_end_at_the_other_limit() -> None:
    assert saturated_steps([-1.0, -1.0, 1.0, 1.0, 1.0]) == 3
    assert saturated_steps([1.0, 0.9]) == 0
    assert saturated_steps([]) == 0


def test_on_target() -> None:
    assert only(run([0.51, 0.49] * 20)) == (
        "good", "entropy is within 10% of its target, and alpha is not at its limit",
    )  # fmt: skip


@pytest.mark.parametrize(("controller", "words"), [("p", "P alone leaves an offset"), ("pi", "give the integral time")])
def test_off_target(controller: str, words: str) -> None:
    tone, text = only(run([0.4] * 40, controller=controller))
    assert tone == "warn"
    assert "0.1 nats below" in text
    assert words in text


def test_swinging() -> None:
    assert "lower K_p" in only(run([0.3, 0.7] * 20))[1]


def test_authority() -> None:
    text = verdicts(run([0.5] * 40, actuated_fraction=0.01, nonzero_advantage_fraction=0.6))[-1].text
    assert "1.0% of the tokens" in text
    assert text.endswith("lower tau")
    text = verdicts(run([0.5] * 40, actuated_fraction=0.01, nonzero_advantage_fraction=0.1))[-1].text
    assert "change the prompts" in text


def test_without_control_and_without_entropy() -> None:
    assert "fell from 0.6 to 0.2" in only(run([0.6, 0.4, 0.2], controller="off"))[1]
    assert verdicts(run([0.6, 0.5], controller="off")) == []
    assert verdicts(run([])) == []


def test_importance_weights_that_leave_little() -> None:
    subject = run([0.5] * 40)
    for row in subject.rows:
        row["importance/effective_fraction"] = 0.2
    assert verdicts(subject)[-1].text.startswith("importance weights leave 20% of the sample")


def test_a_moving_target_is_tracked_step_by_step() -> None:
    subject = run([0.6 - 0.01 * k for k in range(20)])
    for row in subject.rows:
        row["entropy/target"] = row["entropy/mean"] - 0.002
    assert summarise(subject).tracking_error == pytest.approx(0.002)
    assert summarise(run([0.5] * 20, controller="constant", alpha=[-1.0] * 20)).saturated is None


def test_engines_that_sample_from_another_policy() -> None:
    """bfloat16 differs by hundredths of a nat; a mismatch is judged by the dtype, and only where it is comparable."""
    subject = run([0.5] * 40)
    for row in subject.rows:
        row["mismatch/logprob_abs_mean"] = 0.03
    config = subject.config

    def with_settings(**sections: dict[str, Any]) -> list[str]:
        return [found.text for found in verdicts(replace(subject, config=config | sections)) if found.tone == "warn"]

    assert with_settings(model={"dtype": "bfloat16"}) == []
    (text,) = with_settings(model={"dtype": "float32"})
    assert "differ by 0.03 nats on average (float32: usually below 1e-05)" in text
    assert with_settings(model={"dtype": "float32"}, rollout={"quantization": "fp8"}) == []
    assert with_settings(model={"dtype": "float32"}, rollout={"top_p": 0.9}) == []
