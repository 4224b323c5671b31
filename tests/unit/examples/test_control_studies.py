"""The studies of control in examples/study: their cases, and their numbers and pages on runs made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "study"))

import cases
import rows as rows_of_runs
import tracking_report
import tracking_results
from countdown_rewards import with_product
from tracking import HERE as STUDY

TINY = {
    "tasks": {
        "one": {
            "generate": "countdown",
            "config": "examples/countdown_cpu.yaml",
            "warm_start": [{"file": "warm_start", "overrides": {"warm_start.steps": 2}}],
            "common": {"entropy_control.kp": 3.0},
            "regimes": {"on_policy": {}},
        }
    },
    "cases": [
        {
            "name": "first",
            "table": "targets",
            "task": "one",
            "regimes": ["on_policy"],
            "legs": [{"steps": 4, "overrides": {"entropy_control.target": 0.5}}, {"steps": 2}],
        },
        {
            "name": "second",
            "table": "disturbances",
            "task": "one",
            "regimes": ["on_policy"],
            "after": "first",
            "legs": [{"steps": 3, "overrides": {"entropy_control.kp": 9.0}}],
        },
    ],
}


def study(*changes: tuple[int, dict[str, Any]]) -> cases.Cases:
    """TINY with other keys in some cases."""
    content = json.loads(json.dumps(TINY))
    for index, change in changes:
        content["cases"][index] |= change
    return cases.Cases.model_validate(content)


@pytest.mark.parametrize("name", ["tracking", "sensitivity", "sensitivity_real_model", "lag"])
def test_shipped_studies_can_run(name: str) -> None:
    shipped = cases.load_cases(STUDY / f"{name}.yaml")
    runs = list(shipped.runs())
    assert len({shipped.directory(run) for run in runs}) == len(runs)


def test_legs_add_steps_and_overrides_and_go_on_after_others() -> None:
    first, second = study().runs()
    assert (first.steps, second.steps) == ((4, 6), (9,))
    assert first.settings[1] == {"entropy_control.kp": 3.0, "entropy_control.target": 0.5}
    assert second.settings[0] == {"entropy_control.kp": 9.0, "entropy_control.target": 0.5}
    assert second.before == first


def test_a_run_is_kept_under_all_that_it_depends_on() -> None:
    base, other = study(), study((0, {"legs": [{"steps": 5}]}))
    for run, changed in zip(base.runs(), other.runs(), strict=True):
        assert base.directory(run) != other.directory(changed)


def test_cases_that_refer_to_nothing_are_refused_with_every_reason() -> None:
    tune = {"settling_steps": 1, "last": 1, "target_factor": 1}
    with pytest.raises(ValueError) as caught:
        study((0, {"regimes": ["no"], "legs": [{"steps": 1, "tune": tune}]}), (1, {"after": "nobody"}))
    for reason in ("no regime no", "no run before it to tune from", "after=nobody: no such case"):
        assert reason in str(caught.value)


def test_a_study_that_cannot_run_is_refused_before_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "cases.yaml"
    path.write_text(yaml.safe_dump(study((1, {"legs": [{"steps": 1, "overrides": {"no.key": 1}}]})).model_dump()))
    with pytest.raises(ValueError, match=r"second-on_policy-seed1, leg 1: .*no"):
        cases.load_cases(path)


def run_rows(
    errors: list[float], alphas: list[float], *, leg: int = 1, first: int = 1, **key: Any
) -> rows_of_runs.Results:
    """Steps of a run with the target 0.5."""
    words = {"table": "targets", "groups": "", "case": "case", "task": "one", "regime": "on_policy"}
    return [
        {
            **words, "seed": 1, "updates": 1, "setting": '{"entropy_control.kp": 10.0}', "tuned": None, "leg": leg,
            "step": step, "entropy/rollout": 0.5 + error, "entropy/mean": 0.5 + error, "entropy/target": 0.5,
            "entropy/alpha": alpha, "entropy/proportional": 0.0, "entropy/integral_term": None, "reward/mean": 0.3,
            "entropy/high_prob_fraction": 0.5, "entropy/actuated_fraction": 0.4, "time/step_s": 1.0, **key,
        }
        for step, (error, alpha) in enumerate(zip(errors, alphas, strict=True), start=first)
    ]  # fmt: skip


def test_numbers_of_tracking() -> None:
    found = tracking_results.tracking(run_rows([0.02, -0.04, 0.0, 0.06], [0.5, -1.0, 0.0, 0.5]))
    assert found.entropy == pytest.approx(0.51)
    assert found.offset == pytest.approx(0.02)
    assert found.error == pytest.approx(0.03)
    assert (found.inside, found.saturated, found.alpha, found.reward) == (0.5, 0.25, 0.0, 0.3)


def test_numbers_of_a_recovery() -> None:
    # Means of ten steps: -.2, -.2, -.2, -.15, .., -.05 (ten), -.03, -.01, .01, .01
    errors = [-0.2, -0.2, -0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]
    alphas = [-1.0, -1.0, -1.0, *[0.0] * 11]
    found = tracking_results.recovery(run_rows(errors, alphas))
    assert found.largest_error == pytest.approx(0.4)
    assert found.overshoot == pytest.approx(0.02)
    assert found.settled_after == 11
    assert found.wound_up == 0
    assert found.saturated == pytest.approx(3 / 14)
    stuck = tracking_results.recovery(run_rows([-0.2] * 5 + [0.2] * 9, [-1.0] * 14))
    assert stuck.settled_after is None
    assert stuck.wound_up == 4, "alpha still raises entropy that is above the band"


def test_the_page_has_a_table_and_a_figure_for_each_question(tmp_path: Path) -> None:
    entropies, alphas = [0.0], [-0.8 if step // 5 % 2 else 0.6 for step in range(40)]
    for alpha in alphas[:-1]:
        entropies.append(entropies[-1] - 0.002 - 0.01 * alpha)
    tuned = {
        "asked_steps": 50,
        "plant": {"gain": 0.01, "gain_error": 0.001, "drift": -0.002},
        "proposal": {"kp": 8.0, "ki": 0.2, "initial_alpha": -0.2, "settling_steps": 60.0},
    }
    still, zero = [0.001] * 20, [0.01] * 20
    rows = [
        *run_rows(still, zero),
        *run_rows(still, zero, table="disturbances", leg=0),
        *run_rows([-0.1, *still], [-1.0, *zero], table="disturbances", first=21),
        *run_rows([0.0] * 8, [-0.3] * 8, table="offset", leg=0),
        *run_rows(entropies, alphas, table="offset", first=9),
        *run_rows([-0.02] * 20, [-0.2] * 20, table="offset", first=49, leg=2),
        *run_rows(entropies, alphas, table="tuning"),
        *run_rows([-0.1, *still], [-1.0, *zero], table="tuning", first=41, leg=2, tuned=json.dumps(tuned)),
        *run_rows(still, zero, table="sensitivity", groups="tau, denominator"),
        *run_rows(still, zero, table="sensitivity", groups="tau, denominator", seed=2),
    ]
    tracking_results.write_results(tmp_path / "results.parquet", rows)
    assert rows_of_runs.load_results(tmp_path / "results.parquet") == rows
    lines = tracking_report.write_tracking_report(rows, tmp_path / "report").read_text(encoding="utf-8").splitlines()
    pm = "\u00b1"
    assert "| case | on_policy | 0.50 | 0.501 | 0.2% | 0.001 | 100% | +0.01 | 0% |" in lines
    # The mean with the first error of -0.1 is within 5 % of 0.5 from four steps on.
    assert "| case | on_policy | 20% | 3 | 0% | 0 | 5% | 0.501 for 0.50 |" in lines
    (offset,) = (line for line in lines if "| -0.0020 |" in line or "| -0.002 |" in line if "| 10 |" in line)
    assert "| -0.020 | -0.030 | -0.020 | 0% |" in offset
    assert any(line.startswith(f"| case | on_policy | 0.01 {pm} 0.001 | -0.002 | 8 | 0.2 | -0.20 |") for line in lines)
    sensitivity = f"| case | on_policy | 2 | 0.501 {pm} 0.000 | 0.001 {pm} 0.000 | 1.00 {pm} 0.00 | 0.01 {pm} 0.00 |"
    assert sum(line.startswith(sensitivity) for line in lines) == 2
    names = ("targets", "offset", "disturbances", "tuning", "sensitivity-tau", "sensitivity-denominator")
    for name in names:
        assert (tmp_path / "report" / f"{name}-on_policy.png").stat().st_size > 5000


def test_the_other_reward_wants_a_product() -> None:
    truth = {"numbers": [2, 3, 4], "target": 10}
    assert [with_product(text, truth, {}) for text in ("2*3+4", "4+3+3", "2*3*4")] == [1.0, 0.0, 0.0]
    assert with_product("2+3+4", {"numbers": [2, 3, 4], "target": 9}, {}) == 0.0
