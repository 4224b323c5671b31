"""Every method on the same batch under two layouts: first gradients, and the metrics of a few training steps.

Usage: methods.py DIRECTORY SAVED_PT

DIRECTORY holds a model, sequences.pt and cases.json (sections of the configuration by name). Prints metrics as JSON;
rank 0 saves the first gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from policy_ranks import RANK, ProcessGroups, configuration, hf_gradients, hf_parameters, replica_part, start_over

from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Sequence

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel": 2, "tokens_per_microbatch": 16384},
    "dp2": {"tokens_per_microbatch": 60},
}
STEPS = 3
# A gradient of rounding noise must not become a step of full size.
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.0, "gradient_clip": 0.0, "epsilon": 1e-4}


def train(policy: Policy, model: Path, sections: dict[str, Any], batch: list[Sequence]) -> tuple[Any, Any, float]:
    """(metrics of each step, gradients of the first, how far the parameters moved)."""
    policy_section = {**policy.config.policy.model_dump(), **sections.get("policy", {})}
    others = {name: section for name, section in sections.items() if name != "policy"}
    start_over(policy, configuration(model, policy=policy_section, optimizer=OPTIMIZER, **others))
    part = replica_part(policy, batch)
    before = hf_parameters(policy)
    policy.score(part)
    # Old log-probs of another policy say nothing about which tokens are probable now.
    policy._freshly_scored = False
    trace = [policy.update(part)]
    gradients = hf_gradients(policy)
    trace += [policy.update(part) for _ in range(STEPS - 1)]
    after = hf_parameters(policy)
    moved = max((float((after[name] - before[name]).abs().max()) for name in after), default=0.0)
    return [{k: float(v).hex() for k, v in step.items()} for step in trace], gradients, moved


def main(directory: Path, saved_path: Path) -> None:
    model = directory / "model"
    batch = [Sequence(**fields) for fields in torch.load(directory / "sequences.pt")]
    cases = json.loads((directory / "cases.json").read_text())
    rendezvous = ProcessGroups()
    report: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for layout_name, layout in LAYOUTS.items():
        plain = {**layout, "distributed_optimizer": False}
        with rendezvous.policy(model, policy=plain) as policy:
            for case, sections in cases.items():
                name = f"{layout_name}/{case}"
                trace, saved[name], moved = train(policy, model, sections, batch)
                report[name] = {"trace": trace, "moved": moved}
    if RANK == 0:
        torch.save(saved, saved_path)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
