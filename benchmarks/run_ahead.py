"""What a lag gives: wall time of a step beside that of its slower side, measured and as the plan's simulation says.

    python benchmarks/run_ahead.py [--output-dir DIR] [--lags 0 1 2] [--steps N] [--response-tokens N]

The countdown example with one policy rank and one engine, a core each, and responses of up to `--response-tokens`
tokens from an untrained model, whose lengths have a long tail. With lag 0 the phases are measured apart: what engines
cost by forward pass and by token is fitted to them and to the recorded lengths, and the simulation of
`megatron-entropic plan --lag` is given that. Every run is continued where it was interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import cpu_model
from benchmarks.markdown import markdown_table
from megatron_entropic.observability.metrics import read_metrics
from megatron_entropic.observability.records import read_rollouts, recorded_steps, rollouts_path
from megatron_entropic.planning.ahead import Learning, ahead_time
from megatron_entropic.planning.decoding import EngineLoad, StepRates

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 4
CONCURRENT = 64
HEADER = [
    "lag",
    "step, s",
    "slower side, s",
    "step / slower side",
    "predicted, s",
    "predicted / measured",
    "engines at work",
    "predicted",
    "mean age",
    "predicted",
]


def settings(directory: Path, assets: Path, options: argparse.Namespace, lag: int) -> list[str]:
    """Overrides of examples/countdown_cpu.yaml."""
    values = {
        "run.output_dir": directory,
        "model.hf_dir": assets / "model",
        "data.train_files": assets / "train.parquet",
        "warm_start.steps": 0,
        "train.steps": options.steps,
        "rollout.lag": lag,
        "rollout.engines": 1,
        "rollout.prompts_per_step": 16,
        "rollout.samples_per_prompt": 8,
        "rollout.max_concurrent_sequences": CONCURRENT,
        "rollout.max_response_tokens": options.response_tokens,
        "rollout.importance_correction": "tis",
        "policy.tensor_parallel": 1,
        "policy.sequence_parallel": False,
        "checkpoint.every_steps": 0,
        "checkpoint.export_hf": False,
        "logging.wandb": "off",
        "logging.rollouts_every_steps": 1,
        "logging.rollouts_keep_last": "null",
    }
    return [f"{key}={value}" for key, value in values.items()]


def run(directory: Path, assets: Path, options: argparse.Namespace, lag: int) -> None:
    """Train to the last step."""
    command = [sys.executable, "-m", "megatron_entropic.cli", "train", str(ROOT / "examples/countdown_cpu.yaml")]
    subprocess.run(
        [*command, *settings(directory, assets, options, lag)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        check=True,
        timeout=3000,
    )


def lengths_of(directory: Path) -> dict[int, list[int]]:
    """Lengths of the responses of each recorded step."""
    return {
        step: [one.trajectory.response_length for one in read_rollouts(rollouts_path(directory, step)).responses]
        for step in recorded_steps(directory)
    }


def passes_of(lengths: list[int]) -> int:
    """Forward passes in which an engine with room for CONCURRENT sequences answers all, in their order."""
    ends = [0] * min(CONCURRENT, len(lengths))
    for length in lengths:
        first = ends.index(min(ends))
        ends[first] += length
    return max(ends)


def engine_load(directory: Path) -> EngineLoad:
    """What the engine had to do with lag 0, and what it cost: seconds = a passes + b tokens, by least squares."""
    lengths = lengths_of(directory)
    rows = [row for row in read_metrics(directory) if row["step"] > WARM_UP_STEPS]
    work = np.array([[passes_of(lengths[row["step"]]), sum(lengths[row["step"]])] for row in rows], float)
    seconds = np.array([row["time/generate_s"] for row in rows])
    (pass_s, token_s), *_ = np.linalg.lstsq(work, seconds, rcond=None)
    rates = StepRates(
        weights_s=0.0,
        experts_s=0.0,
        expert_share=0.0,
        product_s=0.0,
        cache_s=0.0,
        fixed_s=float(max(0.0, pass_s)),
        sequence_s=float(max(0.0, token_s)),
    )
    typical = lengths[rows[len(rows) // 2]["step"]]
    return EngineLoad(typical, 1.0, CONCURRENT, rates, prompt_tokens=12, prefill_token_s=0.0)


def main() -> None:
    """Runs all lags and prints the table."""
    parser = argparse.ArgumentParser(description="Step time with rollouts that run ahead.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/run_ahead"))
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--response-tokens", type=int, default=48)
    options = parser.parse_args()
    folder = options.output_dir.absolute()
    assets = folder / "assets"
    if not (assets / "model").is_dir():
        prepare = [sys.executable, str(ROOT / "examples/countdown/prepare.py"), "--output", str(assets)]
        subprocess.run(prepare, check=True, timeout=300)
    for lag in sorted({0, *options.lags}):
        run(folder / f"lag_{lag}", assets, options, lag)
    alone = [row for row in read_metrics(folder / "lag_0") if row["step"] > WARM_UP_STEPS]
    phase = {
        name: median(row[f"time/{name}_s"] for row in alone) for name in ("generate", "score", "update", "publish")
    }
    load = engine_load(folder / "lag_0")
    rows = []
    for lag in sorted({0, *options.lags}):
        measured = [row for row in read_metrics(folder / f"lag_{lag}") if row["step"] > WARM_UP_STEPS]
        step_s = median(row["time/step_s"] for row in measured)
        rescore_s = phase["score"] if lag else 0.0
        learning = Learning(phase["score"] + phase["update"], phase["publish"], rescore_s)
        slower_s = max(phase["generate"], phase["score"] + phase["update"] + phase["publish"])
        found = ahead_time(load, learning, lag)
        busy = fmean(row.get("rollout/busy_fraction", phase["generate"] / step_s) for row in measured)
        age = fmean(row.get("staleness/versions_mean", 0.0) for row in measured)
        rows.append(
            [
                str(lag),
                f"{step_s:.3f}",
                f"{slower_s:.3f}",
                f"{step_s / slower_s:.2f}",
                f"{found.step_s:.3f}",
                f"{found.step_s / step_s:.2f}",
                f"{busy:.0%}",
                f"{found.engines_busy:.0%}",
                f"{age:.2f}",
                f"{found.mean_age:.2f}",
            ]
        )
    phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in phase.items())
    console = Console(highlight=False, width=200)
    console.print(f"{cpu_model()}; phases with lag 0, s: {phases}", soft_wrap=True)
    console.print(markdown_table(HEADER, rows), soft_wrap=True)


if __name__ == "__main__":
    main()
