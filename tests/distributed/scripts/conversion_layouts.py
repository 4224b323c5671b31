"""Loads converted checkpoints under several layouts, scores with them, and saves as megatron-core's users would.

Usage: conversion_layouts.py WORK_DIR

For each case of cases.json, `{"family", "layout", "dtype", "save"}`: WORK_DIR/FAMILY is the Hugging Face directory,
WORK_DIR/FAMILY_DTYPE the conversion, WORK_DIR/saved/NAME where this saves. Prints which parameters differ from those
read from the Hugging Face directory, and distances of statistics from WORK_DIR/FAMILY.pt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from policy_ranks import RANK, ProcessGroups

from megatron_entropic.policy.model.load import load_torch_dist, load_weights, named_entries
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Scores, Sequence


def main(work: Path) -> None:
    rendezvous = ProcessGroups()
    report = {}
    for name, case in json.loads((work / "cases.json").read_text()).items():
        family, dtype = case["family"], case["dtype"]
        reference = torch.load(work / f"{family}.pt")
        sections: dict[str, Any] = {"policy": case["layout"], "model": {"dtype": dtype}}
        if case.get("megatron_start"):
            sections["model"]["megatron_dir"] = work / f"{family}_{dtype}"
        sections["rollout"] = {"temperature": reference["temperature"]}
        with rendezvous.policy(work / family, **sections) as policy:
            converted, saved = work / f"{family}_{dtype}", work / "saved" / name
            found = {"parameters": len(list(policy.model.parameters()))}
            found["by megatron-core"] = differing(policy, by_megatron_core, converted)
            found["as a start"] = differing(policy, as_a_start, converted)
            sequences = [Sequence(torch.tensor(tokens), prompt) for tokens, prompt in reference["sequences"]]
            scores = policy.score(sequences)
            if scores is not None and dtype == "float32":
                found["distance"] = distance(scores, reference["reference"])
            if case["save"]:
                save(policy, saved, case["save"])
                found["saved"] = differing(policy, as_a_start, saved)
            report[name] = found
    sys.stdout.write(json.dumps(report))


def differing(policy: Policy, load: Callable[[Policy, Path], None], megatron_dir: Path) -> list[str]:
    """Names of the parameters and buffers that `load` leaves other than they were, bit for bit."""
    entries = named_entries(policy.model, policy.parameter_map, policy.parallel)
    parameters = {entry.megatron_name: value for entry, value in entries}
    wanted = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(float("nan"))
    load(policy, megatron_dir)
    return [name for name, value in wanted.items() if not torch.equal(value, parameters[name])]


def by_megatron_core(policy: Policy, megatron_dir: Path) -> None:
    load_torch_dist(policy.model, megatron_dir)


def as_a_start(policy: Policy, megatron_dir: Path) -> None:
    """What a run with `model.megatron_dir` does."""
    load_weights(policy.model, policy.config.model.hf_dir, policy.parallel, megatron_dir=megatron_dir)


def distance(scores: Scores, reference: list[Any]) -> float:
    found = [torch.cat(scores.logprobs), torch.cat(scores.entropies)]
    wanted = [torch.cat([pair[i] for pair in reference]) for i in range(2)]
    return max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True))


def save(policy: Policy, directory: Path, how: str) -> None:
    """`run`: a checkpoint of a run. Others: by dist_checkpointing, of the model alone or with all that stands beside it
    in what Megatron-LM's training script saves (`script`)."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    if how == "run":
        # The optimizer copied its main parameters before the conversion was loaded.
        policy.optimizer = policy._build_optimizer()
        policy.save_checkpoint(directory, {})
        policy.check_checkpoint(wait=True)
        return
    metadata = {"singleton_local_shards": True} if how == "single" else None
    chunks: list[Any] = list(policy.model)
    state: dict[str, Any] = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    for value in nested_values(state):
        if how == "prefixed":
            value.key = f"model.{value.key}"
    if how == "script":
        state = beside_the_model(policy, state)
    if RANK == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(directory))


def beside_the_model(policy: Policy, model_state: dict[str, Any]) -> dict[str, Any]:
    """The state that Megatron-LM's `generate_state_dict` makes, with a vocabulary padded to a multiple of 128.

    For layouts without tensor parallelism. Extra states of layers are among what the model saves.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    policy.optimizer = policy._build_optimizer()
    optimizer_state = policy.optimizer.sharded_state_dict(model_state, loading=False, format="fully_reshardable")
    for chunk in model_state.values():
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in chunk:
                rows = chunk[name].data
                padded = torch.cat([rows, rows.new_zeros(-len(rows) % 128, rows.shape[1])])
                chunk[name] = ShardedTensor.from_rank_offsets(
                    name, padded, replica_id=chunk[name].replica_id, allow_shape_mismatch=True
                )
    place = (policy.parallel.pipeline_size, policy.parallel.data_size)
    at = (policy.parallel.pipeline_rank, policy.parallel.data_rank)
    everywhere = (dist.get_world_size(),), (dist.get_rank(),)
    return {
        "args": argparse.Namespace(num_layers=policy.parameter_map.dimensions.num_layers),
        "checkpoint_version": 3.0,
        "iteration": 100,
        **model_state,
        "optimizer": optimizer_state,
        "opt_param_scheduler": {"num_steps": 100},
        "rng_state": ShardedObject("rng_state", [{"torch_rng_state": torch.get_rng_state()}], place, at),
        "rerun_state_machine": {
            "mode": "disabled",
            "sharded": ShardedObject("rerun_state_machine_state", 1, *everywhere),
        },
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
