"""Countdown in TRL, with and without entropy control, over seeds; held-out reward and entropy of each run.

    PYTHONPATH=.venv/hosts .venv/bin/python examples/trl/countdown.py --output runs/trl_countdown

Each run starts from the quickstart's model after the same supervised steps. Runs that `results.jsonl` has are not run
again, so that an interrupted call is simply repeated; the table in docs/plugins/trl.md is what it holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "countdown"))

CONTROL = {"target": 0.5, "kp": 10.0, "ki": 0.5, "tau": 0.7}
"""The quickstart's controller, with TRL's denominator."""
MAX_RESPONSE_TOKENS = 6


def prompt_rows(file: Path) -> list[dict[str, str]]:
    """Rows of a prompt file as TRL takes them: the text and what the reward needs."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(file).to_pylist()
    return [
        {"prompt": row["prompt"][0]["content"], "ground_truth": row["reward_model"]["ground_truth"]} for row in rows
    ]


def countdown_reward(completions: Sequence[str], ground_truth: Sequence[str], **others: Any) -> list[float]:
    """TRL's reward function: our verifier of Countdown."""
    from megatron_entropic.rewards.verifiers.countdown import countdown

    return [countdown(text, truth, {}) for text, truth in zip(completions, ground_truth, strict=True)]


def warm_start(assets: Path, folder: Path, steps: int, seed: int = 1) -> None:
    """Train the random model of `assets` on right answers, as the quickstart does, and save it with its tokenizer."""
    import pyarrow.parquet
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    pairs = pyarrow.parquet.read_table(assets / "warm_start.parquet").to_pylist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        chosen = [pairs[(step * 256 + index) % len(pairs)] for index in range(256)]
        rows = [tokenizer(pair["prompt"])["input_ids"] for pair in chosen]
        answers = [tokenizer(pair["response"])["input_ids"] + [tokenizer.eos_token_id] for pair in chosen]
        width = max(len(row) + len(answer) for row, answer in zip(rows, answers, strict=True))
        tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            tokens[index, : len(row) + len(answer)] = torch.tensor(row + answer)
            labels[index, len(row) : len(row) + len(answer)] = torch.tensor(answer)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_trainer(
    model_dir: Path, rows: list[dict[str, str]], output: Path, control: Mapping[str, Any] | None, **settings: Any
) -> Any:
    """Make TRL's trainer, or ours with control: the class and one argument are the whole difference."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from megatron_entropic.plugins.trl import EntropicGRPOTrainer

    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 128,
        "gradient_accumulation_steps": 2,
        "num_generations": 8,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "temperature": 1.0,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    arguments = GRPOConfig(
        output_dir=str(output),
        max_completion_length=MAX_RESPONSE_TOKENS,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **{**defaults, **settings},
    )
    common: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        "args": arguments,
        "train_dataset": Dataset.from_list(rows),
        "reward_funcs": countdown_reward,
        "processing_class": AutoTokenizer.from_pretrained(model_dir),
    }
    if control is None:
        return GRPOTrainer(**common)
    return EntropicGRPOTrainer(entropy_control=control, **common)


def heldout_reward(trainer: Any, rows: list[dict[str, str]], samples: int = 8) -> float:
    """Mean reward of sampled answers to held-out problems."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    generator_state = torch.get_rng_state()
    torch.manual_seed(1234)
    inputs = tokenizer([row["prompt"] for row in rows for _ in range(samples)], return_tensors="pt", padding=True)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )
    torch.set_rng_state(generator_state)
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    truths = [row["ground_truth"] for row in rows for _ in range(samples)]
    rewards = countdown_reward(texts, truths)
    return sum(rewards) / len(rewards)


def entropies(trainer: Any) -> list[float]:
    """Entropy of each optimizer step as TRL logged it, nats."""
    return [row["entropy"] for row in trainer.state.log_history if "entropy" in row]


def main() -> None:
    """Run what is missing."""
    from prepare import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    assets, start, results = options.output / "assets", options.output / "start", options.output / "results.jsonl"
    prepare(assets)
    if not (start / "tokenizer_config.json").exists():
        warm_start(assets, start, steps=150)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    done = {(row["seed"], row["control"]) for row in map(json.loads, lines)}
    train, heldout = prompt_rows(assets / "train.parquet"), prompt_rows(assets / "heldout.parquet")
    for seed in range(1, options.seeds + 1):
        for controlled in (True, False):
            if (seed, controlled) in done:
                continue
            folder = options.output / f"{seed}_{controlled}"
            trainer = build_trainer(
                start, train, folder, CONTROL if controlled else None, seed=seed, max_steps=options.steps
            )
            before = heldout_reward(trainer, heldout)
            trainer.model.train()
            trainer.train()
            measured = entropies(trainer)
            row = {
                "seed": seed,
                "control": controlled,
                "steps": options.steps,
                "heldout_before": before,
                "heldout_after": heldout_reward(trainer, heldout),
                "entropy_last_quarter": sum(measured[-options.steps // 4 :]) / (options.steps // 4),
                "entropy": [round(value, 4) for value in measured],
            }
            if controlled:
                row["alpha"] = [log["entropy/alpha"] for log in trainer.state.log_history if "entropy/alpha" in log]
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
