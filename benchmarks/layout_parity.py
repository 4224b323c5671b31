"""How far every layout is from transformers and from one rank, for every family: the table of docs/layouts.md.

    python benchmarks/layout_parity.py [--families NAME ...] [--output FILE.md]

Tiny random models of the parity tests, unequal lengths, packed, float32. Each cell: largest error of a log-prob or
entropy of the score pass against transformers in float32 (nats), and of the loss and the gradients of one EntroPIC
update against those of one rank (relative to the loss, and to the norm of each gradient).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "distributed"))

from benchmarks.markdown import markdown_table
from benchmarks.policies import policy
from benchmarks.ranks import run_processes
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.policy.batch.balance import data_parallel_shards
from megatron_entropic.policy.local_ranks import held_port
from megatron_entropic.policy.model.load import named_entries
from megatron_entropic.policy.policy import Policy
from megatron_entropic.policy.publish.gather import gather_hf_tensors, sends_weights
from megatron_entropic.types import Sequence

TEMPERATURE = 0.7
REFERENCE = "one rank"
FAMILIES = ["qwen3", "qwen2", "llama", "qwen3_moe", "mixtral", "deepseek_v3"]
_TP, _PP, _CP, _DP, _EP = (f"{kind}_parallel" for kind in ("tensor", "pipeline", "context", "data", "expert"))
_SP, _VPP = "sequence_parallel", "virtual_pipeline_parallel"
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {REFERENCE: {}},
    2: {
        "TP2": {_TP: 2},
        "TP2, SP": {_TP: 2, _SP: True},
        "PP2": {_PP: 2},
        "PP2, 2 chunks a stage": {_PP: 2, _VPP: 2},
        "PP2, 3 + 1 layers": {_PP: 2, "first_stage_layers": 3},
        "CP2": {_CP: 2},
        "DP2": {_DP: 2},
        "EP2": {_DP: 2, _EP: 2},
    },
    4: {
        "PP4": {_PP: 4},
        "CP4": {_CP: 4},
        "CP2 x TP2, SP": {_CP: 2, _TP: 2, _SP: True},
        "CP2 x PP2, 2 chunks a stage": {_CP: 2, _PP: 2, _VPP: 2},
        "TP2 x PP2, 2 chunks a stage, SP": {_TP: 2, _PP: 2, _VPP: 2, _SP: True},
        "DP2 x TP2, SP": {_DP: 2, _TP: 2, _SP: True},
        "EP2 x TP2, SP": {_DP: 2, _EP: 2, _TP: 2, _SP: True},
        "EP2 x PP2": {_DP: 2, _EP: 2, _PP: 2},
        "EP2 x PP2, 1 + 3 layers": {_DP: 2, _EP: 2, _PP: 2, "first_stage_layers": 1, "last_stage_layers": 3},
        "EP2 over TP2 x PP2, SP": {_TP: 2, _EP: 2, "expert_tensor_parallel": 1, _PP: 2, _SP: True},
        "EP2 over CP2 x PP2": {_CP: 2, _EP: 2, _PP: 2},
    },
}
"""By number of processes."""


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    cells: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder), options.families)
        for ranks, layouts in LAYOUTS.items():
            wanted = [(name, family) for name in layouts for family in options.families]
            cases = [case for case in wanted if _can_run(Path(folder) / case[1], layouts[case[0]])]
            with ExitStack() as held:
                ports = [held.enter_context(held_port()) for _ in cases]
                for name, family, cell in run_processes(
                    _on_rank, ranks, Path(folder), cases, layouts, ports, timeout_s=options.timeout
                ):
                    cells[name, family] = cell
                    console.print(f"{name}, {family}: {cell}")
    measured = {name for name, _ in cells}
    names = [name for layouts in LAYOUTS.values() for name in layouts if name in measured]
    rows = [[name, *(cells.get((name, family), "") for family in options.families)] for name in names]
    text = markdown_table(["layout", *options.families], rows) + "\n"
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
        console.print(f"wrote {options.output}", soft_wrap=True)
    return 0


def _prepare(folder: Path, families: list[str]) -> None:
    """Models, transformers' statistics, and sequences of another policy than the one that is updated."""
    from tiny_models import random_sequences, transformers_statistics, write_tiny_model

    generator = torch.Generator().manual_seed(23)
    tokens = random_sequences()
    for family in families:
        write_tiny_model(family, folder / family)
        reference = transformers_statistics(folder / family, tokens, TEMPERATURE)
        sequences = [
            Sequence(
                torch.tensor(line),
                prompt,
                advantages=torch.randn(len(line) - prompt, generator=generator),
                old_logprobs=(logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator)).float(),
            )
            for (line, prompt), (logprobs, _) in zip(tokens, reference, strict=True)
        ]
        torch.save({"sequences": sequences, "reference": reference}, folder / f"{family}.pt")


def _can_run(hf_dir: Path, layout: dict[str, Any]) -> bool:
    """Whether the layout is one for the family: experts need sequence beside tensor parallelism, others no EP."""
    if read_dimensions(hf_dir).experts is None:
        return _EP not in layout
    return _TP not in layout or _SP in layout


def _on_rank(
    rank: int,
    ranks: int,
    folder: Path,
    cases: list[tuple[str, str]],
    layouts: dict[str, dict[str, Any]],
    ports: list[int],
) -> Iterator[tuple[str, str, str]]:
    for (name, family), port in zip(cases, ports, strict=True):
        case = torch.load(folder / f"{family}.pt", weights_only=False)
        sections = {
            "policy": {"tokens_per_microbatch": 50, "distributed_optimizer": False, **layouts[name]},
            "rollout": {"temperature": TEMPERATURE, "max_response_tokens": 64},
            "entropy_control": {"target": 1.0, "kp": 0.1, "ki": 0.01, "tau": 0.02},
            "optimizer": {"gradient_clip": 0.0},
        }
        with policy(rank, ranks, port, folder / family, **sections) as one:
            statistics_error = _score_error(one, case["sequences"], case["reference"])
            loss, gradients = _update(one, case["sequences"])
        path = folder / f"{family}_gradients.pt"
        if rank == 0 and name == REFERENCE:
            torch.save((loss, gradients), path)
        error = _update_error(loss, gradients, path) if rank == 0 else 0.0
        yield name, family, f"{statistics_error:.1e}, {error:.1e}"


def _own(one: Policy, sequences: list[Sequence]) -> list[int]:
    lengths = [sequence.tokens.numel() for sequence in sequences]
    return data_parallel_shards(lengths, one.parallel.data_size)[one.parallel.data_rank]


def _score_error(one: Policy, sequences: list[Sequence], reference: list[Any]) -> float:
    """Largest distance of a log-prob or an entropy, over all replicas; the same on every rank."""
    own = _own(one, sequences)
    scores = one.score([sequences[index] for index in own])
    worst = torch.zeros(())
    if scores is not None:
        for index, logprobs, entropies in zip(own, scores.logprobs, scores.entropies, strict=True):
            for found, wanted in zip((logprobs, entropies), reference[index], strict=True):
                worst = torch.maximum(worst, (found - wanted).abs().max().float())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _update(one: Policy, sequences: list[Sequence]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and, on rank 0, gradients by Hugging Face name."""
    metrics = one.update([sequences[index] for index in _own(one, sequences)])
    gradients: dict[str, torch.Tensor] = {}
    if sends_weights(one.parallel):
        entries = named_entries(one.model, one.parameter_map, one.parallel)
        values: dict[str, Any] = {e.megatron_name: torch.zeros_like(v) if e.buffer else v.main_grad for e, v in entries}
        gathered = gather_hf_tensors(one.plan, values, one.parameter_map, one.parallel, "gradients")
        gradients = {name: tensor.clone() for name, tensor in gathered if name not in one.parameter_map.buffers}
    return metrics["loss/policy"] + metrics["loss/entropic"], gradients


def _update_error(loss: float, gradients: dict[str, torch.Tensor], path: Path) -> float:
    """Largest relative error of the loss and of a gradient against those saved."""
    wanted_loss, wanted = torch.load(path)
    assert set(wanted) == set(gradients)
    errors = [float((gradients[name] - value).norm() / value.norm()) for name, value in wanted.items()]
    return max(abs(loss / wanted_loss - 1), *errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Errors of every layout and family.")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="of the parity tests")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="where the table goes besides the screen")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for the layouts of one size")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
