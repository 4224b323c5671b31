"""The study of examples/study: its task, its grid, and its tables on numbers made by hand."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from megatron_entropic.data import TaskDataset, WarmStartPairs, load_tokenizer
from megatron_entropic.rewards import build_verifier
from megatron_entropic.training.machine import load_checked_config

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "study"))

import chain
import figures
import grid as grids
import pool
import report
import results as study_results
import rows as study_rows
from run import HERE as STUDY
from run import Study


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    assert chain.prepare(folder, seed=3, sizes=chain.Sizes(train=300, clean=2000, corrupted=2000))
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def prompt_of(row: dict[str, Any]) -> str:
    return str(row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"])


def test_operations_are_permutations() -> None:
    assert all(sorted(table) == list(range(chain.STATES)) for table in chain.OPERATIONS.values())
    problem = chain.Problem(0, "wx")
    # w takes 0 to 3, x takes 3 to 4.
    assert (problem.prompt, problem.states) == ("awx___>", [3, 4])


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("De", 1.0),
        ("Dj", 1.0),
        ("Do", 1.0),
        ("Dd", 0.0),
        ("Sde", 1.0),
        ("Saj", 1.0),
        ("Sed", 0.0),
        ("Se", 0.0),
        ("Sdee", 0.0),
        ("Dde", 0.0),
        ("Swe", 0.0),
        ("Dw", 0.0),
        ("e", 0.0),
        ("", 0.0),
    ],
)
def test_only_form_and_final_state_are_judged(response: str, reward: float) -> None:
    assert chain.verify(response, json.dumps({"state": 4, "operations": 2}), {}) == reward


def test_a_wrong_ground_truth_is_an_error() -> None:
    with pytest.raises(ValueError, match="state and operations"):
        chain.verify("De", {"answer": 4}, {})


def test_supervised_files_show_what_they_should() -> None:
    generator = random.Random(0)
    stream = chain.problems(generator)
    for supervision, stepwise, right in ((chain.CLEAN, 0.6, 1.0), (chain.CORRUPTED, 0.1, None)):
        pairs = [(p := next(stream), chain.response(p, supervision, generator)) for _ in range(4000)]
        forms = Counter(text[0] for _, text in pairs)
        assert forms[chain.STEPWISE] / 4000 == pytest.approx(stepwise, abs=0.03)
        for form in (chain.DIRECT, chain.STEPWISE):
            rewards = [
                chain.verify(text, {"state": p.states[-1], "operations": len(p.operations)}, {})
                for p, text in pairs
                if text[0] == form
            ]
            share = sum(rewards) / len(rewards)
            # A corrupted step is right by chance; after several the last state is little better than a guess.
            assert share == 1.0 if right or form == chain.DIRECT else 0.2 < share < 0.4


def test_held_out_problems_are_nowhere_else(assets: Path) -> None:
    prompts = {path.stem: {prompt_of(row) for row in rows_of(path)} for path in assets.glob("*.parquet")}
    assert sorted(prompts) == ["clean", "corrupted", "heldout", "long", "search", "short", "train"]
    for name in ("heldout", "search"):
        assert len(prompts[name]) == sum(chain.HELD_OUT.values())
        assert not prompts[name] & set().union(*(others for other, others in prompts.items() if other != name))
    other = {problem.prompt for problem in chain.held_out()["heldout"]}
    assert other == prompts["heldout"], "the same for every seed"


def test_the_trainer_reads_the_files(assets: Path) -> None:
    config = load_checked_config(
        STUDY / "chain.yaml",
        [
            f"model.hf_dir={assets}/model",
            f"data.train_files={assets}/train.parquet",
            f"evaluation.benchmarks={{heldout: {assets}/heldout.parquet}}",
        ],
    )
    tokenizer = load_tokenizer(config.model.hf_dir)
    prompts = TaskDataset(config.data, tokenizer, seed=1)
    verifier = build_verifier(config.reward.verifier)
    assert len(prompts) == 300
    assert {len(prompts[position].tokens) for position in range(300)} == {config.data.max_prompt_tokens}
    assert verifier("", prompts[0].ground_truth, prompts[0].extra_info) == 0.0  # type: ignore[arg-type]
    pairs = WarmStartPairs(assets / "clean.parquet", tokenizer, config.max_sequence_tokens)
    assert max(len(pairs[index][1]) for index in range(len(pairs))) == config.rollout.max_response_tokens
    assert tokenizer.decode(pairs[0][1], skip_special_tokens=True) == rows_of(assets / "clean.parquet")[0]["response"]


@pytest.mark.parametrize("name", ["grid", "small"])
def test_shipped_grids_can_run(name: str) -> None:
    grid = grids.load_grid(STUDY / f"{name}.yaml")
    grids.check_cells(grid, STUDY / "chain.yaml")
    cells = list(grid.cells("report"))
    assert len({cell.directory("") for cell in cells}) == len(cells)


def test_the_shipped_grid_has_the_rows_of_the_paper_and_its_rivals() -> None:
    grid = grids.load_grid(STUDY / "grid.yaml")
    assert len(grid.methods) == 9
    assert len(grid.report_seeds) >= 8
    assert {len(method.settings) for method in grid.methods} == {3}
    assert len(list(grid.cells("search"))) == 9 * 2 * 3


def grid_with(**changes: Any) -> grids.Grid:
    """Two methods with two settings each."""
    content = yaml.safe_load((STUDY / "small.yaml").read_text(encoding="utf-8"))
    content["methods"] = [
        {"name": "base", "overrides": {"entropy_control.controller": "off"}, "settings": [{}, {"train.steps": 8}]},
        {"name": "pi", "overrides": {"entropy_control.controller": "pi"}, "settings": [{}, {"train.steps": 8}]},
    ]
    return grids.Grid.model_validate(
        content | {"baseline": "base", "search_seeds": [9], "report_seeds": [1, 2]} | changes
    )


def test_unfair_grids_are_refused_with_every_reason() -> None:
    methods = [
        {"name": "base", "settings": [{}, {}]},
        {"name": "pi", "settings": [{}]},
        {"name": "pi", "settings": [{}]},
    ]
    with pytest.raises(ValueError) as caught:
        grid_with(methods=methods, baseline="none", search_seeds=[2])
    for reason in ("more than once", "same number of settings", "no such method", r"share [2]"):
        assert reason in str(caught.value)
    with pytest.raises(ValueError, match="search_seeds: needed"):
        grid_with(search_seeds=[])


def test_a_grid_that_cannot_run_is_refused_before_it_runs() -> None:
    grid = grid_with(regimes={"one": {"rollout.prompts_per_step": 0}, "two": {"train.steps": 7}})
    with pytest.raises(ValueError) as caught:
        grids.check_cells(grid, STUDY / "chain.yaml")
    assert "one, pi, setting 0: rollout.prompts_per_step" in str(caught.value)
    assert "two, base, setting 0: evaluation.every_steps must divide" in str(caught.value)


def test_later_overrides_win_and_change_the_directory() -> None:
    grid = grid_with(common={"train.steps": 4, "evaluation.every_steps": 4}, regimes={"r": {"optimizer.beta1": 0.8}})
    first, second = (cell for cell in grid.cells("search") if cell.method == "pi")
    assert (first.overrides["train.steps"], second.overrides["train.steps"]) == (4, 8)
    assert first.overrides["optimizer.beta1"] == 0.8
    assert first.directory("a") != first.directory("b")
    chosen = {("r", "base"): 1}
    assert {(cell.method, cell.setting_index, cell.seed) for cell in grid.cells("report", chosen)} == {
        ("base", 1, 1),
        ("base", 1, 2),
    }


def run_rows(
    method: str, seed: int, pass_1: float, *, stage: str = "report", setting: int = 0, controller: str = "off"
) -> study_rows.Results:
    """Four steps of a run with entropies 1.0, 0.9, 0.8, 0.7 against a target of 0.75, alpha at -1 in the first."""
    key = {"stage": stage, "regime": "on_policy", "method": method, "setting_index": setting, "setting": "{}"}
    key |= {"controller": controller, "samples": 8, "seed": seed}
    return [
        {
            **key,
            "step": step,
            "reward/mean": 0.5,
            "entropy/mean": 1.1 - 0.1 * step,
            "entropy/target": 0.75,
            "entropy/alpha": -1.0 if step == 1 else 0.25,
            "entropy/coefficient": 0.0,
            "time/step_s": 2.0,
            "pass/1": pass_1 if step == 4 else None,
            "pass/n": 0.9 if step == 4 else None,
            "stepwise": 0.25 if step == 4 else None,
        }
        for step in range(1, 5)
    ]


def test_numbers_of_a_run() -> None:
    ((key, rows),) = study_results.runs_of(run_rows("pi", 1, 0.6, controller="pi")).items()
    numbers = study_results.run_numbers(key, rows)
    assert (numbers.pass_1, numbers.pass_n, numbers.stepwise, numbers.training_s) == (0.6, 0.9, 0.25, 8.0)
    assert numbers.entropy == pytest.approx(0.85)
    assert numbers.tracking_error == pytest.approx(0.05)
    assert numbers.saturated == 0.25
    ((key, rows),) = study_results.runs_of(run_rows("base", 1, 0.6)).items()
    numbers = study_results.run_numbers(key, rows)
    assert (numbers.tracking_error, numbers.saturated) == (None, None)


def test_the_best_setting_of_a_complete_search_is_chosen() -> None:
    search = [
        row
        for seed, setting, value in ((8, 0, 0.2), (9, 0, 0.4), (8, 1, 0.1), (9, 1, 0.9))
        for row in run_rows("pi", seed, value, stage="search", setting=setting)
    ]
    assert study_results.chosen_settings(search, runs_per_method=4) == {("on_policy", "pi"): 1}
    assert study_results.chosen_settings(search, runs_per_method=5) == {}


def test_paired_differences() -> None:
    first, second = {1: 0.5, 2: 0.6, 3: 0.9}, {1: 0.7, 2: 0.8, 4: 0.0}
    found = report.paired(first, second)
    assert found is not None
    assert (found.seeds, found.difference) == (2, pytest.approx(0.2))
    assert found.low == pytest.approx(0.2)
    assert found.high == pytest.approx(0.2)
    assert found.p_value == pytest.approx(0.5, abs=0.02), "two of four assignments of signs reach the sum"
    assert report.paired({1: 0.5}, {1: 0.7}) is None


def test_mean_and_error() -> None:
    assert report.mean_and_error([0.5, 0.7]) == "0.600 \u00b1 0.100"
    assert report.mean_and_error([0.5]) == "0.500"
    assert report.mean_and_error([]) == "-"


def test_the_page_has_the_numbers(tmp_path: Path) -> None:
    rows = [
        row
        for seed, (base, pi) in enumerate(((0.5, 0.7), (0.6, 0.8)), start=1)
        for row in (*run_rows("base", seed, base), *run_rows("pi", seed, pi, controller="pi", setting=1))
    ]
    rows += run_rows("pi", 9, 0.4, stage="search", setting=1, controller="pi")
    grid = grid_with()
    study_results.write_results(tmp_path / "results.parquet", rows)
    assert study_rows.load_results(tmp_path / "results.parquet") == rows
    page = report.write_study_report(rows, grid, tmp_path / "report")
    lines = page.read_text(encoding="utf-8").splitlines()
    of_base, of_pi = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("base", "pi"))
    pm = "\u00b1"
    cells = [
        "2",
        f"0.550 {pm} 0.050",
        f"0.900 {pm} 0.000",
        f"0.25 {pm} 0.00",
        f"0.850 {pm} 0.000",
        "-",
        "-",
        f"8 {pm} 0",
    ]
    assert of_base == f"| {' | '.join(['base', *cells, '-', '-', '-'])} |"
    assert "| 2 | 0.750 \u00b1 0.050 |" in of_pi
    assert "| +0.200 (+0.200 to +0.200) |" in of_pi
    assert any(line.startswith("| on_policy | pi | steps=8 | 1 | 0.400 |") for line in lines)
    assert any(line.startswith("| on_policy | base | - | 0 | - |") for line in lines)
    for what in ("entropy", "alpha", "reward"):
        for stage in ("report", "search"):
            name = f"{stage}-on_policy-{what}"
            assert f"![{name}]({name}.png)" in lines
            assert (page.parent / f"{name}.png").stat().st_size > 5000


def test_mean_over_runs_of_unequal_length() -> None:
    steps, mean = figures.mean_series([run_rows("pi", 1, 0.5), run_rows("pi", 2, 0.5)[:2]], "entropy/mean")
    assert list(steps) == [1, 2]
    assert list(mean) == pytest.approx([1.0, 0.9])


def test_work_that_fails_does_not_keep_other_work_from_running(tmp_path: Path) -> None:
    lines: list[str] = []
    done: list[str] = []

    with pool.Pool(2, 60.0, lines.append) as workers:

        def fail() -> None:
            workers.train(tmp_path / "missing.yaml", [], tmp_path / "logs/fail.log")

        failures = workers.do_all([pool.Work("fails", fail), pool.Work("works", lambda: done.append("works"))])
    assert done == ["works"]
    assert list(failures) == ["fails"]
    assert "status 2" in failures["fails"]
    assert "missing.yaml" in failures["fails"]
    assert "[2/2]" in lines[-1]


def test_an_interrupted_study_starts_nothing_more(tmp_path: Path) -> None:
    with pool.Pool(1, 60.0, lambda _line: None) as workers:

        def interrupt() -> None:
            workers._listen(15, None)

        def never() -> None:
            workers.train(tmp_path / "missing.yaml", [], tmp_path / "logs/never.log")

        with pytest.raises(pool.Interrupted):
            workers.do_all([pool.Work("first", interrupt), pool.Work("second", never)])
    assert not (tmp_path / "logs").exists()


def test_a_study_without_runs_has_no_results(tmp_path: Path) -> None:
    with pool.Pool(1, 60.0, lambda _line: None) as workers:
        study = Study(grid_with(), tmp_path, workers)
        assert study.choice() == {}
        assert study.results() == []
