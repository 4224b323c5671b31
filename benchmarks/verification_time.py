"""How much of a training step is spent on verifiers: `python -m benchmarks.verification_time FOLDER [KEY=VALUE ...]`.

A tiny random Qwen3 answers problems in up to 256 tokens, 512 responses a step. It never writes a box, so that a
verifier of the tests lets math-verify parse the beginning of each response as if it stood in one. FOLDER is made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from tests.end_to_end.math_assets import PROBLEMS, write_model
from tests.end_to_end.training_run import Run

_COLUMNS = ("step_s", "generate_s", "reward_s", "reward_fraction")


def settings(folder: Path) -> dict[str, object]:
    """Configuration of the run, its model and problems written to `folder`."""
    problems = folder / "train.jsonl"
    problems.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in PROBLEMS), encoding="utf-8")
    return {
        "run": {"name": "verification", "output_dir": str(folder / "run")},
        "model": {"hf_dir": str(write_model(folder / "model")), "dtype": "float32"},
        "data": {"train_files": str(problems), "max_prompt_tokens": 128, "apply_chat_template": True},
        "reward": {
            "verifier": "tests.end_to_end.string_rewards:first_digit_is_even",
            "added": {"tests.end_to_end.string_rewards:boxed_as_it_is": 1.0, "math": 1.0},
        },
        "rollout": {
            "prompts_per_step": 16,
            "samples_per_prompt": 32,
            "max_response_tokens": 256,
            "kv_cache_gb": 0.3,
        },
        "train": {"steps": 5},
        "logging": {"wandb": "off", "tensorboard": False},
        "cluster": {"device": "cpu"},
    }


def main(folder: Path, *overrides: str) -> None:
    """Train, and show the times of every step."""
    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(folder)), encoding="utf-8")
    run = Run(folder / "run", [str(config), *overrides])
    run.finish()
    sys.stdout.write("step  " + "  ".join(_COLUMNS) + "  mean_tokens\n")
    for row in run.metrics():
        times = "  ".join(f"{row[f'time/{column}']:.3f}" for column in _COLUMNS)
        sys.stdout.write(f"{row['step']}  {times}  {row['response/length_mean']:.0f}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
