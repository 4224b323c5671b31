"""Weighted sums, format, overlong punishment, verifiers that take batches."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import whole_steps
from hypothesis import given
from hypothesis import strategies as st
from trajectories import task_of, trajectory_of

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.rewards import RewardScorer, build_verifier
from megatron_entropic.rewards.judge import Judge
from megatron_entropic.rewards.scorer import overlong_penalty
from megatron_entropic.rewards.verifier import Job, judge
from megatron_entropic.types import Trajectory

BATCHES = """
    import time

    def length(responses, ground_truths, extra_infos):
        assert len(responses) == len(ground_truths) == len(extra_infos)
        if "raise" in responses:
            raise RuntimeError("no")
        if "hang" in responses:
            time.sleep(1000)
        if "short" in responses:
            return [1.0]
        return [float("nan") if r == "nan" else len(r) + len(responses) / 100 for r in responses]

    length.takes_batches = True

    def bonus(response, ground_truth, extra_info):
        if response == "bad":
            raise ValueError("no bonus")
        return extra_info.get("bonus", 0)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"several_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(BATCHES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def attempt(text: str, truth: str = "4", *, tokens: int = 1, bonus: int = 0) -> Trajectory:
    return trajectory_of(task_of(0, truth=truth, extra_info={"bonus": bonus}), 0, [1] * tokens, text)


def test_dapo_soft_punishment_at_its_corners() -> None:
    # DAPO: L_max = 20480 with L_cache = 4096.
    values = [overlong_penalty(length, 20480, 4096) for length in (0, 16384, 18432, 20480, 30000)]
    assert values == [0, 0, -0.5, -1, -1]


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 3000))
def test_punishment_falls_from_zero_to_minus_one(buffer: int, more: int, length: int) -> None:
    here, next_one = (overlong_penalty(n, buffer + more, buffer) for n in (length, length + 1))
    assert -1 <= next_one <= here <= 0
    assert (here == 0) == (length <= more)
    assert (here == -1) == (length >= buffer + more)


def test_the_sum_of_several_rewards(module: str) -> None:
    config = RewardConfig(
        verifier="exact",
        added={"format": 0.5, f"{module}:bonus": 2.0},
        format_pattern="[0-9]",
        workers=1,
        overlong_buffer_tokens=4,
        overlong_weight=0.25,
    )
    attempts = [attempt("4", bonus=1, tokens=6), attempt("5", tokens=8), attempt("bad"), attempt("45", "45", tokens=10)]
    with RewardScorer(config, max_response_tokens=10) as scorer:
        rewards, metrics = whole_steps.judge(scorer, attempts, group_size=4)
    assert [one.status for one in rewards] == ["ok", "ok", "error", "ok"]
    expected = [1 + 0.5 + 2, 0 + 0.5 - 0.25 * 0.5, 1 - 0.25]
    assert [rewards[i].value for i in (0, 1, 3)] == pytest.approx(expected)
    assert rewards[2].value == pytest.approx(sum(expected) / 3), "a failed added reward is no zero either"
    assert [one.correct for one in rewards] == [True, False, False, True]
    assert metrics == pytest.approx(
        {
            "reward/verifier_errors": 1,
            "reward/verifier_timeouts": 0,
            "reward/overlong_mean": -1.5 / 4,
            "reward/verifier_mean": 0.5,
            "reward/format_mean": 0.5,
            "reward/bonus_mean": 0.25,
        }
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_verifier_that_takes_batches(workers: int, module: str) -> None:
    config = RewardConfig(verifier=f"{module}:length", workers=workers, batch_size=2, timeout_s=1)
    texts = ["a", "bb", "raise", "a", "nan", "ccc", "short", "d", "e"] + ["hang", "f", "gg", "hh"] * workers
    with RewardScorer(config) as scorer:
        verdicts = whole_steps.verdicts(scorer, list(map(attempt, texts)))
    if workers == 0:
        assert {verdict.status for verdict in verdicts} == {"error"}, "one call for all"
        return
    statuses = [verdict.status for verdict in verdicts]
    assert statuses == [
        "ok",
        "ok",
        "error",
        "error",
        "error",
        "ok",
        "error",
        "error",
        "timeout",
        "timeout",
        *["ok"] * 3,
    ]
    assert [v.reward for v in verdicts if v.status == "ok"] == pytest.approx([1.02, 2.02, 3.02, 1.02, 2.02, 2.01])
    assert "1 rewards for 2 responses" in verdicts[6].message
    assert "RuntimeError: no" in verdicts[2].message


def test_the_default_format_is_a_box_near_the_end() -> None:
    with RewardScorer(RewardConfig(verifier="format", workers=1)) as scorer:
        texts = ["so \\boxed{4}.\n", "\\boxed{\\frac{1}{2}}", "4", "\\boxed{4", "\\boxed{}"]
        assert [v.reward for v in whole_steps.verdicts(scorer, list(map(attempt, texts)))] == [1, 1, 0, 0, 0]


def test_a_pattern_that_never_ends_is_a_timeout() -> None:
    config = RewardConfig(verifier="format", format_pattern="(a+)+b", workers=1, cpu_time_s=0.5)
    with RewardScorer(config) as scorer:
        verdicts = whole_steps.verdicts(scorer, [attempt("a" * 40), attempt("aab")])
    assert [(v.status, v.reward) for v in verdicts] == [("timeout", 0), ("ok", 1)]


def test_the_box_alone_is_judged_as_its_response_is() -> None:
    texts = [
        r"so \boxed{\frac12}",
        r"\boxed{0.5} or \boxed{\frac12}",
        "none",
        r"\boxed{1\ }",
        r"\boxed{{1}",
        r"\boxed{\}}",
    ]
    texts += [r"\boxed{\boxed{3}}", r"\fbox{ 0.50 }", r"\boxed{}", "", r"\boxed{1/2\\}"]
    truths = ["0.5", "1"]
    jobs: list[Job] = [(text, truth, {}) for text in texts * 2 for truth in truths]
    direct = judge(build_verifier("math"), jobs)
    assert Judge(RewardConfig(workers=0), "math").verdicts(jobs) == direct
    assert sum(verdict.reward for verdict in direct) == 6
    assert {verdict.status for verdict in direct} == {"ok"}
