"""`megatron-entropic evaluate` through the real command line: vLLM, a real tokenizer, three benchmark files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pyarrow.parquet
import pytest
from math_assets import write_model, write_problems
from training_run import ROOT

from megatron_entropic.cli import main

NAMES = ("own_problems", "amc23", "math500")
SAMPLES = {"own_problems": 4, "amc23": 4, "math500": 6}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "model")
    for position, name in enumerate(NAMES):
        write_problems(folder / f"{name}.jsonl", 4 * position, 5)
    return folder


def command(assets: Path, output: Path, *more: str) -> list[str]:
    options = ["--model", assets / "model", "--benchmarks", *(f"{n}={assets / f'{n}.jsonl'}" for n in NAMES)]
    sampling = "--samples 4 math500=6 --max-tokens 24 --max-prompt-tokens 64 --dtype float32 --kv-cache-gb 0.1"
    verifier = ["--verifier", "tests.end_to_end.string_rewards:first_digit_is_even", "--workers", "1"]
    words = [*options, *sampling.split(), *verifier, "--output-dir", output, *more]
    return [sys.executable, "-m", "megatron_entropic.cli", "evaluate", *map(str, words)]


@pytest.fixture(scope="module")
def output(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation."""
    directory = tmp_path_factory.mktemp("evaluated") / "out"
    subprocess.run(command(assets, directory), check=True, cwd=ROOT, timeout=400)
    return directory


def benchmarks(directory: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((directory / "evaluation.json").read_text())
    return {benchmark["name"]: benchmark for benchmark in content["benchmarks"]}


def test_the_numbers_are_those_of_the_stored_responses(output: Path) -> None:
    numbers = benchmarks(output)
    assert list(numbers) == ["math500", "amc23", "own_problems"], "the paper's columns first"
    for name, claimed in numbers.items():
        rows = pyarrow.parquet.read_table(output / f"{name}.parquet").to_pylist()
        count = SAMPLES[name]
        assert len(rows) == 5 * count
        groups = [[row for row in rows if row["problem"] == problem] for problem in range(5)]
        assert [[row["sample"] for row in group] for group in groups] == [list(range(count))] * 5
        right = [[row["reward"] == 1.0 for row in group] for group in groups]
        assert claimed["average"]["value"] == pytest.approx(fmean(fmean(group) for group in right))
        for k in range(1, count + 1):
            share = fmean(fmean(any(drawn) for drawn in combinations(group, k)) for group in right)
            assert claimed["pass_at"][str(k)]["value"] == pytest.approx(share)
        assert claimed["majority"]["value"] == pytest.approx(fmean(majority(group) for group in groups))
        tokens = [len(row["response_tokens"]) for row in rows]
        assert claimed["mean_tokens"] == pytest.approx(fmean(tokens))
        assert claimed["truncated"] == pytest.approx(fmean(row["finish_reason"] == "length" for row in rows))
        surprise = -sum(row["logprob_sum"] for row in rows) / sum(tokens)
        assert claimed["sampled_entropy"] == pytest.approx(surprise)
        assert 0 < claimed["average"]["value"] < 1, "a test of numbers needs some that are not trivial"


def majority(group: list[dict[str, Any]]) -> bool:
    votes = Counter(row["answer"] for row in group if row["answer"] is not None).most_common(1)
    return bool(votes) and next(row["reward"] == 1.0 for row in group if row["answer"] == votes[0][0])


def test_prompts_truncation_and_end_of_sequence(output: Path, assets: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    rows = [row for name in NAMES for row in pyarrow.parquet.read_table(output / f"{name}.parquet").to_pylist()]
    assert rows[0]["prompt"] == (
        "<|im_start|>user\nWhat is $2 \\cdot 3 - 1$? Give the value of $x = 2x_0 + \\frac{3}{1}$ as well.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    for row in rows:
        ended = row["response_tokens"][-1] == tokenizer.eos_token_id
        assert ended == (row["finish_reason"] == "stop")
        assert ended or len(row["response_tokens"]) == 24
        assert row["response"] == tokenizer.decode(row["response_tokens"], skip_special_tokens=True)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_a_killed_evaluation_continues_to_the_same_table(output: Path, assets: Path, tmp_path: Path) -> None:
    killed = tmp_path / "out"
    process = subprocess.Popen(command(assets, killed), cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (killed / f"{NAMES[0]}.parquet").exists():
            assert process.poll() is None, "the evaluation ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert not (killed / "evaluation.json").exists()
    psutil.wait_procs(family, timeout=60)
    first = (killed / f"{NAMES[0]}.parquet").stat().st_mtime_ns
    subprocess.run(command(assets, killed), check=True, cwd=ROOT, timeout=400)
    assert (killed / f"{NAMES[0]}.parquet").stat().st_mtime_ns == first, "what was complete is kept"
    for file in ("evaluation.json", "table.md"):
        assert (killed / file).read_bytes() == (output / file).read_bytes()


def test_a_finished_evaluation_is_summarised_without_engines_and_other_settings_are_refused(
    output: Path, assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (output / "evaluation.json").read_bytes()
    begin = time.monotonic()
    subprocess.run(command(assets, output), check=True, cwd=ROOT, timeout=100)
    assert time.monotonic() - begin < 60
    assert (output / "evaluation.json").read_bytes() == before
    assert main(command(assets, output, "--seed", "2")[3:]) == 2
    assert "math500: seed" in capsys.readouterr().err


def test_everything_wrong_is_said_at_once(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", assets / "model", "--benchmarks", "a=nowhere.jsonl", "b", "--samples", "2", "c=3"]
    arguments = [*words, "--temperature", "0", "--max-tokens", "9000", "--output-dir", tmp_path / "out"]
    assert main(["evaluate", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    for part in ("'b': expected NAME=FILE", "nowhere.jsonl: no such file", "called 'c'", "temperature=0", "4096"):
        assert part in told
    assert not (tmp_path / "out").exists()
