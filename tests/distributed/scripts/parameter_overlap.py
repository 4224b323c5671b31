"""Warm start and rollouts with parameters gathered during the forward pass, as on CUDA, beside the same without.

Usage: parameter_overlap.py WORK_DIR, which holds untied/ and tied/

Buckets are as small beside these models as megatron-core's are beside real ones: the output layer has one of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from policy_ranks import ProcessGroups, configuration, replica_part, sequences_with_advantages, start_over

from megatron_entropic.policy.model.outputs import HeadName
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Sequence

BUCKET_ELEMENTS = 20_000
WARM_START_STEPS = 3
STEPS_PER_ROLLOUT = (1, 2, 4)
"""Of three rollouts, one after the other."""
LAYOUTS = {"pp1": {"pipeline_parallel": 1}, "pp2": {"pipeline_parallel": 2}, "adapters": {"lora": {"rank": 24}}}
WARM = {"steps": WARM_START_STEPS, "file": "unused", "learning_rate": 1e-3, "warmup_steps": 0}
OPTIMIZER = {"learning_rate": 1e-3, "epsilon": 1e-5}
Mode = Literal["overlap", "same buckets", "one bucket"]
MODES: tuple[Mode, ...] = get_args(Mode)


def batch() -> list[Sequence]:
    generator = torch.Generator().manual_seed(31)
    lengths = ((3, 14), (17, 1), (9, 21), (2, 45), (30, 7), (5, 12), (11, 33), (4, 4))
    lines = [(torch.randint(251, (p + r,), generator=generator).tolist(), p) for p, r in lengths]
    return [
        replace(sequence, old_logprobs=torch.full_like(sequence.advantages, -5.0))
        for sequence in sequences_with_advantages(lines)
    ]


@contextmanager
def gathering(mode: Mode) -> Iterator[None]:
    """What a policy built meanwhile does with its parameters after a step; the first two reduce gradients alike."""
    import megatron.core.distributed as core

    from megatron_entropic.policy import policy as module

    config_class, wrap = core.DistributedDataParallelConfig, module.wrap_data_parallel
    if mode != "one bucket":
        changes = {"overlap_param_gather": mode == "overlap", "bucket_size": BUCKET_ELEMENTS}
        core.DistributedDataParallelConfig = lambda **given: config_class(**{**given, **changes})
        module.wrap_data_parallel = lambda chunks, **given: wrap(chunks, **{**given, "overlap": True})
    try:
        yield
    finally:
        core.DistributedDataParallelConfig, module.wrap_data_parallel = config_class, wrap


def train(policy: Policy, hf_dir: Path, layout: dict[str, Any], head: HeadName) -> dict[str, Any]:
    """What a run asks of the policy, and what it would see: metrics, and the weights that it would publish."""
    sections = {"optimizer": OPTIMIZER, "warm_start": WARM}
    start_over(policy, configuration(hf_dir, policy={**layout, "output_head": head}, **sections))
    policy._warming_up = True
    part = replica_part(policy, batch())
    metrics = [policy.warm_start_step(part) for _ in range(WARM_START_STEPS)]
    policy.begin_reinforcement_learning()
    published, stale = [], []
    for steps in STEPS_PER_ROLLOUT:
        policy.score(part)
        metrics += [policy.update(part) for _ in range(steps)]
        stale.append(spread(policy))
        policy.synchronize_parameters()
        published.append(digest(policy))
        assert spread(policy) == 0.0, f"replicas differ after {steps} steps"
    return {"metrics": [exact(step) for step in metrics], "published": published, "stale": stale}


def spread(policy: Policy) -> float:
    """Largest difference between the data-parallel replicas of this rank's parameters."""
    group = policy._wrapped[0].dp_cp_group
    flat = torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, flat, group=group)
    return max(float((other - flat).abs().max()) for other in everyone)


def digest(policy: Policy) -> str:
    flat = torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def exact(metrics: dict[str, float]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in metrics.items()}


def main(work: Path) -> None:
    rendezvous = ProcessGroups()
    report: dict[str, Any] = {}
    for layout_name, layout in LAYOUTS.items():
        for model in ("untied", "tied") if layout_name != "adapters" else ("untied",):
            for mode in MODES if layout_name == "pp1" else MODES[:2]:
                with gathering(mode), rendezvous.policy(work / model, policy=layout) as policy:
                    buckets = len(policy._wrapped[0].bucket_groups)
                    runs = {head: train(policy, work / model, layout, head) for head in get_args(HeadName)}
                report.setdefault(f"{layout_name}/{model}", {})[mode] = {"buckets": buckets, "runs": runs}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
