"""One of 4 ranks: reverse KL over TP = 1, 2, 4 with and without sequence parallelism, against float64 autograd through
stored logits; writes one JSON line of worst errors and collectives."""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel import fused_reverse_kl

TOKENS, HIDDEN, TEACHER_HIDDEN, WIDTH = 48, 32, 56, 400
VOCAB_SIZES = (400, 331, 90)
"""Without padding, with some, and with whole shards of it."""
TEMPERATURE = 0.7


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    rows: Tensor
    g: Tensor
    vocab_size: int


def case(vocab_size: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(vocab_size)
    rows = (torch.rand(TOKENS, generator=generator) < 0.6).nonzero().squeeze(1)
    return Case(
        hidden=torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype),
        weight=torch.randn(WIDTH, HIDDEN, generator=generator).to(dtype),
        teacher_hidden=torch.randn(TOKENS, TEACHER_HIDDEN, generator=generator).to(dtype),
        teacher_weight=torch.randn(WIDTH, TEACHER_HIDDEN, generator=generator).to(dtype),
        rows=rows,
        g=torch.randn(len(rows), generator=generator),
        vocab_size=vocab_size,
    )


def reference(data: Case) -> list[Tensor]:
    """[KL [N], dhidden, dweight] in float64."""
    hidden, weight = (value.double().detach().requires_grad_() for value in (data.hidden, data.weight))
    logp = ((hidden[data.rows] @ weight.T)[:, : data.vocab_size] / TEMPERATURE).log_softmax(-1)
    logits = data.teacher_hidden.double()[data.rows] @ data.teacher_weight.double().T
    logq = (logits[:, : data.vocab_size] / TEMPERATURE).log_softmax(-1)
    divergence = (logp.exp() * (logp - logq)).sum(-1)
    (divergence @ data.g.double()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [divergence.detach(), hidden.grad, weight.grad]


def run(data: Case, group: dist.ProcessGroup | None, *, sequence_parallel: bool) -> tuple[list[Tensor], list[int]]:
    """([KL, dhidden, dweight] of this rank, [collectives forward, backward])."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    hidden = (data.hidden.chunk(ranks)[rank] if sequence_parallel else data.hidden).clone().requires_grad_()
    weight = data.weight.chunk(ranks)[rank].clone().requires_grad_()
    counts = [collectives(group)]
    divergence = fused_reverse_kl(
        hidden,
        weight,
        data.teacher_hidden[data.rows],
        data.teacher_weight.chunk(ranks)[rank],
        group=group,
        temperature=TEMPERATURE,
        vocab_size=data.vocab_size,
        sequence_parallel=sequence_parallel,
        token_chunk=11,
        vocab_chunk=64,
        rows=data.rows,
    )
    counts.append(collectives(group))
    (divergence @ data.g.to(divergence.dtype)).backward()
    counts.append(collectives(group))
    assert hidden.grad is not None
    assert weight.grad is not None
    return [divergence.detach(), hidden.grad, weight.grad], [b - a for a, b in itertools.pairwise(counts)]


def collectives(group: dist.ProcessGroup | None) -> int:
    """How many collectives this group has run so far."""
    return 0 if group is None else group._get_sequence_number_for_group()


def errors(data: Case, group: dist.ProcessGroup | None, got: list[Tensor], *, sequence_parallel: bool) -> list[float]:
    """Errors relative to the norm of the whole, of each result."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    want = reference(data)
    whole = [float(value.norm()) for value in want]
    want[2] = want[2].chunk(ranks)[rank]
    if sequence_parallel:
        want[1] = want[1].chunk(ranks)[rank]
    return [float((a - b).norm()) / norm for a, b, norm in zip(got, want, whole, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: dict[int, dist.ProcessGroup | None] = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    reports = []
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for ranks, sequence_parallel, vocab_size, dtype in itertools.product(groups, (False, True), VOCAB_SIZES, dtypes):
        data = case(vocab_size, dtype)
        got, counts = run(data, groups[ranks], sequence_parallel=sequence_parallel)
        reports.append(
            {
                "ranks": ranks,
                "sequence_parallel": sequence_parallel,
                "vocab_size": vocab_size,
                "dtype": str(dtype).removeprefix("torch."),
                "collectives": counts,
                "errors": errors(data, groups[ranks], got, sequence_parallel=sequence_parallel),
            }
        )
    sys.stdout.write(json.dumps(reports) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
