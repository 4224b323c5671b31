"""The whole loop, for real: TP=2 megatron-core policy and a vLLM engine, interrupted and not."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from training_run import Run

from megatron_entropic.weights.conversion import hf_to_megatron

PUBLIC_METRICS = """
step entropy/mean entropy/target entropy/alpha entropy/alpha_unclipped entropy/integral entropy/high_prob_fraction
reward/mean reward/solved_none reward/solved_all loss/policy loss/entropic ratio/clip_fraction grad_norm
mismatch/logprob_abs_mean mismatch/logprob_abs_max response/length_mean throughput/tokens_per_s
time/step_s time/generate_s time/score_s time/update_s time/publish_s weights/version memory/peak_mb
""".split()


@pytest.fixture(scope="module")
def uninterrupted(countdown_run: Callable[..., Run]) -> Run:
    run = countdown_run("uninterrupted")
    run.finish()
    return run


def _wait_for_step(run: Run, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 400
    while len(run.metrics()) < step:
        assert process.poll() is None, run.log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)


def _await_end_of(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, f"left behind: {alive}"


def test_every_step_reports_the_public_metrics(uninterrupted: Run) -> None:
    rows = uninterrupted.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert not set(PUBLIC_METRICS) - set(row)
        assert row["weights/version"] == row["step"] - 1
        assert row["optimizer/skipped"] == 0
        assert 0 < row["entropy/mean"] < math.log(19)
        assert abs(row["entropy/alpha"]) <= 1
        assert row["batch/padding_fraction"] == 0
        assert row["batch/imbalance"] >= 0


def test_training_equals_rollout_after_every_publication(uninterrupted: Run) -> None:
    rows = uninterrupted.metrics()
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-3
    assert max(row["mismatch/logprob_abs_mean"] for row in rows) <= 1e-5
    assert any(row["mismatch/logprob_abs_max"] > 0 for row in rows), "two programs never agree to the last bit"


def test_the_weights_move(uninterrupted: Run, countdown_dir: Path) -> None:
    from safetensors.torch import load_file

    before = load_file(countdown_dir / "model/model.safetensors")
    after = load_file(uninterrupted.directory / "hf/model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert any(row["grad_norm"] > 0 for row in uninterrupted.metrics())


def test_the_export_loads_in_transformers_with_the_entropy_that_the_policy_had(uninterrupted: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = uninterrupted.directory / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)("3,7,5>26:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        distribution = torch.distributions.Categorical(logits=model(tokens).logits[0, -1])
    # After the warm start a digit comes first; an untrained model is near log(19) = 2.94 nats.
    assert float(distribution.entropy()) < 2.6


def test_score_agrees_over_backends_and_layouts_on_the_export(uninterrupted: Run, tmp_path: Path) -> None:
    draw = random.Random(5)
    lines = [{"tokens": [draw.randrange(19) for _ in range(length)], "prompt_length": 4} for length in (5, 17, 9, 12)]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {}
    for name, options in {
        "transformers": ["--backend", "transformers"],
        "vllm": ["--backend", "vllm"],
        "tensor": ["--tensor-parallel", "2", "--sequence-parallel"],
    }.items():
        output = tmp_path / f"{name}.jsonl"
        files = ["--hf-dir", uninterrupted.directory / "hf", "--tokens", tmp_path / "tokens.jsonl", "--output", output]
        command = [sys.executable, "-m", "megatron_entropic.cli", "score", *map(str, files), *options]
        subprocess.run(command, check=True, timeout=300)
        scores[name] = [json.loads(line) for line in output.read_text().splitlines()]
    for name, limit in {"vllm": 1e-4, "tensor": 1e-5}.items():
        for ours, reference in zip(scores[name], scores["transformers"], strict=True):
            assert ours["logprobs"] == pytest.approx(reference["logprobs"], abs=limit)
            if name == "vllm":
                assert ours["entropies"] is None
            else:
                assert ours["entropies"] == pytest.approx(reference["entropies"], abs=limit)


def test_a_finished_run_is_left_alone(uninterrupted: Run) -> None:
    before = (uninterrupted.directory / "metrics.jsonl").read_bytes()
    exported = (uninterrupted.directory / "hf/model.safetensors").stat().st_mtime_ns
    uninterrupted.finish()
    assert (uninterrupted.directory / "metrics.jsonl").read_bytes() == before
    assert (uninterrupted.directory / "hf/model.safetensors").stat().st_mtime_ns == exported


@pytest.mark.parametrize("victim", ["driver", "engine"])
def test_a_killed_run_continues_bit_for_bit(victim: str, uninterrupted: Run, countdown_run: Callable[..., Run]) -> None:
    run = countdown_run(f"killed_{victim}")
    process = run.start()
    step = random.Random(victim).randint(1, 4)
    try:
        _wait_for_step(run, process, step)
        family = psutil.Process(process.pid).children(recursive=True)
        if victim == "driver":
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
        else:
            engine = next(p for p in family if "EngineWorker" in " ".join(p.cmdline()))
            engine.kill()
            assert process.wait(timeout=200) == 1
    finally:
        process.kill()
    _await_end_of(family)
    if victim == "engine":
        message = run.log.read_text(encoding="utf-8")
        assert "engine 0 died" in message
        assert "Traceback" not in message
        assert (run.directory / "error.log").exists()
    run.finish()
    assert run.reproducible_metrics() == uninterrupted.reproducible_metrics()


def test_a_lost_policy_rank_and_a_damaged_checkpoint_do_not_end_the_run(
    uninterrupted: Run, countdown_run: Callable[..., Run]
) -> None:
    run = countdown_run("restarted", "cluster.max_restarts=1", "checkpoint.every_steps=1")
    process = run.start()
    try:
        _wait_for_step(run, process, 3)
        family = psutil.Process(process.pid).children(recursive=True)
        rank = next(p for p in family if "PolicyWorker" in " ".join(p.cmdline()))
        process.send_signal(signal.SIGSTOP)  # while nothing can be saved, the newest checkpoint is spoilt
        rank.kill()
        time.sleep(1)  # a save that was all but done
        newest = max((run.directory / "checkpoints").glob("step_*"))
        tensors = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        tensors.write_bytes(bytes(tensors.stat().st_size))
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=400) == 0, run.log.read_text(encoding="utf-8")
    finally:
        process.kill()
    (row,) = [json.loads(line) for line in (run.directory / "restarts.jsonl").read_text().splitlines()]
    assert row["cause"] == "PeerDied"
    assert re.search(r"the process of policy rank \d died", row["message"])
    assert f"{newest.name} is damaged" in run.log.read_text(encoding="utf-8")
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert run.reproducible_metrics() == uninterrupted.reproducible_metrics()


def test_taking_turns_on_the_same_devices_changes_nothing(
    uninterrupted: Run, countdown_run: Callable[..., Run], countdown_dir: Path
) -> None:
    run = countdown_run(
        "colocated",
        "cluster.colocate=true",
        "policy.offload=all",
        f"evaluation.benchmarks={{train: {countdown_dir / 'heldout.parquet'}}}",
        "evaluation.every_steps=4",
        "evaluation.samples_per_prompt=1",
        "evaluation.max_response_tokens=1",
    )
    run.finish()
    rows = [{k: v for k, v in row.items() if "evaluation" not in k} for row in run.reproducible_metrics()]
    assert rows == uninterrupted.reproducible_metrics()
    assert all(row["memory/offloaded_mb"] > 1 for row in run.metrics())


def test_another_layout_and_a_converted_start_sample_and_measure_the_same(
    uninterrupted: Run, countdown_run: Callable[..., Run], countdown_dir: Path, tmp_path: Path
) -> None:
    hf_to_megatron(countdown_dir / "model", tmp_path / "converted")
    run = countdown_run(
        "layout",
        f"model.hf_dir={tmp_path / 'converted'}",
        f"model.megatron_dir={tmp_path / 'converted'}",
        "policy.tensor_parallel=1",
        "policy.pipeline_parallel=1",
        "policy.data_parallel=2",
        "rollout.engines=2",
        "train.steps=2",
        "policy.tokens_per_microbatch=200",
        "policy.offload=optimizer",
    )
    run.finish()
    for ours, theirs in zip(run.metrics(), uninterrupted.metrics(), strict=False):
        assert ours["reward/mean"] == theirs["reward/mean"]
        assert ours["response/length_mean"] == theirs["response/length_mean"]
        assert ours["entropy/mean"] == pytest.approx(theirs["entropy/mean"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_every_option_at_once(countdown_run: Callable[..., Run], countdown_dir: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.parquet"
    pq.write_table(pq.read_table(countdown_dir / "heldout.parquet").slice(0, 6), heldout)
    run = countdown_run(
        "options",
        "policy.tensor_parallel=1",
        "policy.pipeline_parallel=3",
        "policy.distributed_optimizer=false",
        "rollout.importance_correction=tis",
        "rollout.temperature=0.8",
        "rollout.publish=delta",
        "cluster.check_weights=true",
        "policy.offload=all",
        "checkpoint.export_every_steps=1",
        "algorithm.advantage=rloo",
        "algorithm.aggregation=seq-mean-token-sum-norm",
        "algorithm.optimizer_steps_per_rollout=2",
        "algorithm.kl.coefficient=0.1",
        "entropy_control.denominator=all_tokens",
        "entropy_control.ratio_clip=ppo",
        "train.steps=3",
        f"evaluation.benchmarks={{heldout: {heldout}}}",
        "evaluation.every_steps=2",
        "evaluation.samples_per_prompt=2",
    )
    run.finish()
    rows = run.metrics()
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-3
    assert all(math.isfinite(row["loss/policy"]) for row in rows)
    assert rows[-1]["loss/kl"] > 0, "the policy has left its reference"
    assert all(row["memory/offloaded_mb"] > 1 and row["memory/rollout_mb"] > 100 for row in rows)
    assert [("evaluation/heldout/avg" in row) for row in rows] == [False, True, False]
    stored = pq.read_table(run.directory / "evaluations/step_000002/heldout.parquet").to_pylist()
    assert len(stored) == 12
    assert rows[1]["evaluation/heldout/length_mean"] == sum(len(row["response_tokens"]) for row in stored) / 12
    assert rows[2]["time/evaluate_s"] > 0
    assert all(0.9 < row["weights/published_fraction"] <= 1 for row in rows), "float32 weights all change"
    exports = run.directory / "exports"
    assert sorted(path.name for path in exports.iterdir()) == ["step_000002", "step_000003"]
    last = (exports / "step_000003" / "model.safetensors").read_bytes()
    assert last == (run.directory / "hf" / "model.safetensors").read_bytes()
    assert last != (exports / "step_000002" / "model.safetensors").read_bytes()
    samples = [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    assert {(sample["step"], sample["weights_version"]) for sample in samples} == {(1, 0), (2, 1), (3, 2)}
