"""How near score and update come to the matrix products they consist of, on this CPU.

    python benchmarks/cpu_step.py [--output-dir DIR] [--repetitions N] [--threads N] [--layers N]

A policy of SmolLM2-135M's shape (30 layers, width 576, 9 heads and 3 of keys, feed-forward 1,536, vocabulary 49,152,
tied) with random weights; one micro-batch of 16 sequences of 128 tokens, all response but one token each. Beside it the
products of the same shapes alone, in bfloat16 and in float32: of the layers and of the output head, forward for score,
forward and both gradients for update; each shape once, times its number. Attention's own products are not counted.
Everything is repeated in turn; the figure is the least CPU time of the process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import cpu_model
from benchmarks.markdown import markdown_table
from benchmarks.policies import batch, policy, write_random_model
from benchmarks.ranks import run_processes
from megatron_entropic.policy.local_ranks import held_port

SEQUENCES, TOKENS, VOCABULARY = 16, 128, 49152
HIDDEN, FFN, HEADS, KEY_HEADS, HEAD_DIM = 576, 1536, 9, 3, 64
DTYPES = ("bfloat16", "float32")
HEADER = [
    "policy",
    "step",
    "seconds",
    "products in bfloat16",
    "in float32",
    "of the rate in bfloat16",
    "in float32",
    "beside the faster products, s",
]


@dataclass(frozen=True)
class Product:
    """A linear layer of x [rows, inputs] and how many there are of it."""

    rows: int
    inputs: int
    outputs: int
    count: int


def products(layers: int) -> list[Product]:
    """All linear layers that a step goes through."""
    rows = SEQUENCES * TOKENS
    heads = (HEADS + 2 * KEY_HEADS) * HEAD_DIM
    return [
        Product(rows, HIDDEN, heads, layers),
        Product(rows, HEADS * HEAD_DIM, HIDDEN, layers),
        Product(rows, HIDDEN, 2 * FFN, layers),
        Product(rows, FFN, HIDDEN, layers),
        Product(rows - SEQUENCES, HIDDEN, VOCABULARY, 1),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hf_dir = Path(folder) / "model"
        write_model(hf_dir, options.layers)
        for dtype in options.dtypes:
            with held_port() as port:
                for row in run_processes(_on_rank, 1, hf_dir, port, dtype, options, timeout_s=options.timeout):
                    rows.append(row)
                    console.print("  ".join(row))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "cpu_step.md"
    amx = "with" if torch.cpu.get_capabilities().get("amx_bf16") else "without"
    machine = f"{cpu_model()}, {amx} AMX, {options.threads} thread(s), {options.layers} layers"
    path.write_text(f"{machine}\n\n{markdown_table(HEADER, rows)}\n", encoding="utf-8")
    console.print(f"{machine}\nwrote {path}", soft_wrap=True)
    return 0


def write_model(directory: Path, layers: int) -> None:
    """A Hugging Face directory of that shape."""
    entries = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    }
    write_random_model(directory, entries)


def _on_rank(
    rank: int, ranks: int, hf_dir: Path, port: int, dtype: str, options: argparse.Namespace
) -> Iterator[list[str]]:
    torch.set_num_threads(options.threads)
    sections: dict[str, Any] = {
        "model": {"dtype": dtype},
        "policy": {"tokens_per_microbatch": SEQUENCES * TOKENS},
        "rollout": {"max_response_tokens": TOKENS, "temperature": 1.0},
        # Repeated updates must not change what is computed: the same work, whatever the weights.
        "optimizer": {"learning_rate": 1e-12},
    }
    sequences = batch(SEQUENCES, TOKENS, VOCABULARY)
    shapes = products(options.layers)
    with policy(rank, ranks, port, hf_dir, **sections) as one:
        steps: dict[str, Callable[[], Any]] = {
            "score": lambda: one.score(sequences),
            "update": lambda: one.update(sequences),
        }
        least = _least_seconds(steps, shapes, options.repetitions)
    for name in steps:
        alone = [sum(least[name, shape, kind] * shape.count for shape in shapes) for kind in DTYPES]
        seconds = least[name]
        yield [
            dtype,
            name,
            f"{seconds:.2f}",
            *(f"{value:.2f}" for value in alone),
            *(f"{value / seconds:.2f}" for value in alone),
            f"{seconds - min(alone):.2f}",
        ]


def _least_seconds(steps: dict[str, Callable[[], Any]], shapes: list[Product], repetitions: int) -> dict[Any, float]:
    """CPU seconds of each step, by name, and of each product in each dtype, by step, shape and dtype."""
    least: dict[Any, float] = {}

    def take(key: Any, work: Callable[[], Any]) -> None:
        start = time.process_time()
        work()
        least[key] = min(least.get(key, float("inf")), time.process_time() - start)

    for repetition in range(repetitions + 1):
        for kind in DTYPES:
            for shape in shapes:
                for name, work in _alone(shape, getattr(torch, kind)).items():
                    take((name, shape, kind), work)
        for name, work in steps.items():
            if repetition == 0:  # the first allocates
                work()
            else:
                take(name, work)
    return least


def _alone(shape: Product, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The layer's products for each step."""
    x, weight, gradient = (
        torch.randn(size, dtype=torch.float32).to(dtype)
        for size in ((shape.rows, shape.inputs), (shape.outputs, shape.inputs), (shape.rows, shape.outputs))
    )

    def both() -> None:
        torch.mm(x, weight.t())
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), x)

    return {"score": lambda: torch.mm(x, weight.t()), "update": both}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score and update beside the products of the same shapes, on a CPU.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for cpu_step.md")
    parser.add_argument("--repetitions", type=int, default=3, help="of everything, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30, help="fewer for a quick look; the output head stays")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of the policy")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one dtype")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
