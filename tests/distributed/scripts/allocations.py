"""Builds policies of several layouts and prints, as JSON, what each rank has allocated, in bytes.

Usage: allocations.py CASES_JSON

CASES_JSON maps names to {"hf_dir", "policy", "dtype", "lengths"}; with lengths (tokens of sequences), the storages that
autograd keeps after one forward of all of them are measured too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from policy_ranks import ProcessGroups

from megatron_entropic.policy.batch.microbatch import pack
from megatron_entropic.policy.model.outputs import OutputOptions
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Sequence


def size(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(policy: Policy) -> dict[str, int]:
    """Moments, and main parameters where the optimizer steps on copies."""
    moments, main = 0, 0
    model_storages = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    for part in policy.optimizer.megatron.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            moments += size(state[name] for name in ("exp_avg", "exp_avg_sq"))
            if parameter.untyped_storage().data_ptr() not in model_storages:
                main += size([parameter])
    return {"moments": moments, "main_parameters": main}


def saved_bytes(policy: Policy, lengths: list[int]) -> int:
    """Storages that one forward pass leaves to the backward pass, each counted once, parameters not."""
    # Prompts of their own: what is planned is that of whole sequences, none of which leaves its prompt out.
    sequences = [
        Sequence(tokens=torch.arange(first, first + length) % 199, prompt_length=length // 4)
        for first, length in enumerate(lengths)
    ]
    (micro_batch,) = pack(sequences, sum(lengths) + 8, policy.parallel.packing)
    (model,) = policy._machinery.model
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {buffer.grad_data.untyped_storage().data_ptr() for buffer in model.buffers}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Holds on to every saved tensor, so that no address is used twice.
        output = model(micro_batch=micro_batch, options=OutputOptions(head="recompute"))
    del output
    return sum(storage.nbytes() for storage in saved.values())


def measure(policy: Policy, lengths: list[int] | None) -> dict[str, Any]:
    """What this rank holds."""
    buffers = [b for chunk in policy._machinery.model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parallel = policy.parallel
    return {
        "stage": policy.parallel.pipeline_rank,
        "data_rank": parallel.data_rank * parallel.context_size + parallel.context_rank,
        "expert_data_rank": policy.parallel.expert_data_rank,
        "parameters": size(policy.model.parameters()),
        "parameter_buffer": size(buffer.param_data for buffer in buffers if buffer.param_data is not None),
        "gradients": size(buffer.grad_data for buffer in buffers),
        "activations": saved_bytes(policy, lengths) if lengths else None,
        **optimizer_bytes(policy),
    }


def main(cases: dict[str, dict[str, Any]]) -> None:
    rendezvous = ProcessGroups()
    report = {}
    for name, case in cases.items():
        with rendezvous.policy(Path(case["hf_dir"]), policy=case["policy"], model={"dtype": case["dtype"]}) as policy:
            report[name] = measure(policy, case.get("lengths"))
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
