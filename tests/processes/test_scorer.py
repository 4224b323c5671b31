"""Verifiers that hang, crash, lie or print, in real processes: counted, killed, replaced, and nothing left behind."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import whole_steps
from judge_server import Handler, serving
from trajectories import task_of, trajectory_of

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.types import Trajectory

VERIFIER = """
    import os, signal, subprocess, sys, time

    def judge(response, ground_truth, extra_info):
        if response == "hang":
            time.sleep(1000)
        if response == "hang in C":
            9 ** 9 ** 9
        if response == "hang with a child":
            subprocess.run(["sleep", "1000"])
        if response == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
            while True:
                pass
        if response == "crash":
            os.abort()
        if response == "exit":
            os._exit(7)
        if response == "raise":
            raise KeyError("hostile")
        if response == "nan":
            return float("nan")
        if response == "print":
            print("noise " * 1000)
            sys.stdout.flush()
            os.write(1, b"more noise")
        if response == "pid":
            return os.getpid()
        return float(response == ground_truth) + extra_info.get("bonus", 0)
"""


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hostile verifier in the current directory; afterwards no child of this test may be left."""
    name = f"hostile_{os.getpid()}_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(VERIFIER))
    monkeypatch.chdir(tmp_path)
    before = set(psutil.Process().children(recursive=True))
    yield f"{name}:judge"
    left = set(psutil.Process().children(recursive=True)) - before
    assert not left


def attempt(text: str, truth: object = "4", *, extra: dict | None = None) -> Trajectory:
    return trajectory_of(task_of(0, truth=truth, extra_info=extra or {}), text=text)


def test_every_way_to_fail_is_counted_and_the_rest_is_judged(verifier: str, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["4", "hang", "5", "crash", "raise", "4", "hang in C", "exit", "nan", "hang with a child", "deaf", "4"]
    begin = time.monotonic()
    with (
        RewardScorer(RewardConfig(verifier=verifier, workers=2, timeout_s=1.5)) as scorer,
        caplog.at_level(logging.WARNING),
    ):
        rewards, metrics = whole_steps.judge(scorer, list(map(attempt, texts)))
        again, metrics_again = whole_steps.judge(scorer, [attempt("4"), attempt("5")])
    assert metrics_again == {"reward/verifier_errors": 0.0, "reward/verifier_timeouts": 0.0}
    assert time.monotonic() - begin < 60
    assert metrics == {"reward/verifier_errors": 4.0, "reward/verifier_timeouts": 4.0}
    assert {text: reward.status for text, reward in zip(texts, rewards, strict=True)} == {
        "4": "ok",
        "5": "ok",
        "hang": "timeout",
        "hang in C": "timeout",
        "hang with a child": "timeout",
        "deaf": "timeout",
        "crash": "error",
        "exit": "error",
        "raise": "error",
        "nan": "error",
    }
    assert [one.value for one in rewards if one.status == "ok"] == [1.0, 0.0, 1.0, 1.0]
    assert [one.value for one in again] == [1.0, 0.0]
    assert "failed on 8 of 12 responses" in caplog.text


def test_processes_are_reused_and_run_beside_this_one(verifier: str) -> None:
    with RewardScorer(RewardConfig(verifier=verifier, workers=1)) as scorer:
        rewards, _ = whole_steps.judge(scorer, [attempt("pid")] * 20)
    assert len({one.value for one in rewards}) == 1
    assert rewards[0].value != os.getpid()


def test_a_verifier_may_print_and_sees_extra_info(verifier: str) -> None:
    with RewardScorer(RewardConfig(verifier=verifier, workers=1)) as scorer:
        rewards, _ = whole_steps.judge(scorer, [attempt("print", "print"), attempt("4", extra={"bonus": 2})])
    assert [one.value for one in rewards] == [1.0, 3.0]


def test_a_custom_verifier_in_the_driver(verifier: str) -> None:
    with RewardScorer(RewardConfig(verifier=verifier, workers=0)) as scorer:
        rewards, metrics = whole_steps.judge(scorer, [attempt("pid"), attempt("raise")])
    assert metrics["reward/verifier_errors"] == 1.0
    assert rewards[0].value == os.getpid()


def test_a_failed_verdict_takes_the_mean_of_its_group(verifier: str) -> None:
    """Its group-relative advantage is then zero. A task that is drawn twice in a row has two groups."""
    texts = ["4", "5", "raise", "4"], ["5", "5", "5", "raise"], ["raise", "raise", "4", "4"]
    attempts = [attempt(text) for group in texts for text in group]
    with RewardScorer(RewardConfig(verifier=verifier, workers=0)) as scorer:
        judged, _ = whole_steps.judge(scorer, attempts, group_size=4)
    rewards = [one.value for one in judged]
    assert rewards[:4] == pytest.approx([1, 0, 2 / 3, 1])
    assert rewards[4:8] == [0, 0, 0, 0]
    assert rewards[8:] == [1, 1, 1, 1]


def test_a_verifier_that_does_not_import_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ValueError, match="no_such_verifier_module"):
        RewardScorer(RewardConfig(verifier="no_such_verifier_module:judge", workers=2))
    assert set(psutil.Process().children(recursive=True)) == before


def test_instant_verifiers_start_no_process() -> None:
    before = set(psutil.Process().children(recursive=True))
    with RewardScorer(RewardConfig(verifier="countdown", workers=8)) as scorer:
        (reward,), _ = whole_steps.judge(scorer, [attempt("3*7+5", {"numbers": [3, 7, 5], "target": 26})])
        assert set(psutil.Process().children(recursive=True)) == before
    assert reward.value == 1.0


def test_math_verify_survives_a_tower_of_powers() -> None:
    """math-verify computes what it is told to; the right answers beside it must not suffer."""
    endless, tower = r"\boxed{\sum_{k=1}^{10^{9}} k^{-1}}", r"\boxed{9^{9^{9^{9}}}}"
    texts = [endless, r"\boxed{4.0}", tower, r"\boxed{\frac{8}{2}}", r"\boxed{5}"]
    with RewardScorer(RewardConfig(verifier="math", workers=2, timeout_s=4)) as scorer:
        rewards, metrics = whole_steps.judge(scorer, list(map(attempt, texts)))
    assert rewards[0].status in ("timeout", "error")
    assert [one.value for one in rewards[1:]] == [1.0, 0.0, 1.0, 0.0]
    assert [one.status for one in rewards[1:]] == ["ok"] * 4
    assert sum(metrics.values()) >= 1


def test_verifier_processes_do_not_outlive_a_killed_driver(verifier: str) -> None:
    program = (
        "import sys, time\n"
        "from megatron_entropic.config.run import RewardConfig\n"
        "from megatron_entropic.rewards.pool import VerifierPool\n"
        f"pool = VerifierPool(RewardConfig(workers=2), {verifier!r})\n"
        "asked = [pool.submit([('pid', '', {})]) for _ in range(2)]\n"
        "print(*[int(one.result()[0].reward) for one in asked], flush=True)\n"
        "time.sleep(1000)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in set(driver.stdout.readline().split())]
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert workers
    assert not alive


def test_a_model_judges_in_several_processes_and_its_costs_arrive(tmp_path: Path) -> None:
    """The prompt is in view; what failed is no wrong answer; what was asked once is not asked after a restart."""

    def reply(handler: Handler, question: dict[str, Any]) -> None:
        text = question["messages"][0]["content"]
        if "broken" in text:
            handler.say(b"no", status=400)
        else:
            handler.answer(f"Verdict: {int('splendid' in text and 'What is it?' in text)}")

    task = task_of(0, [1, 2], text="What is it?", truth="it")
    texts = ["splendid", "wrong", "broken", "splendid"] * 4
    trajectories = [trajectory_of(task, index % 4, [5], text=text) for index, text in enumerate(texts)]
    with serving(reply) as server:
        judge = {"urls": [server.url], "model": "m", "cache_file": tmp_path / "judge.sqlite"}
        config = RewardConfig(verifier="judge", judge=judge, workers=2, batch_size=4)
        with RewardScorer(config) as scorer, scorer.scoring(4, 4) as scoring:
            for position, trajectory in enumerate(trajectories):
                scoring.add(position, trajectory)
            rewards, metrics = scoring.finish()
            asked = len(server.questions)
        with RewardScorer(config) as scorer, scorer.scoring(1, 4) as scoring:
            for position, trajectory in enumerate(trajectories[:4]):
                scoring.add(position, trajectory)
            again, later = scoring.finish()
    assert [reward.value for reward in rewards] == pytest.approx([1.0, 0.0, 2 / 3, 1.0] * 4)
    assert [reward.status for reward in rewards[:4]] == ["ok", "ok", "error", "ok"]
    assert again == rewards[:4]
    assert metrics["judge/requests"] == asked
    assert metrics["judge/failures"] == metrics["reward/verifier_errors"] == 4
    assert (later["judge/requests"], later["judge/cache_hits"], later["judge/prompt_tokens"]) == (1, 3, 0)
