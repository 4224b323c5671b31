"""One of 4 ranks: log-prob and entropy over TP = 1, 2, 4 against float64; writes one JSON line of worst errors."""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel import logprob_and_entropy

Report = dict[str, Any]


def collectives(group: dist.ProcessGroup | None) -> int:
    """How many collectives this group has run so far."""
    return 0 if group is None else group._get_sequence_number_for_group()


def groups_of(rank: int) -> dict[int, dist.ProcessGroup | None]:
    """TP size -> this rank's group; every rank creates every group, as torch.distributed asks."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}


def reference(logits: Tensor, target: Tensor, vocab_size: int, temperature: Tensor) -> tuple[Tensor, Tensor]:
    logp = (logits.double()[:, :vocab_size] / temperature.double()[:, None]).log_softmax(-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, target[:, None]).squeeze(1), entropy


def case(vocab: int, vocab_size: int, dtype: torch.dtype, *, masked: bool, seed: int) -> tuple[Tensor, ...]:
    """Whole logits [T, V], targets, per-token temperatures and incoming gradients, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 67
    logits = torch.randn(tokens, vocab, generator=generator) * 4 + 300 * torch.randn(tokens, 1, generator=generator)
    target = torch.randint(vocab_size, (tokens,), generator=generator)
    if masked:
        logits[::2, : vocab_size // 2] = -torch.inf  # whole shards of TP = 2 and 4
        target[::2] = vocab_size - 1
    temperature = 0.4 + torch.rand(tokens, generator=generator)
    g, h = torch.randn(2, tokens, generator=generator)
    return logits.to(dtype), target, temperature, g, h


def compare(
    group: dist.ProcessGroup | None, ranks: int, vocab_size: int, data: tuple[Tensor, ...], *, layout_invariant: bool
) -> Report:
    """Worst absolute errors of values and gradient, gradient relative to its largest entry; and the values."""
    logits, target, temperature, g, h = data
    rank = dist.get_rank(group) if group is not None else 0
    width = logits.shape[1] // ranks
    columns = slice(rank * width, (rank + 1) * width)
    base = logits[:, columns].clone().requires_grad_()
    before = collectives(group)
    logprob, entropy = logprob_and_entropy(
        base * 1.0,
        target,
        group=group,
        temperature=temperature,
        vocab_size=vocab_size,
        entropy_gradient=True,
        layout_invariant=layout_invariant,
    )
    between = collectives(group)
    (logprob @ g + entropy @ h).backward()
    exact = logits.double().requires_grad_()
    want_logprob, want_entropy = reference(exact, target, vocab_size, temperature)
    (want_logprob @ g.double() + want_entropy @ h.double()).backward()
    want_gradient = exact.grad[:, columns]
    assert base.grad is not None
    return {
        "logprob": float((logprob - want_logprob).abs().max()),
        "entropy": float((entropy - want_entropy).abs().max()),
        "gradient": float((base.grad - want_gradient).abs().max() / exact.grad.abs().max()),
        "forward_collectives": between - before,
        "backward_collectives": collectives(group) - between,
        "values": torch.stack([logprob, entropy]).detach(),
    }


def check_dtype(dtype: torch.dtype, groups: dict[int, dist.ProcessGroup | None]) -> Report:
    worst: Report = {"logprob": 0.0, "entropy": 0.0, "gradient": 0.0, "bit_identical": True, "collectives": []}
    shapes = ((1024, 1024), (1408, 1300), (4000, 1500))  # without padding, with some, with whole shards of it
    for (vocab, vocab_size), masked, invariant in itertools.product(shapes, (False, True), (False, True)):
        data = case(vocab, vocab_size, dtype, masked=masked, seed=vocab)
        results = {
            ranks: compare(group, ranks, vocab_size, data, layout_invariant=invariant)
            for ranks, group in groups.items()
        }
        for ranks, result in results.items():
            for name in ("logprob", "entropy", "gradient"):
                worst[name] = max(worst[name], result[name])
            worst["bit_identical"] &= not invariant or torch.equal(result["values"], results[1]["values"])
            worst["collectives"].append([ranks, result["forward_collectives"], result["backward_collectives"]])
        everyone = [torch.empty_like(results[4]["values"]) for _ in range(4)]
        dist.all_gather(everyone, results[4]["values"])
        worst["bit_identical"] &= all(torch.equal(values, everyone[0]) for values in everyone)
    return worst


def check_no_tokens(group: dist.ProcessGroup | None) -> bool:
    """An empty selection must not hang, and its backward pass must run."""
    base = torch.zeros(0, 16, requires_grad=True)
    logprob, entropy = logprob_and_entropy(base * 1.0, torch.zeros(0, dtype=torch.int64), group=group)
    logprob.sum().backward()
    return logprob.shape == entropy.shape == (0,) and base.grad is not None


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    groups = groups_of(dist.get_rank())
    report = {
        "float32": check_dtype(torch.float32, groups),
        "bfloat16": check_dtype(torch.bfloat16, groups),
        "no_tokens": check_no_tokens(groups[4]),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
