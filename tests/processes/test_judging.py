"""Responses that are judged while others are still missing: the order of arrival decides nothing, and nobody waits."""

from __future__ import annotations

import random
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from trajectories import task_of, trajectory_of

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.errors import RunError
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.rewards.judge import Judge
from megatron_entropic.rewards.pool import VerifierPool
from megatron_entropic.rewards.verifier import Job
from megatron_entropic.types import Reward, Verdict

VERIFIERS = """
    import os, pathlib, time

    def together(responses, ground_truths, extra_infos):
        if "raise" in responses:
            raise RuntimeError("no")
        return [len(response) + len(set(responses)) / 100 for response in responses]

    together.takes_batches = True

    def slowly(response, ground_truth, extra_info):
        time.sleep(float(response))
        with pathlib.Path(ground_truth).open("a") as seen:
            seen.write(response + "\\n")
        return os.getpid()

    def deadly(response, ground_truth, extra_info):
        if response == "die":
            os._exit(3)
        return os.getpid()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"judging_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(VERIFIERS))
    monkeypatch.chdir(tmp_path)
    return name


def test_the_order_of_arrival_changes_no_reward(module: str, caplog: pytest.LogCaptureFixture) -> None:
    """Batches, equal answers, failures and group means are those of the positions."""
    config = RewardConfig(
        verifier="math",
        added={f"{module}:together": 0.5, "format": 0.1},
        workers=2,
        batch_size=3,
        cpu_time_s=0.7,
        overlong_buffer_tokens=4,
    )
    texts = [r"\boxed{0}", r"\boxed{0.0}", "none", "raise", r"\boxed{\sum_{k=1}^{10^{9}} k^{-1}}", r"\boxed{1}"]
    asked = [
        trajectory_of(task_of(number, truth=str(number)), index, [1] * len(text), text)
        for number in range(3)
        for index, text in enumerate([*texts[number:], *["end"] * (number + 1)])
    ]

    def judged(order: list[int]) -> tuple[list[Reward], dict[str, float]]:
        with scorer.scoring(3, len(texts) + 1) as scoring:
            for position in order:
                scoring.add(position, asked[position])
            return scoring.finish()

    orders = [random.Random(seed).sample(range(len(asked)), len(asked)) for seed in range(3)]
    with RewardScorer(config, max_response_tokens=16) as scorer:
        expected = judged(list(range(len(asked))))
        logged = caplog.messages
        assert [judged(order) for order in orders] == [expected] * 3
    statuses = [reward.status for reward in expected[0]]
    assert statuses.count("timeout") == 3
    assert statuses.count("error") >= 3
    assert expected[1]["reward/verifier_timeouts"] == 3
    assert [" ".join(message.split()[:8]) for message in caplog.messages] == [
        " ".join(message.split()[:8]) for message in logged
    ] * 4


def test_verdicts_come_while_others_are_missing(module: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    judge = Judge(RewardConfig(verifier=f"{module}:slowly", workers=1), f"{module}:slowly")
    try:
        with judge.judging(4) as judging:
            for position in (2, 0, 3):
                judging.add(position, ("0.2", str(seen), {}))
            wait_for(lambda: seen.exists() and len(seen.read_text().splitlines()) == 3)
            judging.add(1, ("0", str(seen), {}))
            assert len(judging.verdicts()) == 4
        assert seen.read_text().split() == ["0.2"] * 3 + ["0"], "what was judged is not judged again"
    finally:
        judge.close()


def test_what_is_not_wanted_any_more_delays_nobody(module: str, tmp_path: Path) -> None:
    """A step that broke off and begins again does not wait for the verdicts of the first attempt."""
    seen = tmp_path / "seen"
    judge = Judge(RewardConfig(workers=1), f"{module}:slowly")
    try:
        with judge.judging(100) as judging:
            for position in range(50):
                judging.add(position, ("0.5", str(seen), {}))
        begin = time.monotonic()
        assert judge.verdicts([("0", str(seen), {})])[0].status == "ok"
        # A chunk may have been with the process already.
        assert time.monotonic() - begin < 10
    finally:
        judge.close()


def test_a_process_that_died_is_replaced_before_it_is_needed(module: str) -> None:
    before = set(psutil.Process().children())
    pool = VerifierPool(RewardConfig(workers=1), f"{module}:deadly")
    try:
        (first,) = set(psutil.Process().children()) - before
        jobs: list[Job] = [("die", "", {}), ("live", "", {})]
        died, lived = [pool.submit([job]) for job in jobs]
        assert died.result() == [Verdict("error", message="the verifier process died (status 3)")]
        assert lived.result()[0].reward != first.pid
        assert pool.submit([jobs[0]]).result()[0].status == "error"
        wait_for(lambda: any(child not in before for child in psutil.Process().children()))
    finally:
        pool.close()
    assert set(psutil.Process().children()) == before


def test_whoever_waits_hears_that_the_pool_was_closed(module: str, tmp_path: Path) -> None:
    pool = VerifierPool(RewardConfig(workers=1), f"{module}:slowly")
    jobs: list[Job] = [("30", str(tmp_path / "seen"), {})] * 3
    futures = [pool.submit([job]) for job in jobs]
    wait_for(futures[0].running)
    closing = threading.Thread(target=pool.close)
    closing.start()
    for future in futures:
        with pytest.raises(RunError, match="have been ended"):
            future.result(timeout=20)
    closing.join(timeout=20)
    with pytest.raises(RunError, match="have been ended"):
        pool.submit([jobs[0]])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
