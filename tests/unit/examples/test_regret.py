"""The study of worst cases: its plans can run, its settings are chosen as the plan says, its regrets by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "study"))

import regret
from regret_plan import Plan, load_plan
from regret_table import PlanWords, probability_of_smaller_worst, regrets, verdict, write_page

STUDY = Path(regret.__file__).parent
CONSTANTS = ("zero", "one")


def scores(**methods: dict[str, list[float]]) -> dict[str, dict[str, dict[int, float]]]:
    """Method: condition: scores of seeds 1, 2, .."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for method, by_condition in methods.items():
        for condition, values in by_condition.items():
            found.setdefault(condition, {})[method] = dict(enumerate(values, start=1))
    return found


TABLE = scores(
    zero={"trap": [0.2, 0.2], "count": [0.3, 0.3]},
    one={"trap": [0.9, 1.0], "count": [0.0, 0.0]},
    ours={"trap": [0.8, 1.0], "count": [0.2, 0.2]},
)


def test_regret_is_to_the_best_constant_of_each_condition() -> None:
    found = regrets(TABLE, CONSTANTS)
    assert found is not None
    assert found.conditions == ("trap", "count")
    assert found.regret["zero"] == pytest.approx([0.75, 0.0])
    assert found.regret["one"] == pytest.approx([0.0, 0.3])
    assert found.regret["ours"] == pytest.approx([0.05, 0.1])
    assert found.worst["one"] == pytest.approx(0.3)
    assert set(found.worst["ours"].round(6)) == {0.1}, "its worst case is countdown, however seeds are drawn"
    assert probability_of_smaller_worst(found, "ours", CONSTANTS) == 1.0
    assert probability_of_smaller_worst(found, "zero", CONSTANTS) == 0.0, "not smaller than itself"


def test_unfinished_methods_and_conditions_do_not_enter() -> None:
    table = {condition: dict(methods) for condition, methods in TABLE.items()}
    table["count"]["ours"] = {1: 0.2}
    table["later"] = {"zero": {1: 0.5, 2: 0.5}}
    found = regrets(table, CONSTANTS)
    assert found is not None
    assert found.conditions == ("trap", "count")
    assert set(found.regret) == set(CONSTANTS)
    assert regrets({"later": table["later"]}, CONSTANTS) is None


def test_verdicts_are_those_of_the_plan() -> None:
    assert [verdict(p) for p in (0.99, 0.975, 0.8, 0.5, 0.1)] == [
        "supported", "supported", "undecided", "refuted", "refuted",
    ]  # fmt: skip


def test_the_page_says_what_is_missing(tmp_path: Path) -> None:
    pairs = (("trap", "ours", "zero"), ("count", "ours", "one"), ("trap", "absent", "zero"))
    words = PlanWords("# Title", CONSTANTS, ("ours", "absent"), (("zero", "one"),), pairs)
    page = write_page(tmp_path / "page.md", {"pass@1": TABLE, "pass@8": {}}, ["zero", "one", "ours", "absent"], words)
    text = page.read_text()
    assert "| ours | 0.900 \u00b1 0.100 (2) | 0.200 \u00b1 0.000 (2) | 0.075" in text
    assert "P(worst regret of ours < that of the best constant) = 1.000: supported" in text
    assert "- absent: not finished where the constants are" in text
    assert "P(worst regret of zero > that of one) = 1.000: supported" in text
    assert "- trap, ours minus zero: +0.700 (+0.600 to +0.800, 2 seeds): supported" in text
    assert "- trap, absent minus zero: fewer than two seeds have both" in text
    assert "No condition has two seeds of every constant yet" in text


def test_learning_curves_have_steps_as_columns(tmp_path: Path) -> None:
    rows = [
        {"condition": "two-skills", "method": method, "seed": seed, "curve": json.dumps({10: level, 20: 2 * level})}
        for method, level in (("zero", 0.1), ("ours", 0.2))
        for seed in (1, 2)
    ]
    rows.append({"condition": "trap", "method": "zero", "seed": 1, "curve": json.dumps({200: 0.5})})
    curves = regret._curves(rows)
    assert list(curves) == ["pass@1 by step, two-skills"]
    page = write_page(tmp_path / "page.md", {}, ["zero", "ours"], PlanWords("# Title", CONSTANTS), curves)
    assert "| method | 10 | 20 |" in page.read_text()
    assert "| ours | 0.200 \u00b1 0.000 | 0.400 \u00b1 0.000 |" in page.read_text()


def test_a_benchmark_that_a_task_lacks_is_no_score() -> None:
    row = {"condition": "trap", "method": "zero", "setting": 0, "pass_1 untrained": 0.25}
    rows = [{**row, "seed": 1}, {**row, "seed": 2, "pass_1 untrained": float("nan")}]
    assert regret._scores(rows, "pass_1 untrained", by_setting=False) == {"trap": {"zero": {1: 0.25}}}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(STUDY / "regret.yaml")


def test_shipped_plans_can_run(plan: Plan) -> None:
    real = load_plan(STUDY / "regret_real_model.yaml")
    tables = load_plan(STUDY / "methods_real_model.yaml")
    for shipped, report_runs in ((plan, 12 * 10), (real, 6), (tables, 2 * 8)):
        chosen = {method.name: 0 for method in shipped.methods}
        cases = shipped.cases("report", shipped.report.seeds[0], chosen)
        runs = list(cases.runs())
        assert len(runs) == report_runs
        assert len({cases.directory(run) for run in runs}) == report_runs
    shift = next(run for run in plan.cases("report", 11, {"PI": 1}).runs() if run.case.name == "shift.PI.1")
    assert [leg.train_file for leg in shift.case.legs] == ["short", "long"]
    assert shift.settings[0]["entropy_control.target_schedule.steps"] == 200
    assert shift.settings[0]["evaluation.every_steps"] == 200


def test_a_run_is_kept_under_the_same_name_whatever_else_is_run(plan: Plan) -> None:
    alone = plan.cases("report", 12, {"GRPO": 0})
    among = plan.cases("report", 12, {"GRPO": 0, "unsolved": 0})
    names = [{cases.directory(run) for run in cases.runs()} for cases in (alone, among)]
    assert names[0] < names[1]


def test_settings_are_chosen_by_mean_regret_once_all_are_judged(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = regret.RegretStudy(plan, tmp_path, None, [])  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []
    for condition in ("weak-trap", "countdown-wide"):
        for seed in (1, 2):
            for method in plan.methods:
                for setting in range(len(method.settings)):
                    better = (method.name, setting) == ("AEC", 2)
                    own = {"condition": condition, "seed": seed, "method": method.name, "setting": setting}
                    rows.append({**own, "pass_1": 0.9 if better else 0.5})
    monkeypatch.setattr(study, "_rows", lambda stage: rows)
    chosen = study.choice()
    assert chosen["AEC"] == 2
    assert chosen["PI"] == 0, "of equals the first"
    assert set(chosen) == {method.name for method in plan.methods}
    last = next(row for row in rows if row["method"] == "REPO-R" and row["setting"] == 2)
    rows.remove(last)
    assert "REPO-R" not in study.choice(), "its settings are not all judged"


def test_inconsistent_plans_are_refused(plan: Plan) -> None:
    content = plan.model_dump()
    content["constants"] = ["absent"]
    content["report"]["seeds"] = [2, 3]
    with pytest.raises(ValueError, match=r"absent: no such method.*share seeds \[2\]"):
        Plan.model_validate(content)
