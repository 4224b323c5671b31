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
from chaos import SETTINGS, Chaos
from training_run import Run

from megatron_entropic.checkpoints.convert import hf_to_megatron
from megatron_entropic.cli import main
from megatron_entropic.observability.records import recorded_steps

PUBLIC_METRICS = """
step entropy/mean entropy/target entropy/alpha entropy/alpha_unclipped entropy/integral entropy/high_prob_fraction
reward/mean reward/solved_none reward/solved_all loss/policy loss/entropic ratio/clip_fraction grad_norm
mismatch/logprob_abs_mean mismatch/logprob_abs_max response/length_mean throughput/tokens_per_s
time/step_s time/generate_s time/score_s time/update_s time/publish_s weights/version memory/peak_mb
""".split()


@pytest.fixture(scope="module")
def uninterrupted(countdown_run: Callable[..., Run]) -> Run:
    run = countdown_run("uninterrupted", "train.record_steps=[3]")
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
        arguments = ["score", *map(str, files), *options]
        if name == "vllm":
            command = [sys.executable, "-m", "megatron_entropic.cli", *arguments]
            subprocess.run(command, check=True, timeout=300)
        else:
            assert main(arguments) == 0
        scores[name] = [json.loads(line) for line in output.read_text().splitlines()]
    for name, limit in {"vllm": 1e-4, "tensor": 1e-5}.items():
        for ours, reference in zip(scores[name], scores["transformers"], strict=True):
            assert ours["logprobs"] == pytest.approx(reference["logprobs"], abs=limit)
            if name == "vllm":
                assert ours["entropies"] is None
            else:
                assert ours["entropies"] == pytest.approx(reference["entropies"], abs=limit)


def test_a_recorded_step_is_computed_again_by_one_rank_alone(
    uninterrupted: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _replay(uninterrupted, step=3)
    assert shown.returncode == 0, shown.stderr
    rows = dict(re.findall(r"\u2502 (\S+)(?:, largest over tokens)? +\u2502.*\u2502 +(\S+) \u2502", shown.stdout))
    assert float(rows["old_logprobs"]) <= 1e-4
    assert float(rows["entropies"]) <= 1e-4
    assert float(rows["advantages"]) == 0
    for name, limit in {"entropy/mean": 1e-5, "entropy/alpha": 1e-4, "loss/policy": 1e-5, "grad_norm": 1e-3}.items():
        assert abs(float(rows[name])) <= limit, name
    assert main(["replay", str(uninterrupted.directory), "--step", "2"]) == 2
    assert "the rollouts of step 2 were not kept (kept: 3)" in capsys.readouterr().err


def _replay(run: Run, step: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_entropic.cli", "replay", str(run.directory), "--step", str(step)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_finished_run_is_left_alone(uninterrupted: Run) -> None:
    before = (uninterrupted.directory / "metrics.jsonl").read_bytes()
    exported = (uninterrupted.directory / "hf/model.safetensors").stat().st_mtime_ns
    uninterrupted.finish()
    assert (uninterrupted.directory / "metrics.jsonl").read_bytes() == before
    assert (uninterrupted.directory / "hf/model.safetensors").stat().st_mtime_ns == exported


def test_a_killed_driver_leaves_no_process_and_the_run_continues_bit_for_bit(
    uninterrupted: Run, countdown_run: Callable[..., Run]
) -> None:
    recording = ("logging.rollouts_every_steps=1", "logging.rollouts_keep_last=2")
    run = countdown_run("killed_driver", "logging.wandb=offline", *recording)
    process = run.start()
    try:
        _wait_for_step(run, process, 3)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        process.kill()
    _await_end_of(family)
    run.finish()
    assert run.reproducible_metrics() == uninterrupted.reproducible_metrics()
    assert recorded_steps(run.directory) == [5, 6]
    offline = [path.name for path in run.directory.glob("wandb/offline-run-*/*.wandb")]
    assert offline == [f"run-{(run.directory / 'wandb_run_id').read_text().strip()}.wandb"] * 2, "one W&B run"


def test_lost_engines_are_replaced_within_the_step_bit_for_bit(
    uninterrupted: Run, countdown_run: Callable[..., Run]
) -> None:
    run = countdown_run("lost_engines", "cluster.max_engine_restarts=1")
    process = run.start()
    try:
        _wait_for_step(run, process, 2)
        _engine_of(process).kill()
        _wait_for_step(run, process, 4)
        family = psutil.Process(process.pid).children(recursive=True)
        _engine_of(process).kill()
        assert process.wait(timeout=200) == 1
    finally:
        process.kill()
    _await_end_of(family)
    rows = run.metrics()
    assert sum(row["cluster/engine_restarts"] for row in rows) == 1
    (row,) = [json.loads(line) for line in (run.directory / "restarts.jsonl").read_text().splitlines()]
    assert row["restarted"] == "engine"
    message = run.log.read_text(encoding="utf-8")
    assert "engine 0 died" in message
    assert "Traceback" not in message
    assert (run.directory / "error.log").exists()
    run.finish()
    assert run.reproducible_metrics() == uninterrupted.reproducible_metrics()


def _engine_of(process: subprocess.Popen[str]) -> psutil.Process:
    family = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in family if "EngineWorker" in " ".join(child.cmdline()))


def test_faults_of_every_kind_leave_no_trace(uninterrupted: Run, countdown_run: Callable[..., Run]) -> None:
    run = countdown_run("chaos", *SETTINGS, "train.steps=20")
    chaos = Chaos(
        run, ["stop_policy_rank", "limit_file_size", "spoil_checkpoint", "kill_policy_rank"], random.Random(3)
    )
    chaos.go()
    assert not chaos.violations
    assert [row["step"] for row in run.metrics()] == list(range(1, 21))
    assert run.reproducible_metrics()[:6] == uninterrupted.reproducible_metrics()
    causes = [json.loads(line) for line in (run.directory / "restarts.jsonl").read_text().splitlines()]
    assert {row["restarted"] for row in causes} == {"run"}
    assert any(re.search(r"the process of policy rank \d died", row["message"]) for row in causes)
    (silence,) = [row["message"] for row in causes if row["cause"] == "PhaseTimeout"]
    folder = re.search(r"what every process was doing is in (\S+): engine_0.txt, policy_rank_0.txt", silence)
    assert folder, silence
    stacks = {path.name: path.read_text() for path in Path(folder[1]).iterdir()}
    assert sum("State:\tT (stopped)" in text for text in stacks.values()) == 1
    assert any("most recent call first" in text for text in stacks.values())
    log = run.log.read_text(encoding="utf-8")
    assert re.search(r"error: .*policy rank \d: CheckpointError: checkpoint \S+ could not be written: rank \d", log)
    assert re.search(r"step_\d+ is damaged: \S+ changed after it was written; it is set aside", log)
    assert chaos.summary["checkpoints set aside"] == 1


def test_engines_of_two_workers_taking_turns_with_the_policy_change_nothing(
    countdown_run: Callable[..., Run], countdown_dir: Path
) -> None:
    settings = ("rollout.tensor_parallel=2", "cluster.check_weights=true", "train.steps=4")
    apart = countdown_run("apart", *settings)
    apart.finish()
    run = countdown_run(
        "colocated",
        *settings,
        "cluster.colocate=true",
        "policy.offload=all",
        f"evaluation.benchmarks={{train: {countdown_dir / 'heldout.parquet'}}}",
        "evaluation.every_steps=2",
        "evaluation.samples_per_prompt=1",
        "evaluation.max_response_tokens=1",
    )
    run.finish()
    rows = [{k: v for k, v in row.items() if "evaluation" not in k} for row in run.reproducible_metrics()]
    assert len(rows) == 4
    assert rows == apart.reproducible_metrics()
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
        f"algorithm.distillation={{teacher_hf_dir: {countdown_dir / 'model'}, term: loss}}",
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
    assert all(0 < row["distillation/kl"] < 20 for row in rows), "an untrained teacher of the trained policy"
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
