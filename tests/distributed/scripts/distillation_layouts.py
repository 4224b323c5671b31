"""One update with a teacher in the loss under several layouts; prints metrics as JSON, rank 0 saves gradients and the
teacher's log-probs.

Usage: distillation_layouts.py DIRECTORY LAYOUTS_JSON SAVED_PT

DIRECTORY holds models of two shapes, sections.json and for each model sequences.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from policy_ranks import RANK, ProcessGroups, hf_gradients, replica_part

from megatron_entropic.policy.batch.balance import data_parallel_shards
from megatron_entropic.types import Sequence


def main(directory: Path, layouts: dict[str, dict[str, Any]], saved_path: Path) -> None:
    sections = json.loads((directory / "sections.json").read_text())
    rendezvous = ProcessGroups()
    report: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for name, entry in layouts.items():
        student = entry["student"]
        teacher = {"teacher_hf_dir": directory / entry["teacher"], "term": "loss", "coefficient": 0.6}
        algorithm = {**sections["algorithm"], "distillation": teacher}
        policy_section = {**entry["layout"], "distributed_optimizer": False, "tokens_per_microbatch": 60}
        sequences = [Sequence(**fields) for fields in torch.load(directory / f"{student}.pt")]
        with rendezvous.policy(
            directory / student, **{**sections, "algorithm": algorithm, "policy": policy_section}
        ) as policy:
            part = replica_part(policy, sequences)
            policy.score(part)
            taught = policy.score(part, frozen="teacher")
            policy._freshly_scored = False
            metrics = policy.update(part)
            report[name] = {key: float(value).hex() for key, value in metrics.items()}
            saved[name] = {"gradients": hf_gradients(policy)}
            if taught is not None:
                lengths = [sequence.tokens.numel() for sequence in sequences]
                own = data_parallel_shards(lengths, policy.parallel.data_size)[policy.parallel.data_rank]
                report[f"{name}/teacher"] = {
                    str(index): [value.hex() for value in logprobs.tolist()]
                    for index, logprobs in zip(own, taught.logprobs, strict=True)
                }
    if RANK == 0:
        torch.save(saved, saved_path)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
