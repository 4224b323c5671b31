r"""Answers that no student writes: the pool stays within its limits, counts what it ends, and goes on."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import whole_steps
from trajectories import task_of, trajectory_of

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.rewards import RewardScorer

CPU_LIMIT_S = 1.0
HOSTILE = [
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "10^{1000000000}",
    "(10^8)!",
    "((3!)!)!!",
    "((3!)!)!",
    "2^{2^{2^{2^{2^2}}}}",
    r"\frac{1}{0}",
    r"\frac{}{}",
    r"\frac{1}{\frac{1}{\frac{1}{0}}}",
    r"\sqrt" * 40 + "{2}",
    r"\sqrt{" * 60 + "2" + "}" * 60,
    r"\frac{1}{1+" * 20 + "1" + "}" * 20,
    "(" * 120 + "1" + ")" * 120,
    "[" * 100,
    "}" * 50 + "{" * 50,
    r"\{" * 100,
    "+".join(["x"] * 100),
    "x^{500}+1",
    "(x+1)^{500}",
    "(a+b+c+d+e)^{40}",
    r"\cup".join(f"[{i},{i + 0.5}]" for i in range(25)),
    ",".join(map(str, range(80))),
    r"\sum_{k=1}^{10^{9}} k^{-1}",
    r"\prod_{k=1}^{10000000} k",
    r"\int_0^1 e^{x^{x^{x}}} dx",
    r"\lim_{x \to 0} \frac{\sin(\sin(\sin x))}{x^{99}}",
    r"\binom{10^{9}}{10^{8}}",
    r"\log_{1}{5}",
    "0." + "3" * 250,
    "1" * 280,
    "\x00\x00\x00",
    "3\x004",
    "\ud800\udfff",
    "\N{ARABIC-INDIC DIGIT THREE}\N{ARABIC-INDIC DIGIT FOUR}\u202e43",
    "\ufffd" * 100,
    r"\text{" + "a" * 250 + "}",
    r"\input{/etc/passwd}",
    r"__import__('os').fork()",
    r"\def\x{\x\x}\x",
    r"\begin{pmatrix}" + r"1&2\\" * 40 + r"\end{pmatrix}",
    r"\begin{pmatrix}1&2",
    "=" * 100,
    "1=2=3=4=5=6",
    "x=x=x",
    r"\infty^{\infty}-\infty",
    r"0^0",
    r"$" * 200,
    "\\" * 200,
    r"\boxed{" * 40 + "1" + "}" * 40,
]
LONG = ["1+" * 100_000 + "1", "{" * 200_000, r"\boxed{" * 30_000, "\x00" * 200_000, r"\frac{1}{2}" * 20_000]


def judge(scorer: RewardScorer, answers: list[str], truth: str) -> list[tuple[str, float]]:
    task = task_of(0, truth=truth)
    attempts = [trajectory_of(task, text=rf"\boxed{{{answer}}}") for answer in answers]
    return [(verdict.status, verdict.reward) for verdict in whole_steps.verdicts(scorer, attempts)]


def test_hostile_answers_are_wrong_or_counted_and_the_pool_goes_on() -> None:
    assert len(HOSTILE) + len(LONG) >= 40
    config = RewardConfig(verifier="math", workers=2, cpu_time_s=CPU_LIMIT_S, timeout_s=120, memory_limit_gb=2)
    begin = psutil.Process().memory_info().rss
    with RewardScorer(config) as scorer:
        verdicts = dict(zip(HOSTILE + LONG, judge(scorer, HOSTILE + LONG, "34"), strict=True))
        again = judge(scorer, ["34", "34.0", "33", r"\frac{68}{2}"] * 2, "34")
    assert {answer: verdict for answer, verdict in verdicts.items() if verdict[1] != 0} == {}
    assert {status for status, _ in verdicts.values()} <= {"ok", "timeout", "error"}
    assert all(verdicts[answer] == ("ok", 0.0) for answer in LONG), "a long answer costs nothing"
    ended = [answer for answer, (status, _) in verdicts.items() if status == "timeout"]
    assert len(ended) <= 15, ended
    assert again == [("ok", 1.0), ("ok", 1.0), ("ok", 0.0), ("ok", 1.0)] * 2
    assert psutil.Process().memory_info().rss - begin < 200 << 20


def test_correct_answers_stay_correct_on_a_busy_machine() -> None:
    """Eight processes that compute beside the verifiers: no timeout, no wrong verdict."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        with RewardScorer(RewardConfig(verifier="math", workers=2)) as scorer:
            begin = time.monotonic()
            equal = [r"\frac{68}{2}", "34.0", r"34\text{ cm}", r"\sqrt{1156}", "2 \\cdot 17"] * 8
            assert judge(scorer, equal, "34") == [("ok", 1.0)] * 40
            assert time.monotonic() - begin < 60
    finally:
        for process in busy:
            process.kill()
            process.wait(timeout=30)
