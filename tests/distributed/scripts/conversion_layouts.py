"""Loads converted checkpoints under several layouts, scores with them, and saves as megatron-core itself would.

Usage: conversion_layouts.py WORK_DIR

For each case of cases.json, `{"family", "layout", "dtype", "save"}`: WORK_DIR/FAMILY is the Hugging Face directory,
WORK_DIR/FAMILY_DTYPE the conversion, WORK_DIR/saved/NAME where this saves. Prints which parameters differ from those
read from the Hugging Face directory, and distances of statistics from WORK_DIR/FAMILY.pt.
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
    report = {}
    for name, case in json.loads((work / "cases.json").read_text()).items():
        family, dtype = case["family"], case["dtype"]
        reference = torch.load(work / f"{family}.pt")
        sections = {"policy": case["layout"], "model": {"dtype": dtype}}
        sections["rollout"] = {"temperature": reference["temperature"]}
        with rendezvous.policy(work / family, **sections) as policy:
            found = report[name] = load(policy, work / f"{family}_{dtype}")
            sequences = [Sequence(torch.tensor(tokens), prompt) for tokens, prompt in reference["sequences"]]
            scores = policy.score(sequences)
            if scores is not None and dtype == "float32":
                found["distance"] = distance(scores, reference["reference"])
            save(policy, work / "saved" / name, case["save"])
    sys.stdout.write(json.dumps(report))


def load(policy: Policy, megatron_dir: Path) -> dict[str, Any]:
    """Fill the model from a conversion and compare it with what it had read from the Hugging Face directory."""
    parameters = dict(policy.model.named_parameters())
    wanted = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(float("nan"))
    load_torch_dist(policy.model, megatron_dir)
    differing = [name for name, value in wanted.items() if not torch.equal(value, parameters[name])]
    return {"parameters": len(wanted), "differing": differing}


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
        policy.check_checkpoint(wait=True)
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
