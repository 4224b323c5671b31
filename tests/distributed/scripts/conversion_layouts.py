"""Loads converted checkpoints under several layouts, scores with them, and saves as megatron-core itself would.

Usage: conversion_layouts.py WORK_DIR

For each case of cases.json, `{"family", "layout", "save"}`: WORK_DIR/FAMILY is the Hugging Face directory,
WORK_DIR/FAMILY_megatron the conversion, WORK_DIR/saved/NAME where this saves. Prints distances from WORK_DIR/FAMILY.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from policy_ranks import RANK, Rendezvous

from megatron_entropic.policy.load_torch_dist import load_torch_dist
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Scores, Sequence


def main(work: Path) -> None:
    rendezvous = Rendezvous()
    distances = {}
    for name, case in json.loads((work / "cases.json").read_text()).items():
        reference = torch.load(work / f"{case['family']}.pt")
        rollout = {"temperature": reference["temperature"]}
        with rendezvous.policy(work / case["family"], policy=case["layout"], rollout=rollout) as policy:
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.fill_(float("nan"))
            load_torch_dist(policy.model, work / f"{case['family']}_megatron")
            sequences = [Sequence(torch.tensor(tokens), prompt) for tokens, prompt in reference["sequences"]]
            scores = policy.score(sequences)
            if scores is not None:
                distances[name] = distance(scores, reference["reference"])
            save(policy, work / "saved" / name, case["save"])
    sys.stdout.write(json.dumps(distances))


def distance(scores: Scores, reference: list[Any]) -> float:
    found = [torch.cat(scores.logprobs), torch.cat(scores.entropies)]
    wanted = [torch.cat([pair[i] for pair in reference]) for i in range(2)]
    return max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True))


def save(policy: Policy, directory: Path, how: str) -> None:
    """`run`: a checkpoint of a run, with optimizer state. Others: the model alone, in a form of megatron-core's."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    if how == "run":
        # The optimizer copied its main parameters before the conversion was loaded.
        policy.optimizer = policy._build_optimizer()
        policy.save_checkpoint(directory, {})
    elif how:
        metadata = {"singleton_local_shards": True} if how == "single" else None
        chunks: list[Any] = list(policy.model)
        state = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
        for value in nested_values(state):
            if how == "prefixed":
                value.key = f"model.{value.key}"
        if RANK == 0:
            directory.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(state, str(directory))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
