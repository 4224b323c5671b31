"""Silent traps of the optimizer: what happens with and without what the project does about each.

Usage: optimizer_traps.py WORK_DIR, which holds model/
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from policy_ranks import ProcessGroups, replica_part

from megatron_entropic.policy.policy import Policy
from megatron_entropic.policy.state.checkpoint import checkpoint_path
from megatron_entropic.policy.step.sft import warm_start_step
from megatron_entropic.types import Sequence

OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.5, "epsilon": 1e-5}


def batch() -> list[Sequence]:
    generator = torch.Generator().manual_seed(31)
    lengths = ((3, 14), (17, 1), (9, 21), (2, 45), (30, 7))
    return [Sequence(torch.randint(251, (p + r,), generator=generator), p) for p, r in lengths]


def steps_of(policy: Policy) -> list[torch.Tensor]:
    parts = policy.optimizer.megatron.chained_optimizers
    return [state["step"] for part in parts for state in part.optimizer.state.values()]


def shared_step(work: Path, rendezvous: ProcessGroups) -> dict[str, Any]:
    """Resume with and without each patch of the distributed optimizer, then train one step."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    report: dict[str, Any] = {}
    path = checkpoint_path(work / "checkpoints", 2)
    warm = {"steps": 9, "file": "unused", "learning_rate": 1e-3, "warmup_steps": 0}
    with rendezvous.policy(work / "model", optimizer=OPTIMIZER, warm_start=warm) as policy:
        part = replica_part(policy, batch())
        for _ in range(2):
            warm_start_step(policy._machinery, part, policy.optimizer, "fused_loss")
        policy.save_checkpoint(path, {})
        policy.check_checkpoint(wait=True)
        report["children"] = len(psutil.Process().children(recursive=True))
        report["went on"] = exact(policy.warm_start_step(part))
    patched = {
        name: DistributedOptimizer.__dict__[name]
        for name in ("load_state_dict", "_set_main_param_and_optimizer_states")
    }
    for label, without in (("patched", None), *((name, name) for name in patched)):
        with rendezvous.policy(work / "model", optimizer=OPTIMIZER, warm_start=warm) as policy:
            if without is not None:
                setattr(DistributedOptimizer, without, patched[without].__wrapped__)
            try:
                report[label] = resumed(policy, path)
            finally:
                for name, function in patched.items():
                    setattr(DistributedOptimizer, name, function)
    return report


def resumed(policy: Policy, path: Path) -> dict[str, Any]:
    part = replica_part(policy, batch())
    try:
        policy.load_checkpoint(path)
    except KeyError as error:
        return {"error": str(error)}
    tensors = len({step.data_ptr() for step in steps_of(policy)})
    parameters = len(steps_of(policy))
    metrics = exact(policy.warm_start_step(part))
    counts = sorted({float(step) for step in steps_of(policy)})
    return {"tensors": tensors, "parameters": parameters, "metrics": metrics, "counts": counts}


def exact(metrics: dict[str, float]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in metrics.items()}


def weight_decay(work: Path, rendezvous: ProcessGroups, distributed: bool) -> dict[str, Any]:
    """The first step, with gradients of zero: whatever changes is decay."""
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    layout = {"distributed_optimizer": distributed}
    with rendezvous.policy(work / "model", optimizer=OPTIMIZER, policy=layout) as policy:
        before = {name: value.detach().clone() for name, value in policy.model.named_parameters()}
        policy.optimizer.zero_grad()
        policy.optimizer.step()
        policy.synchronize_parameters()
        factors = {
            name: float((value.detach().double() / before[name].double()).median())
            for name, value in policy.model.named_parameters()
        }
        unscheduled = get_megatron_optimizer(
            MegatronOptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.5, use_distributed_optimizer=distributed),
            list(policy._wrapped),
            use_gloo_process_groups=False,
        )
        upstream = [group["weight_decay"] for group in unscheduled.param_groups if group["wd_mult"] == 0.0]
    return {"factors": factors, "vectors": [n for n, v in before.items() if v.dim() == 1], "upstream": upstream}


def main(work: Path) -> None:
    rendezvous = ProcessGroups()
    report = {
        "shared step": shared_step(work, rendezvous),
        "weight decay": [weight_decay(work, rendezvous, distributed) for distributed in (False, True)],
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
