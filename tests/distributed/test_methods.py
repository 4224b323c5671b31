"""Every loss, controller and correction trains under tensor parallelism, and no layout changes what it does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_sequences, transformers_statistics, write_tiny_model

from megatron_entropic.algorithms import POLICY_LOSSES
from megatron_entropic.algorithms.entropy_control import CONTROLLERS

SCRIPT = Path(__file__).parent / "scripts" / "methods.py"
TOLERANCE = 2e-5
"""Relative, of gradients that two layouts compute in float32."""
LATER_TOLERANCE = 2e-3
"""Of what optimizer steps made of those differences."""
OFF = {"controller": "off"}


def _cases(entropy: float, tau: float) -> dict[str, dict[str, Any]]:
    """Sections of the configuration for each method, set so that the method has something to do."""
    above, below = 1.5 * entropy, 0.5 * entropy
    options = {"covariance_fraction": 0.1, "clip_cov_low": 0.0, "clip_cov_high": 1e6}
    cases: dict[str, dict[str, Any]] = {
        name: {"algorithm": {"policy_loss": name, "loss_options": options}, "entropy_control": OFF}
        for name in POLICY_LOSSES
    }
    cases["gspo"]["algorithm"]["aggregation"] = "seq-mean-token-mean"
    control: dict[str, dict[str, Any]] = {
        "p": {"kp": 0.1, "target": "0.8x", "target_schedule": {"kind": "cosine", "end": 0.1, "steps": 2}},
        "pi": {"kp": 0.1, "ki": 0.05, "target": below, "gain_schedule": {"kind": "linear", "end": 0.5, "steps": 2}},
        "constant": {"rivals": {"alpha": -0.7}},
        "unsolved": {"denominator": "high_prob_tokens"},
        "cascade": {"target": "0.9x", "rivals": {"cascade_tau": [0.5 * tau, 0.9], "cascade_kp": tau}},
        "probe": {"rivals": {"probe_amplitude": 0.4, "probe_half_period": 1}},
        "entropy_bonus": {"rivals": {"bonus": 0.3}},
        "aec": {"target": above, "rivals": {"aec_step": 0.2, "aec_limit": 0.3}},
        "entrocraft": {"rivals": {"entrocraft_upper": [below, below], "entrocraft_lower": [0.1, 0.1]}},
        "dmmpt": {"target": above, "rivals": {"dmmpt_probability": tau}},
        "repo_r": {"target": above, "rivals": {"repo_zeta": 0.2}},
        "adapo": {"target": above, "rivals": {"adapo_clip": 0.1}},
        "aer": {"target": above, "rivals": {"aer_eta": 0.2, "aer_limit": 1.0}},
        "fade": {},
    }
    cases |= {
        name: {"entropy_control": {"controller": name, "tau": tau, **section}} for name, section in control.items()
    }
    cases["pi measured again"] = {
        "entropy_control": {**cases["pi"]["entropy_control"], "target": "0.5x", "reanchor": "measured"}
    }
    # A low top, so that the ceiling has something to take back, and a limit that some weights exceed.
    cases["unsolved guarded"] = {
        "entropy_control": {
            "controller": "unsolved", "tau": tau, "guard": "ceiling", "guards": {"top": 0.98}, "weight_limit": 0.3
        }
    }  # fmt: skip
    for head in ("logits", "recompute"):
        cases[f"entropy_bonus {head}"] = {**cases["entropy_bonus"], "policy": {"output_head": head}}
    for method, level in (("tis", "sequence"), ("mis", "token")):
        rollout = {"importance_correction": method, "importance_level": level, "importance_cap": 1.3}
        cases[f"{method} {level}"] = {"rollout": rollout, "entropy_control": OFF}
    return cases


@pytest.fixture(scope="module")
def trained(run_ranks_once, tmp_path_factory) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    directory = tmp_path_factory.mktemp("methods")
    write_tiny_model("qwen3", directory / "model")
    sequences = random_sequences()
    generator = torch.Generator().manual_seed(23)
    statistics = transformers_statistics(directory / "model", sequences, 1.0)
    batch = []
    for (tokens, prompt), (logprobs, _) in zip(sequences, statistics, strict=True):
        noise = [torch.randn(logprobs.shape, generator=generator) for _ in range(2)]
        batch.append(
            {
                "tokens": torch.tensor(tokens),
                "prompt_length": prompt,
                "advantages": torch.randn(1, generator=generator).expand(len(logprobs)).clone(),
                "old_logprobs": (logprobs + 0.4 * noise[0]).float(),
                "rollout_logprobs": (logprobs + 0.4 * noise[1]).float(),
                "success": len(batch) % 5 / 4,
            }
        )
    torch.save(batch, directory / "sequences.pt")
    entropy = float(torch.cat([entropies for _, entropies in statistics]).mean())
    probabilities = torch.cat([logprobs for logprobs, _ in statistics]).exp().sort().values
    middle = len(probabilities) // 2
    tau = float((probabilities[middle] * probabilities[middle + 1]).sqrt())
    cases = _cases(entropy, tau)
    (directory / "cases.json").write_text(json.dumps(cases))
    saved = directory / "saved.pt"
    outputs = run_ranks_once(SCRIPT, 2, directory, saved, timeout_s=540)
    return [json.loads(output) for output in outputs], torch.load(saved), list(cases)


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of a parameter's gradient."""
    assert set(found) == set(expected)
    return max(float((found[k].double() - v.double()).norm() / v.double().norm()) for k, v in expected.items())


def test_all_methods_are_here(trained) -> None:
    assert set(trained[2]) >= {*POLICY_LOSSES, *CONTROLLERS}


def test_gradients_do_not_depend_on_the_layout(trained) -> None:
    _, gradients, cases = trained
    for case in cases:
        distance = _distance(gradients[f"dp2/{case}"], gradients[f"tp2/{case}"])
        assert distance < TOLERANCE, f"{case}: gradients are {distance:.1e} of their norm apart"


def test_each_method_does_something_of_its_own(trained) -> None:
    _, gradients, cases = trained
    first_step_is_base = ("aec", "aer")  # their coefficients start at 0
    for case in set(cases) - {"clipped", *first_step_is_base}:
        distance = _distance(gradients[f"tp2/{case}"], gradients["tp2/clipped"])
        assert distance > 100 * TOLERANCE, f"{case} is the clipped loss: nothing was tested"


def test_all_output_heads_differentiate_the_entropy(trained) -> None:
    _, gradients, _ = trained
    for head in ("logits", "recompute"):
        assert _distance(gradients[f"tp2/entropy_bonus {head}"], gradients["tp2/entropy_bonus"]) < TOLERANCE


def test_every_method_trains_a_few_steps_and_ranks_agree(trained) -> None:
    reports, _, cases = trained
    for case in cases:
        traces = {}
        for layout in ("tp2", "dp2"):
            first, second = (report[f"{layout}/{case}"] for report in reports)
            assert first["trace"] == second["trace"], f"{layout}/{case}: ranks report different metrics"
            assert first["moved"] > 1e-4, f"{layout}/{case} did not move"
            traces[layout] = [{k: float.fromhex(v) for k, v in step.items()} for step in first["trace"]]
        for step, (one, other) in enumerate(zip(traces["tp2"], traces["dp2"], strict=True)):
            assert one["optimizer/skipped"] == 0.0
            assert all(math.isfinite(value) for value in one.values())
            for key in ("grad_norm", "loss/policy", "loss/entropic", "loss/entropy", "entropy/kept_fraction"):
                close = pytest.approx(one[key], rel=LATER_TOLERANCE, abs=1e-4)
                assert other[key] == close, (case, step, key)


def test_methods_show_in_their_metrics(trained) -> None:
    def last(case: str) -> dict[str, float]:
        return {k: float.fromhex(v) for k, v in trained[0][0][f"tp2/{case}"]["trace"][-1].items()}

    assert last("aec")["entropy/coefficient"] == pytest.approx(0.3)
    assert last("aec")["loss/entropy"] < 0
    assert last("aer")["loss/entropy"] < 0
    assert last("repo_r")["entropy/zeta"] == pytest.approx(1.0), "0.2, 0.4, 0.8, and its limit"
    assert last("adapo")["entropy/clip_high"] == pytest.approx(0.1 * 1.1**3)
    assert last("fade")["entropy/explore"] > 0
    assert last("constant")["entropy/alpha"] == -0.7
    assert -1.5 <= last("unsolved")["entropy/alpha_p10"] < last("unsolved")["entropy/alpha"] < 0
    assert last("unsolved")["entropy/alpha_p90"] == 0.0
    assert last("unsolved")["entropy/weight_max"] > 2.0
    assert last("unsolved")["entropy/negative_weight_fraction"] > 0
    assert last("unsolved guarded")["entropy/weight_max"] <= 1.3
    assert last("unsolved guarded")["entropy/negative_weight_fraction"] == 0
    assert last("unsolved guarded")["entropy/band_action"] > 0
    assert last("cascade")["entropy/alpha"] == -1.0
    assert 0 < last("entrocraft")["entropy/kept_fraction"] < 1
    assert 0 < last("dmmpt")["entropy/kept_fraction"] < 1
    assert last("clipped")["entropy/kept_fraction"] == 1.0
    assert 0 < last("pi")["entropy/actuated_fraction"] <= last("pi")["entropy/high_prob_fraction"]
    assert last("p")["entropy/target"] < 0.8 * last("p")["entropy/mean"]
