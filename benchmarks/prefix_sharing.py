"""What it saves on a CPU to compute a prompt once for all its responses (`policy.prefix_sharing`).

    python benchmarks/prefix_sharing.py [--output-dir DIR] [--repetitions N] [--layers N]

The policy of `cpu_step`, of SmolLM2-135M's shape with random weights, in float32 on one thread: `score` and `update` of
several responses to each of several prompts, with whole sequences and with shared prompts. Both in turn, on one policy
after the other; the figure is the least CPU time of the process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_step import VOCABULARY, write_model
from benchmarks.machine import cpu_model
from benchmarks.markdown import markdown_table
from benchmarks.policies import policy
from benchmarks.ranks import run_processes
from megatron_entropic.policy.local_ranks import held_port
from megatron_entropic.types import Sequence

HEADER = ["prompts x responses", "tokens of each", "laid", "step", "whole, s", "shared, s", "whole / shared"]
RESPONSES = 8


@dataclass(frozen=True)
class Batch:
    """Lengths of a batch."""

    prompts: int
    prompt_tokens: int
    response_tokens: int

    def sequences(self) -> list[Sequence]:
        """Random tokens, with every field that a loss reads."""
        generator = torch.Generator().manual_seed(1)
        sequences = []
        for _ in range(self.prompts):
            prompt = torch.randint(VOCABULARY, (self.prompt_tokens,), generator=generator)
            for _ in range(RESPONSES):
                response = torch.randint(VOCABULARY, (self.response_tokens,), generator=generator)
                sequences.append(
                    Sequence(
                        tokens=torch.cat((prompt, response)),
                        prompt_length=self.prompt_tokens,
                        advantages=torch.randn(self.response_tokens, generator=generator),
                        old_logprobs=torch.randn(self.response_tokens, generator=generator) - 10.0,
                    )
                )
        return sequences


BATCHES = (Batch(8, 20, 4), Batch(8, 120, 24), Batch(4, 64, 128))
"""Sums behind a solved example; word problems behind four; short questions with longer answers."""


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hf_dir = Path(folder) / "model"
        write_model(hf_dir, options.layers)
        for batch in BATCHES:
            seconds = {}
            for sharing in ("off", "auto"):
                with held_port() as port:
                    place = (hf_dir, port, batch, sharing, options.repetitions)
                    seconds[sharing] = list(run_processes(_on_rank, 1, *place, timeout_s=options.timeout))
            for (step, whole, _), (_, shared, laid) in zip(seconds["off"], seconds["auto"], strict=True):
                rows.append(
                    [
                        f"{batch.prompts} x {RESPONSES}",
                        f"{batch.prompt_tokens} + {batch.response_tokens}",
                        f"{laid:.0%}",
                        step,
                        f"{whole:.2f}",
                        f"{shared:.2f}",
                        f"{whole / shared:.2f}",
                    ]
                )
                console.print("  ".join(rows[-1]))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "prefix_sharing.md"
    path.write_text(f"{cpu_model()}, one thread\n\n{markdown_table(HEADER, rows)}\n", encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _on_rank(
    rank: int, ranks: int, hf_dir: Path, port: int, batch: Batch, sharing: str, repetitions: int
) -> Iterator[tuple[str, float, float]]:
    """Each step with its least CPU seconds, and laid tokens over all tokens."""
    torch.set_num_threads(1)
    sections: dict[str, Any] = {
        "policy": {"tokens_per_microbatch": 2048, "prefix_sharing": sharing},
        "rollout": {"max_response_tokens": batch.response_tokens, "temperature": 1.0},
        # Repeated updates must not change what is computed: the same work, whatever the weights.
        "optimizer": {"learning_rate": 1e-12},
    }
    sequences = batch.sequences()
    with policy(rank, ranks, port, hf_dir, **sections) as one:
        one.score(sequences)  # the first of each allocates
        shared = one.update(sequences)["batch/shared_fraction"]
        for name, step in (("score", one.score), ("update", one.update)):
            taken = []
            for _ in range(repetitions):
                start = time.process_time()
                step(sequences)
                taken.append(time.process_time() - start)
            yield name, min(taken), 1 - shared


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Shared prompts beside whole sequences, on a CPU.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for prefix_sharing.md")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="fewer for a quick look; the output head stays")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one batch")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
