"""Scores, moves the parameters and updates with the recorded experts, under several layouts; prints JSON.

Usage: router_replay.py SEQUENCES_JSON LAYOUTS_JSON

SEQUENCES_JSON holds [tokens, prompt length] of each sequence, LAYOUTS_JSON {"hf_dir", "policy"} by name.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from policy_ranks import ProcessGroups, hf_gradients, replica_part, sequences_with_advantages

from megatron_entropic.policy.policy import Policy
from megatron_entropic.policy.step.score import score
from megatron_entropic.types import Sequence

OTHER_TOKENS_PER_MICROBATCH = 77


def scored(policy: Policy, part: list[Sequence]) -> list[torch.Tensor]:
    """Score, attach log-probs and experts; returns the experts that were chosen."""
    scores = [policy.score(part)]
    # As the driver does, every rank of a replica gets the answer of the one that reports.
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (policy.parallel.data_rank, scores[0]))
    own = next(found for replica, found in everywhere if found is not None and replica == policy.parallel.data_rank)
    for index, sequence in enumerate(part):
        part[index] = replace(sequence, old_logprobs=own.logprobs[index], experts=own.experts[index])
    return own.experts


def updated(policy: Policy, part: list[Sequence], *, replay: bool) -> tuple[list[torch.Tensor], Any, Any]:
    """Experts used by an update without effect (its learning rate is 0), its metrics and its gradients."""
    policy._update._replay = replay
    routing = policy._machinery.routing
    batch = policy._machinery.align(part)
    with routing.recording():
        metrics = policy.update(part)
    return routing.recorded(batch), metrics, hf_gradients(policy)


def rescored(policy: Policy, part: list[Sequence]) -> list[torch.Tensor]:
    """Experts used by a pass without gradients that replays, as those that an update makes on its way."""
    routing, batch = policy._machinery.routing, policy._machinery.align(part, replay=True)
    with routing.recording():
        score(policy.model, batch, policy.parallel, temperature=1.0)
    return routing.recorded(batch)


def move(policy: Policy) -> None:
    """Other routers and other weights, the same on all ranks that share them."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "router" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(1.05)


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether all tokens went to the same experts."""
    return all(torch.equal(a.sort(dim=2).values, b.sort(dim=2).values) for a, b in zip(left, right, strict=True))


def check(policy: Policy, part: list[Sequence]) -> dict[str, Any]:
    """Everything the test looks at."""
    first = scored(policy, part)
    policy._machinery._tokens_per_microbatch = OTHER_TOKENS_PER_MICROBATCH
    free, _, free_gradients = updated(policy, part, replay=False)
    bound, metrics, gradients = updated(policy, part, replay=True)
    report = {
        "unmoved, free": same(free, first),
        "unmoved": same(bound, first),
        "unmoved gradients": all(torch.equal(value, free_gradients[name]) for name, value in gradients.items()),
        "unmoved differs": metrics["moe/replay_differs"],
        "gradients": len(gradients),
    }
    move(policy)
    free, metrics, _ = updated(policy, part, replay=False)
    report |= {"moved, free": same(free, first), "free metric": "moe/replay_differs" in metrics}
    bound, metrics, _ = updated(policy, part, replay=True)
    unlike = torch.tensor(
        [sum(int((~(a.unsqueeze(3) == b.unsqueeze(2)).any(3)).sum()) for a, b in zip(first, free, strict=True))]
    )
    total = torch.tensor([sum(a.numel() for a in first)])
    for count in (unlike, total):
        dist.all_reduce(count)
    report |= {
        "moved": same(bound, first),
        "moved, rescored": same(rescored(policy, part), first),
        "moved differs": metrics["moe/replay_differs"],
        # The first layer with experts sees the same input with and without replay; later ones need not.
        "counted": float(unlike) / float(total),
    }
    part[0] = replace(part[0], experts=None)
    try:
        policy._machinery.align(part, replay=True)
    except ValueError as error:
        report["refusal"] = str(error)
    return report


def main(lines: list[tuple[list[int], int]], layouts: dict[str, dict[str, Any]]) -> None:
    rendezvous = ProcessGroups()
    reports: dict[str, Any] = {}
    for name, layout in layouts.items():
        sections = {
            "policy": {"tokens_per_microbatch": 40, "moe_router_replay": "score", **layout["policy"]},
            "optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0, "gradient_clip": 0.0},
            "entropy_control": {"target": 1.0},
            "rollout": {"max_response_tokens": 64},
            "train": {"steps": 9},
        }
        with rendezvous.policy(Path(layout["hf_dir"]), **sections) as policy:
            reports[name] = check(policy, replica_part(policy, sequences_with_advantages(lines)))
    sys.stdout.write(json.dumps(reports))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
