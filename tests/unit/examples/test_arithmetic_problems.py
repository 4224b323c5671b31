"""The problems of examples/arithmetic.py: right solutions, files without overlap, a function of the seed."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from modules import load_module

from megatron_entropic.config.load import load_config
from megatron_entropic.config.run import RewardConfig
from megatron_entropic.rewards import build_verifier
from megatron_entropic.rewards.verifiers.countdown import expression_value

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
EXPRESSION = re.compile(r"[0-9]+(?: [-+*] [0-9]+)+")

arithmetic = load_module(EXAMPLES / "arithmetic.py", "arithmetic")
SIZES = arithmetic.Sizes(train=300, search=50, heldout=50, solutions=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    for seed in (1, 2):
        arithmetic.prepare(folder / str(seed), seed, sizes=SIZES)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def prompt_of(row: dict[str, Any]) -> str:
    """The text of a prompt, whatever its form."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)


def expression_of(row: dict[str, Any], skill: str) -> str:
    """The expression that a row asks for, operands of a first sum or product in order."""
    if skill == "sums":
        (found,) = EXPRESSION.findall(prompt_of(row))
    else:
        found = EXPRESSION.findall(row["extra_info"]["solution"])[0]
    return ordered(found)


def ordered(expression: str) -> str:
    first, operator, second, *rest = expression.split()
    if operator != "-":
        first, second = sorted((first, second), key=int)
    return " ".join((first, operator, second, *rest))


def shown(row: dict[str, Any]) -> set[str]:
    """Every expression that stands in a row's prompt, or in what a warm start learns, steps of solutions included."""
    return {ordered(one) for one in EXPRESSION.findall(prompt_of(row) + row.get("response", ""))}


def test_no_held_out_expression_is_asked_solved_or_shown_in_another_file_of_any_seed(folder: Path) -> None:
    for kept in ("heldout", "search"):
        own = {
            expression_of(row, skill)
            for seed in (1, 2)
            for skill in arithmetic.SKILLS
            for row in read(folder / f"{seed}/completion/{skill}_{kept}.parquet")
        }
        assert len(own) > 100
        for path in folder.rglob("*.parquet"):
            if kept in path.name or path.name == "solutions.parquet":
                continue
            for row in read(path):
                if "heldout" in path.name or "search" in path.name:
                    behind_examples = path.parent.name in ("few_shot", "calculator")
                    asked = set() if behind_examples else {expression_of(row, path.name.split("_")[0])}
                    assert not asked & own, (path, row)
                else:
                    assert not shown(row) & own, (path, row)


def test_the_examples_of_a_held_out_prompt_are_not_held_out(folder: Path) -> None:
    for skill in arithmetic.SKILLS:
        kept = {expression_of(row, skill) for row in read(folder / f"1/completion/{skill}_heldout.parquet")}
        for row in read(folder / f"1/few_shot/{skill}_heldout.parquet"):
            before = prompt_of(row).rpartition("\n" if skill == "sums" else "\n\nQuestion:")[0]
            examples = {ordered(one) for one in EXPRESSION.findall(before)}
            assert len(examples) >= 2
            assert not examples & kept


def test_files_are_a_function_of_the_seed(folder: Path, tmp_path: Path) -> None:
    arithmetic.prepare(tmp_path, 1, sizes=SIZES)
    for path in tmp_path.rglob("*.parquet"):
        again, other = (folder / seed / path.relative_to(tmp_path) for seed in ("1", "2"))
        assert read(path) == read(again)
        assert read(path) != read(other)


def test_every_level_is_there_and_no_problem_comes_twice(folder: Path) -> None:
    for skill in arithmetic.SKILLS:
        for file, count in (("train", 300), ("search", 50), ("heldout", 50)):
            rows = read(folder / f"1/completion/{skill}_{file}.parquet")
            levels = Counter(row["extra_info"]["level"] for row in rows)
            assert levels == dict.fromkeys(range(1, 6), count // 5)
            assert len({expression_of(row, skill) for row in rows}) == count


@pytest.mark.parametrize("form", arithmetic.FORMS)
def test_solutions_are_right_and_wrong_numbers_are_not(folder: Path, form: str) -> None:
    """By the way to read answers that the shipped configuration has."""
    reward = load_config(EXAMPLES / "real_model.yaml").reward
    judge = build_verifier("math", reward)
    by_last_number = build_verifier("math", RewardConfig(answer="last_number"))
    for skill in arithmetic.SKILLS:
        for row in read(folder / f"1/{form}/{skill}_train.parquet"):
            truth, solution = row["reward_model"]["ground_truth"], row["extra_info"]["solution"]
            if form == "completion":
                assert int(truth) == eval(expression_of(row, skill))
            # A base model goes on with the next problem.
            assert judge(f" {solution}\nQuestion: 3 + 4 = 8", truth, {}) == 1.0
            assert by_last_number(solution, truth, {}) == 1.0
            assert judge(f" {int(truth) + 1}", truth, {}) == 0.0
            assert judge(" I do not know", truth, {}) == 0.0


def test_forms(folder: Path) -> None:
    sums, words = (
        {form: read(folder / f"1/{form}/{skill}_train.parquet")[0] for form in arithmetic.FORMS}
        for skill in arithmetic.SKILLS
    )
    assert re.fullmatch(r"[0-9]+( [-+*] [0-9]+)+ =", sums["completion"]["prompt"])
    assert len(sums["few_shot"]["prompt"].splitlines()) == arithmetic.SHOTS + 1
    assert sums["few_shot"]["prompt"].endswith("\n" + sums["completion"]["prompt"])
    assert sums["chat"]["prompt"] == [
        {"role": "user", "content": f"What is {sums['completion']['prompt'].removesuffix(' =')}?"}
    ]
    assert words["few_shot"]["prompt"].count("Question: ") == arithmetic.SHOTS + 1
    assert words["completion"]["prompt"] == f"Question: {words['chat']['prompt'][0]['content']}\nAnswer:"
    for form, blank in (("completion", " "), ("few_shot", " "), ("chat", "")):
        for skill in arithmetic.SKILLS:
            for row in read(folder / f"1/{form}/{skill}_solutions.parquet"):
                assert row["response"].startswith(blank)
                assert row["response"] == blank + row["response"].strip()


def test_the_calculator_says_in_the_examples_what_it_says(folder: Path) -> None:
    """An example is a conversation that `environment: calculator` would have."""
    for skill in arithmetic.SKILLS:
        row = read(folder / f"1/calculator/{skill}_train.parquet")[0]
        *examples, asked = row["prompt"].split("\n\n")
        assert len(examples) == arithmetic.SHOTS
        assert re.fullmatch(r"Question: .*\n", asked)
        for example in examples:
            _, call, value, answer = example.splitlines()
            assert str(expression_value(call.removeprefix("calc:"))) == value == answer.removeprefix("answer: ")
    assert not (folder / "1/calculator/solutions.parquet").exists()


def test_as_many_solved_examples_as_asked_for(tmp_path: Path) -> None:
    few = arithmetic.Sizes(train=20, search=4, heldout=4, solutions=4, shots=1)
    arithmetic.prepare(tmp_path, 1, levels=[1], sizes=few)
    for row in read(tmp_path / "few_shot/sums_train.parquet"):
        assert re.fullmatch(r"[0-9]+ [-+] [0-9]+ = [0-9]+\n[0-9]+ [-+] [0-9]+ =", row["prompt"])


def test_the_script_evaluates_what_its_configuration_trains(folder: Path) -> None:
    """real_model.sh gives `evaluate` options for what the configuration says in keys."""
    script = (EXAMPLES / "real_model.sh").read_text(encoding="utf-8")
    config = load_config(EXAMPLES / "real_model.yaml")
    assert f"--answer {config.reward.answer} --answer-pattern '{config.reward.answer_pattern}'" in script
    assert f"--max-prompt-tokens {config.data.max_prompt_tokens} " in script
    assert f"--max-tokens sums={config.rollout.max_response_tokens} words=" in script
    assert config.reward.verifier == "math"
    problems = re.search(r"^problems=data/arithmetic/(\w+)$", script, re.M)
    assert problems is not None
    evaluated = dict(re.findall(r'"(\w+)=\$problems/(\w+\.parquet)"', script))
    assert set(evaluated) == set(arithmetic.SKILLS)
    for file in [*evaluated.values(), config.data.train_files[0].name]:
        assert (folder / "1" / problems.group(1) / file).is_file(), file
