"""Trains with and without giving device memory back between steps, under several layouts; prints JSON.

Usage: offload.py SEQUENCES_JSON RUNS_JSON

SEQUENCES_JSON holds [tokens, prompt length] of each sequence; a run is {"name", "hf_dir", "dtype", "policy", "kl"}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from policy_ranks import ProcessGroups, replica_part, sequences_with_advantages

from megatron_entropic.config.policy import OFFLOAD_PARTS
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Sequence

STEPS = 3


def digest(policy: Policy) -> str:
    """Of every bit of parameters and optimizer state; they must be on the device."""
    sha = hashlib.sha256()
    for tensor in [*policy.model.parameters(), *policy.optimizer.state_tensors()]:
        # A copy: torch keeps memory that numpy has seen from ever being resized.
        sha.update(tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def sequences(lines: list[tuple[list[int], int]]) -> list[Sequence]:
    """With log-probs of policies that thought little of every token."""
    found = []
    for sequence in sequences_with_advantages(lines):
        values = torch.full((sequence.response_length,), -5.0)
        found.append(replace(sequence, old_logprobs=values, reference_logprobs=values.clone()))
    return found


def train(policy: Policy, part: list[Sequence], offloaded: tuple[str, ...]) -> dict[str, Any]:
    trace, left, held = [], [], []
    whole = policy._memory.bytes_on_device(policy.optimizer)
    for _ in range(STEPS):
        if offloaded:
            left.append(policy.offload(offloaded)["memory/offloaded_mb"] * 2**20)
            held.append(policy._memory.bytes_on_device(policy.optimizer))
            storages = {p.untyped_storage().nbytes() for p in policy.model.parameters()}
            assert ("parameters" in offloaded) == (storages == {0})
        policy.score(part)
        after_score = policy._memory.bytes_on_device(policy.optimizer)
        if "reference" in policy._frozen:
            policy.score(part, frozen="reference")
        trace.append({name: float(value).hex() for name, value in policy.update(part).items()})
    policy.offload(offloaded)
    policy._memory.restore(OFFLOAD_PARTS)
    return {
        "trace": trace,
        "digest": digest(policy),
        "left": left,
        "held": held,
        "whole": whole,
        "after_score": after_score,
    }


def resume(policy: Policy, part: list[Sequence], folder: Path) -> str:
    """Saves and loads while everything has left, then publishes nothing and offloads again: still the same bits."""
    policy.offload()
    policy.save_checkpoint(folder / "step_1", {})
    policy.offload()  # while files are still being written
    policy.check_checkpoint(wait=True)
    policy.load_checkpoint(folder / "step_1")
    policy.offload()
    policy.synchronize_parameters()
    assert not policy._memory.on_device("optimizer")
    policy._memory.restore(OFFLOAD_PARTS)
    return digest(policy)


def main(lines: list[tuple[list[int], int]], runs: list[dict[str, Any]]) -> None:
    rendezvous = ProcessGroups()
    reports: dict[str, Any] = {}
    for run in runs:
        sections = {
            "policy": {"tokens_per_microbatch": 60, **run["policy"]},
            "model": {"dtype": run["dtype"]},
            "algorithm": {"kl": {"coefficient": run["kl"]}},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
            "entropy_control": {"target": 1.0},
            "rollout": {"max_response_tokens": 64},
            "train": {"steps": 9},
        }
        for offloaded in ((), ("optimizer",), OFFLOAD_PARTS):
            with rendezvous.policy(Path(run["hf_dir"]), **sections) as policy:
                part = replica_part(policy, sequences(lines))
                report = train(policy, part, offloaded)
                if offloaded == OFFLOAD_PARTS:
                    report["resumed"] = resume(policy, part, Path(run["folder"]))
                reports[f"{run['name']}/{'+'.join(offloaded)}"] = report
    sys.stdout.write(json.dumps(reports))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
