"""What packing and balancing save on a long-tailed batch: padding, imbalance of replicas, time against padded batches.

    python benchmarks/batching.py [--prompts FILE] [--output-dir DIR] [--repetitions N]

Lengths of responses are log-normal, cut at a limit; those of prompts too, unless a file of problems gives them. The
first table is arithmetic with the packing code itself, for layouts of a Qwen3-8B. The second runs optimizer steps of a
small policy on this CPU, one process, packed and padded by turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.policies import ModelSize, policy, write_model
from benchmarks.ranks import run_processes
from megatron_entropic.data.rows import Problems, read_rows
from megatron_entropic.planning.parameters import KNOWN_MODELS, read_model
from megatron_entropic.policy.batch.balance import attention_weight, data_parallel_shards, sequence_costs
from megatron_entropic.policy.batch.microbatch import PackingRules, pack
from megatron_entropic.policy.batch.segments import ContextCut
from megatron_entropic.policy.local_ranks import held_port
from megatron_entropic.types import Sequence

SEQUENCES = 1024
BUDGET_TOKENS = 16384
PROMPT_MEDIAN_TOKENS, PROMPT_SIGMA = 90, 0.5
RESPONSE_MEDIAN_TOKENS, RESPONSE_SIGMA, RESPONSE_LIMIT_TOKENS = 1500, 0.9, 8192
CHARACTERS_PER_TOKEN = 3.5
"""Of English mathematics, roughly; used for the file of problems."""

LAYOUTS = {
    "DP 8": (8, PackingRules()),
    "DP 8, TP 4 with SP": (8, PackingRules(token_multiple=4)),
    "DP 8, CP 4": (8, PackingRules(cut=ContextCut(0, 4))),
    "DP 4, PP 4": (4, PackingRules()),
    "DP 4, PP 4, 2 chunks a stage": (4, PackingRules(count_multiple=4, equal_tokens=True)),
}

SIZE = ModelSize(layers=4, hidden=192, ffn=576, heads=4, vocab=2003)
TIMED_SEQUENCES = 48
SHRINK = 16
"""The timed lengths and budget are the others divided by this."""
NEIGHBOURS = 8
"""Sequences of a padded micro-batch in the variant that pads to its own longest."""


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    prompts = _prompt_lengths(options.prompts)
    tables = [markdown_table(["layout", "micro-batches", "padding", "imbalance", "dealt in order"], fill_rows(prompts))]
    console.print(tables[0], soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder, held_port() as port:
        write_model(SIZE, hf_dir := Path(folder) / "model")
        rows = list(run_processes(_on_rank, 1, hf_dir, port, prompts, options.repetitions, timeout_s=options.timeout))
    tables.append(markdown_table(["batch", "tokens", "CPU seconds of an update", "packed is faster by"], rows))
    console.print(tables[1], soft_wrap=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "batching.md"
    path.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def fill_rows(prompts: list[int] | None) -> Iterator[list[str]]:
    """A row for each layout: micro-batches of a replica, padding, imbalance, and that of sequences dealt in order.

    Args:
        prompts: tokens of problems to draw from; None: log-normal.
    """
    weight = attention_weight(read_model(KNOWN_MODELS / "Qwen3-8B.json", "Qwen3-8B").dimensions)
    sequences = _sequences(SEQUENCES, prompts, vocab=100)
    lengths = [sequence.tokens.numel() for sequence in sequences]
    costs = sequence_costs(lengths, weight)
    for name, (replicas, rules) in LAYOUTS.items():
        shards = data_parallel_shards(costs, replicas)
        parts = [[sequences[index] for index in shard] for shard in shards]
        count = max(len(pack(part, BUDGET_TOKENS, rules)) for part in parts)
        batches = [pack(part, BUDGET_TOKENS, rules, at_least=count) for part in parts]
        packed = sum(int(micro_batch.cu_seqlens[-1]) for batch in batches for micro_batch in batch)
        in_order = [list(range(replica, SEQUENCES, replicas)) for replica in range(replicas)]
        yield [
            name,
            str(count),
            f"{100 * (1 - sum(lengths) / packed):.2f} %",
            *(f"{100 * _imbalance(deal, costs):.2f} %" for deal in (shards, in_order)),
        ]


def _imbalance(shards: list[list[int]], costs: list[float]) -> float:
    """Work of the busiest replica over the mean, minus 1."""
    loads = [sum(costs[index] for index in shard) for shard in shards]
    return max(loads) / statistics.fmean(loads) - 1


def _on_rank(
    rank: int, ranks: int, hf_dir: Path, port: int, prompts: list[int] | None, repetitions: int
) -> Iterator[list[str]]:
    packed = _sequences(TIMED_SEQUENCES, prompts, vocab=SIZE.vocab, shrink=SHRINK)
    longest = max(sequence.tokens.numel() for sequence in packed)
    groups = [packed[first : first + NEIGHBOURS] for first in range(0, TIMED_SEQUENCES, NEIGHBOURS)]
    batches = {
        "packed": packed,
        f"padded to the longest of {NEIGHBOURS}": [
            _padded(sequence, max(s.tokens.numel() for s in group)) for group in groups for sequence in group
        ],
        "padded to the longest of the batch": [_padded(sequence, longest) for sequence in packed],
    }
    sections: dict[str, dict[str, Any]] = {
        "policy": {"tokens_per_microbatch": BUDGET_TOKENS // SHRINK},
        "rollout": {"max_response_tokens": RESPONSE_LIMIT_TOKENS},
        # Repeated updates must not change what is computed: the same work, whatever the weights.
        "optimizer": {"learning_rate": 1e-12},
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    with policy(rank, ranks, port, hf_dir, **sections) as one:
        one.score(packed)
        for repetition in range(repetitions + 1):
            for name, sequences in batches.items():
                start = time.process_time()
                one.update(sequences)
                if repetition:  # the first allocates
                    seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, sequences in batches.items():
        tokens = sum(sequence.tokens.numel() for sequence in sequences)
        yield [name, f"{tokens:,}", f"{medians[name]:.2f}", f"{medians[name] / medians['packed']:.2f}x"]


def _sequences(count: int, prompts: list[int] | None, *, vocab: int, shrink: int = 1) -> list[Sequence]:
    """Sequences with every field a loss reads, their lengths divided by `shrink`."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(count, generator=generator)
    if prompts is None:
        prompt_lengths = PROMPT_MEDIAN_TOKENS * (PROMPT_SIGMA * torch.randn(count, generator=generator)).exp()
    else:
        prompt_lengths = torch.tensor(prompts)[torch.randint(len(prompts), (count,), generator=generator)].float()
    response_lengths = (RESPONSE_MEDIAN_TOKENS * (RESPONSE_SIGMA * normal).exp()).clamp(max=RESPONSE_LIMIT_TOKENS)
    made = []
    for prompt, response in zip(prompt_lengths.tolist(), response_lengths.tolist(), strict=True):
        prompt_length, length = max(1, int(prompt / shrink)), max(1, int(response / shrink))
        made.append(
            Sequence(
                tokens=torch.randint(vocab, (prompt_length + length,), generator=generator),
                prompt_length=prompt_length,
                advantages=torch.randn(length, generator=generator),
                old_logprobs=torch.randn(length, generator=generator) - 7.0,
            )
        )
    return made


def _padded(sequence: Sequence, length: int) -> Sequence:
    """With padding on the left, which is computed like a longer prompt."""
    padding = length - sequence.tokens.numel()
    tokens = torch.cat([torch.zeros(padding, dtype=torch.int64), sequence.tokens])
    return replace(sequence, tokens=tokens, prompt_length=sequence.prompt_length + padding)


def _prompt_lengths(path: Path | None) -> list[int] | None:
    """Tokens of the problems of a file, from their characters."""
    if path is None:
        return None
    problems = Problems()
    rows = read_rows([path], problems)
    problems.raise_if_any(f"{path} cannot be read")
    texts = [row.values.get("problem") or str(row.values["prompt"]) for row in rows]
    return [max(1, int(len(text) / CHARACTERS_PER_TOKEN)) for text in texts]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Padding, imbalance and time of packed against padded batches.")
    parser.add_argument("--prompts", type=Path, help="parquet or JSON lines with a column problem or prompt")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for batching.md")
    parser.add_argument("--repetitions", type=int, default=5, help="of each batch, interleaved")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for the timed part")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
