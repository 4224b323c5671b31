"""Updates the same batch under several layouts; prints metrics as JSON, rank 0 saves gradients and parameters.

Usage: update_layouts.py CASES_DIR LAYOUTS_JSON SAVED_PT

CASES_DIR holds plan.json and for each family a model directory and its sequences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from policy_ranks import (
    RANK,
    ProcessGroups,
    adapter_gradients,
    adapter_parameters,
    configuration,
    hf_gradients,
    hf_parameters,
    replica_part,
    start_over,
)

from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Sequence


def sections(case: dict[str, Any], layout: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A case in the project's own configuration."""
    corrected = case["importance_cap"] is not None
    return {
        "policy": {**layout, "lora": case["lora"] or {}},
        "rollout": {
            "temperature": case["temperature"],
            "max_response_tokens": case["max_response_tokens"],
            "importance_correction": "tis" if corrected else "none",
            "importance_cap": case["importance_cap"] or 2.0,
        },
        "algorithm": {
            "aggregation": case["aggregation"],
            "clip_low": case["clip_low"],
            "clip_high": case["clip_high"],
            "dual_clip": case["dual_clip"],
            "kl": {"coefficient": case["kl"], "estimator": "k3"},
        },
        "entropy_control": {
            name: case[name]
            for name in ("controller", "target", "kp", "ki", "tau", "denominator", "ratio_clip", "feedback")
        },
        "optimizer": optimizer,
        "train": {"steps": case["steps"]},
    }


def sequences_of(case: dict[str, Any], fields: list[dict[str, Any]]) -> list[Sequence]:
    """Sequences with everything that some loss reads; on-policy cases are scored under the starting weights."""
    old = "current_logprobs" if case["on_policy"] else "old_logprobs"
    return [
        Sequence(
            tokens=torch.tensor(field["tokens"]),
            prompt_length=field["prompt_length"],
            advantages=field["advantages"],
            old_logprobs=field[old].float(),
            rollout_logprobs=field["rollout_logprobs"].float(),
            reference_logprobs=field["reference_logprobs"].float(),
            mask=field["mask"],
            success=field["success"],
        )
        for field in fields
    ]


def first_update(
    policy: Policy, directory: Path, case: dict[str, Any], layout: dict[str, Any], *, reverse: bool
) -> Any:
    """Metrics and gradients of one update."""
    optimizer = {"gradient_clip": 0.0, "learning_rate": 1e-4}
    start_over(policy, configuration(directory / case["family"], **sections(case, layout, optimizer)))
    sequences = sequences_of(case, torch.load(directory / f"{case['family']}.pt"))
    part = replica_part(policy, sequences[::-1] if reverse else sequences)
    policy.score(part)
    # Old log-probs of another policy say nothing about which tokens are probable now.
    policy._freshly_scored = case["on_policy"]
    metrics = policy.update(part)
    batch = policy._machinery.align(part)
    idle = sum(not micro_batch.sequences for micro_batch in batch)
    gradients = adapter_gradients(policy) if case["lora"] else hf_gradients(policy)
    return _exact(metrics), gradients, [len(batch), idle]


def train(policy: Policy, directory: Path, plan: Any, case: dict[str, Any], layout: dict[str, Any]) -> Any:
    """Metrics of several updates, the parameters after them."""
    optimizer = {**plan["optimizer"], "schedule": "linear"}
    del optimizer["total_steps"]
    start_over(policy, configuration(directory / case["family"], **sections(case, layout, optimizer)))
    part = replica_part(policy, sequences_of(case, torch.load(directory / f"{case['family']}.pt")))
    trace = []
    for _ in range(plan["train_steps"]):
        policy.score(part)
        policy._freshly_scored = False
        trace.append(_exact(policy.update(part)))
    return trace, adapter_parameters(policy) if case["lora"] else hf_parameters(policy)


def main(directory: Path, layouts: dict[str, dict[str, Any]], saved_path: Path) -> None:
    plan = json.loads((directory / "plan.json").read_text())
    rendezvous = ProcessGroups()
    report: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for name, entry in layouts.items():
        plain = {**entry["layout"], "distributed_optimizer": False}
        # Those of one model, with adapters or without.
        models: dict[str, dict[str, Any]] = {}
        for label in entry["cases"]:
            case = plan["cases"][label]
            models.setdefault(f"{case['family']} {case['lora']}", {})[label] = case
        for cases in models.values():
            family = next(iter(cases.values()))["family"]
            with rendezvous.policy(directory / family, **sections(next(iter(cases.values())), plain, {})) as policy:
                for label, case in cases.items():
                    metrics, saved[f"{name}/{label}"], counts = first_update(
                        policy, directory, case, plain, reverse=entry["reverse"]
                    )
                    report[f"{name}/{label}"] = {"metrics": metrics, "micro_batches": counts}
        for kind in entry["train"]:
            chosen = {**entry["layout"], "distributed_optimizer": kind == "distributed"}
            case = plan["cases"][entry["train_case"]]
            with rendezvous.policy(directory / case["family"], **sections(case, chosen, {})) as policy:
                trace, saved[f"{name}/train/{kind}"] = train(policy, directory, plan, case, chosen)
                report[f"{name}/train/{kind}"] = {"trace": trace}
    if RANK == 0:
        torch.save(saved, saved_path)
    sys.stdout.write(json.dumps(report))


def _exact(metrics: dict[str, float]) -> dict[str, str]:
    """Bits, not digits: ranks must agree on them."""
    return {name: float(value).hex() for name, value in metrics.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
