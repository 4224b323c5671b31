"""What a checkpoint costs a training run, and what share of a step the driver takes for itself.

    python benchmarks/checkpoint_overhead.py [--output-dir DIR] [--steps N]

Whole runs of the Countdown example with a larger model: two tensor-parallel policy ranks, one engine. Within one run
every second step is followed by a checkpoint. The blocking part of a save, and the writing beside generation, fall into
the next step: the figure is the median time of the steps after a save over that of the others. One run writes in the
background, one waits for its files. The driver's share is what is neither generate, score, update nor publish, of the
steps that no checkpoint precedes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.policies import ModelSize, write_model

ROOT = Path(__file__).resolve().parents[1]
SIZE = ModelSize(layers=3, hidden=192, ffn=576, heads=4, vocab=19)
WARM_UP_STEPS = 2
HEADER = ["writing", "state, MB", "step, s", "step after a checkpoint, s", "ratio", "driver's share"]


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        assets = _assets(Path(folder))
        for name, asynchronous in (("in the background", True), ("awaited", False)):
            run_dir = Path(folder) / name.replace(" ", "_")
            _train(assets, run_dir, options.steps, asynchronous, options.timeout)
            rows.append([name, *_figures(run_dir)])
            console.print("  ".join(rows[-1]))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "checkpoint_overhead.md"
    path.write_text(markdown_table(HEADER, rows) + "\n", encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _assets(folder: Path) -> Path:
    """Data and tokenizer of the example with a model whose state is large enough to be felt."""
    assets = folder / "assets"
    prepare = [sys.executable, str(ROOT / "examples/countdown/prepare.py"), "--output", str(assets)]
    subprocess.run(prepare, check=True, timeout=300)
    write_model(SIZE, folder / "model")
    for file in (assets / "model").iterdir():
        if "token" in file.name or file.name == "generation_config.json":
            shutil.copy(file, folder / "model")
    shutil.rmtree(assets / "model")
    (folder / "model").rename(assets / "model")
    return assets


def _train(assets: Path, run_dir: Path, steps: int, asynchronous: bool, timeout_s: float) -> None:
    settings = {
        "run.output_dir": run_dir,
        "model.hf_dir": assets / "model",
        "data.train_files": assets / "train.parquet",
        "rollout.prompts_per_step": 128,
        "warm_start.steps": 0,
        "train.steps": steps,
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 1,
        "checkpoint.export_hf": "false",
        "checkpoint.asynchronous": str(asynchronous).lower(),
        "logging.wandb": "off",
        "logging.tensorboard": "false",
    }
    command = [sys.executable, "-m", "megatron_entropic.cli", "train", str(ROOT / "examples/countdown_cpu.yaml")]
    command += [f"{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (run_dir.parent / "train.log").open("w", encoding="utf-8") as log:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=timeout_s, check=False
        )
    if result.returncode:
        raise RuntimeError((run_dir.parent / "train.log").read_text(encoding="utf-8"))


def _figures(run_dir: Path) -> list[str]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if row["step"] > WARM_UP_STEPS]
    after = [row for row in rows if row["step"] % 2 == 1]
    others = [row for row in rows if row["step"] % 2 == 0]
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    state_mb = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e6
    slow, plain = (statistics.median(row["time/step_s"] for row in part) for part in (after, others))
    share = statistics.median(row["time/driver_fraction"] for row in others)
    return [f"{state_mb:.1f}", f"{plain:.2f}", f"{slow:.2f}", f"{slow / plain:.3f}", f"{share:.3f}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time of steps after a checkpoint beside that of the others.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for checkpoint_overhead.md")
    parser.add_argument("--steps", type=int, default=30, help="of each run; half of them are followed by a checkpoint")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
