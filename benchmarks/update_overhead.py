"""What entropy control, importance ratios and exact statistics cost over bare megatron-core, in time.

    python benchmarks/update_overhead.py [--output-dir DIR] [--repetitions N]

Side by side in one run, the same parameters and the same packed micro-batches: `score` beside a forward pass of
megatron-core's GPTModel with its own vocab-parallel cross-entropy, `update` (statistics, EntroPIC loss, backward,
clipping, optimizer step, controller) beside its forward and backward pass. Processes have one thread; repetitions are
interleaved; the figure is the median of CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.policies import ModelSize, batch, policy, write_model
from benchmarks.ranks import run_processes
from megatron_entropic.policy.local_ranks import held_port
from megatron_entropic.policy.policy import Policy

SIZE = ModelSize(layers=4, hidden=256, ffn=768, heads=4, vocab=32000)
SEQUENCES, TOKENS = 8, 256
MICRO_BATCH_TOKENS = 512


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hf_dir = Path(folder) / "model"
        write_model(SIZE, hf_dir)
        for ranks in (1, 2):
            with held_port() as port:
                for name, seconds, bare in run_processes(
                    _on_rank, ranks, hf_dir, port, options.repetitions, timeout_s=options.timeout
                ):
                    rows.append([name, f"TP={ranks}", f"{seconds:.2f}", f"{bare:.2f}", f"{seconds / bare:.3f}"])
                    console.print("  ".join(rows[-1]))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "update_overhead.md"
    path.write_text(
        markdown_table(["step", "layout", "seconds", "bare megatron-core", "ratio"], rows), encoding="utf-8"
    )
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _on_rank(rank: int, ranks: int, hf_dir: Path, port: int, repetitions: int) -> Iterator[tuple[str, float, float]]:
    sections = {
        "policy": {"tensor_parallel": ranks, "tokens_per_microbatch": MICRO_BATCH_TOKENS},
        "rollout": {"max_response_tokens": TOKENS, "temperature": 1.0},
        # Repeated updates must not change what is computed: the same work, whatever the weights.
        "optimizer": {"learning_rate": 1e-12},
    }
    sequences = batch(SEQUENCES, TOKENS, SIZE.vocab)
    with policy(rank, ranks, port, hf_dir, **sections) as one:
        bare = BareModel(one)
        micro_batches = one._machinery.align(sequences)
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "score": (lambda: one.score(sequences), lambda: bare.run(micro_batches, forward_only=True)),
            "update": (lambda: one.update(sequences), lambda: bare.run(micro_batches, forward_only=False)),
        }
        for name, (ours, theirs) in pairs.items():
            yield name, *_medians(ours, theirs, repetitions)


def _medians(ours: Callable[[], Any], theirs: Callable[[], Any], repetitions: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repetitions + 1):
        for work, found in zip((ours, theirs), times, strict=True):
            dist.barrier()
            start = time.process_time()
            work()
            if repetition:  # the first allocates
                found.append(time.process_time() - start)
    return statistics.median(times[0]), statistics.median(times[1])


class BareModel:
    """megatron-core's GPTModel with the policy's own parameters, layers and gradient buffers, and its cross-entropy."""

    def __init__(self, owner: Policy) -> None:
        from megatron.core.models.gpt import GPTModel

        self._owner = owner
        self._forward = GPTModel.forward
        self._postprocess = GPTModel._postprocess

    def run(self, micro_batches: list[Any], *, forward_only: bool) -> None:
        """Forward, and backward unless told, of packed micro-batches; gradients accumulate in the policy's buffers."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        (wrapped,) = self._owner._machinery.model
        if not forward_only:
            self._owner.optimizer.zero_grad()
        total = sum(len(micro_batch.targets) for micro_batch in micro_batches)

        def forward_step(batches: Iterator[Any], _model: Any) -> tuple[Any, Callable[..., Any]]:
            micro_batch = next(batches)

            def loss(losses: torch.Tensor, non_loss_data: bool = False) -> Any:
                mean = losses.sum() / total
                return mean if non_loss_data else (mean, torch.zeros((), dtype=torch.int), {"loss": mean.detach()})

            return self._losses(micro_batch), loss

        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(micro_batches),
                model=[wrapped],
                num_microbatches=len(micro_batches),
                seq_length=micro_batches[0].tokens.numel(),
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _losses(self, micro_batch: Any) -> torch.Tensor:
        """[1, T] cross-entropy of the next token at every position, by GPTModel's own last step."""
        from megatron_entropic.policy.model.attention import packed_segments

        (model,) = self._owner.model
        labels = micro_batch.tokens.roll(-1, dims=1)
        # The policy's class replaces what comes after the layers; here GPTModel's own is called.
        model._postprocess = lambda *args, **options: self._postprocess(model, *args, **options)
        try:
            losses: torch.Tensor = self._forward(
                model,
                input_ids=micro_batch.tokens,
                position_ids=micro_batch.position_ids,
                attention_mask=None,
                labels=labels,
                packed_seq_params=packed_segments(micro_batch),
            )
        finally:
            del model._postprocess
        return losses


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time of score and update beside bare megatron-core.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for update_overhead.md")
    parser.add_argument("--repetitions", type=int, default=7, help="of each pair, interleaved")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one layout")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
