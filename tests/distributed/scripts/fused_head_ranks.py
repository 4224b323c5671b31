"""One of 4 ranks: both fused heads over TP = 1, 2, 4 with and without sequence parallelism, against float64 autograd
through stored logits; writes one JSON line of worst errors and collectives."""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel import fused_logprob_and_entropy, fused_policy_loss

TOKENS, HIDDEN, WIDTH = 48, 32, 400
VOCAB_SIZES = (400, 331, 90)
"""Without padding, with some, and with whole shards of it."""

Report = dict[str, Any]


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    keep: Tensor
    g: Tensor
    h: Tensor
    vocab_size: int
    temperature: float = 0.7

    def token_loss(self, logprob: Tensor, entropy: Tensor | None, tokens: slice) -> Tensor:
        assert entropy is not None
        rows = self.keep.nonzero().squeeze(1)[tokens]
        return logprob @ self.g[rows] + entropy @ self.h[rows]


def case(vocab_size: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(vocab_size)
    return Case(
        hidden=torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype),
        weight=torch.randn(WIDTH, HIDDEN, generator=generator).to(dtype),
        target=torch.randint(vocab_size, (TOKENS,), generator=generator),
        keep=torch.rand(TOKENS, generator=generator) < 0.6,
        g=torch.randn(TOKENS, generator=generator),
        h=torch.randn(TOKENS, generator=generator),
        vocab_size=vocab_size,
    )


def reference(data: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [T], entropy [T], dhidden, dweight) in float64; zero where `keep` is False."""
    hidden, weight = (value.double().detach().requires_grad_() for value in (data.hidden, data.weight))
    logp = ((hidden @ weight.T)[:, : data.vocab_size] / data.temperature).log_softmax(-1)
    logprob = logp.gather(1, data.target[:, None]).squeeze(1) * data.keep
    entropy = -(logp.exp() * logp).sum(-1) * data.keep
    (logprob @ data.g.double() + entropy @ data.h.double()).backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def run(
    data: Case, group: dist.ProcessGroup | None, *, gradient_in_forward: bool, sequence_parallel: bool
) -> tuple[list[Tensor], list[int]]:
    """([logprob, entropy, dhidden, dweight] of this rank, [collectives forward, backward])."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    hidden = (data.hidden.chunk(ranks)[rank] if sequence_parallel else data.hidden).clone().requires_grad_()
    weight = data.weight.chunk(ranks)[rank].clone().requires_grad_()
    options: dict[str, Any] = {
        "group": group,
        "temperature": data.temperature,
        "vocab_size": data.vocab_size,
        "sequence_parallel": sequence_parallel,
        "loss_mask": data.keep,
        "token_chunk": 11,
        "vocab_chunk": 64,
    }
    counts = [collectives(group)]
    if gradient_in_forward:
        loss, logprob, entropy = fused_policy_loss(hidden, weight, data.target, data.token_loss, **options)
    else:
        logprob, entropy = fused_logprob_and_entropy(hidden, weight, data.target, entropy_gradient=True, **options)
        loss = logprob @ data.g + entropy @ data.h
    counts.append(collectives(group))
    loss.backward()
    counts.append(collectives(group))
    assert entropy is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logprob.detach(), entropy.detach(), hidden.grad, weight.grad], [
        b - a for a, b in itertools.pairwise(counts)
    ]


def collectives(group: dist.ProcessGroup | None) -> int:
    """How many collectives this group has run so far."""
    return 0 if group is None else group._get_sequence_number_for_group()


def errors(data: Case, group: dist.ProcessGroup | None, got: list[Tensor], *, sequence_parallel: bool) -> list[float]:
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    want = list(reference(data))
    whole = [float(value.norm()) for value in want]
    want[3] = want[3].chunk(ranks)[rank]
    if sequence_parallel:
        want[2] = want[2].chunk(ranks)[rank]
    differences = [a - b for a, b in zip(got, want, strict=True)]
    values = [float(difference.abs().max()) for difference in differences[:2]]
    return values + [float(d.norm()) / norm for d, norm in zip(differences[2:], whole[2:], strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: dict[int, dist.ProcessGroup | None] = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    reports: list[Report] = []
    cases = itertools.product(groups, (False, True), (False, True), VOCAB_SIZES, (torch.float32, torch.bfloat16))
    for ranks, gradient_in_forward, sequence_parallel, vocab_size, dtype in cases:
        data = case(vocab_size, dtype)
        got, counts = run(
            data, groups[ranks], gradient_in_forward=gradient_in_forward, sequence_parallel=sequence_parallel
        )
        reports.append(
            {
                "ranks": ranks,
                "gradient_in_forward": gradient_in_forward,
                "sequence_parallel": sequence_parallel,
                "vocab_size": vocab_size,
                "dtype": str(dtype).removeprefix("torch."),
                "chunks": -(-int(data.keep.sum()) // 11),
                "collectives": counts,
                "errors": errors(data, groups[ranks], got, sequence_parallel=sequence_parallel),
            }
        )
    sys.stdout.write(json.dumps(reports) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
