"""Peak memory of one optimizer step on the last pipeline stage, by output head and by tokens of a micro-batch.

    python benchmarks/update_memory.py [--output-dir DIR] [--tokens N [N ...]]

Two pipeline stages, so that the second is a last stage as in a large run: transformer layers, output layer, loss. The
model is small but for its vocabulary of 151,936, so what is seen is the output layer. Counted is what the step
allocates above what lies there before it: parameters, gradients and optimizer state are not in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.measure import peak_extra_bytes
from benchmarks.policies import ModelSize, batch, policy, write_model
from benchmarks.ranks import run_processes
from megatron_entropic.policy.local_ranks import held_port

HEADS = ("logits", "recompute", "fused_loss")
SIZE = ModelSize(layers=2, hidden=128, ffn=256, heads=4, vocab=151936)
STAGES = 2
MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    peaks: dict[tuple[str, int], int] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        hf_dir = Path(folder) / "model"
        write_model(SIZE, hf_dir)
        ports = tuple(held.enter_context(held_port()) for _ in HEADS)
        # The last stage is the last rank.
        for head, tokens, peak in run_processes(
            _on_rank, STAGES, hf_dir, ports, options.tokens, reporter=STAGES - 1, timeout_s=options.timeout
        ):
            peaks[head, tokens] = peak
            console.print(f"{head}, {tokens} tokens: {peak / MIB:.0f} MiB")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "update_memory.md"
    path.write_text(_table(peaks, options.tokens), encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _on_rank(
    rank: int, ranks: int, hf_dir: Path, ports: tuple[int, ...], tokens: list[int]
) -> Iterator[tuple[str, int, int]]:
    for head, port in zip(HEADS, ports, strict=True):
        sections = {
            "policy": {
                "pipeline_parallel": ranks,
                "output_head": head,
                "tokens_per_microbatch": max(tokens),
                "distributed_optimizer": False,
            },
            "rollout": {"temperature": 0.7, "max_response_tokens": max(tokens)},
        }
        with policy(rank, ranks, port, hf_dir, **sections) as one:
            for count in tokens:
                sequences = batch(1, count, SIZE.vocab)
                one.score(sequences)
                peak, _ = peak_extra_bytes(lambda batch=sequences: one.update(batch), torch.device("cpu"))
                yield head, count, peak


def _table(peaks: dict[tuple[str, int], int], tokens: list[int]) -> str:
    logits_mib = {count: count * SIZE.vocab * 4 / MIB for count in tokens}
    rows = [
        [
            f"{count:,}",
            f"{logits_mib[count]:,.0f}",
            *(f"{peaks[head, count] / MIB:,.0f}" for head in HEADS),
            *(f"{peaks['logits', count] / peaks[head, count]:.1f}x" for head in HEADS[1:]),
        ]
        for count in tokens
    ]
    header = ["tokens", "one logits tensor", *HEADS, *(f"logits / {head}" for head in HEADS[1:])]
    return markdown_table(header, rows) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Peak memory of an update on the last stage, in MiB.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for update_memory.md")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="of a micro-batch")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for the whole")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
