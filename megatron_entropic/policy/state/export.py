"""The policy as a Hugging Face directory: gathered over tensor and pipeline ranks, written by rank 0."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_entropic.checkpoints.hf import write_hf_directory
from megatron_entropic.errors import RunError
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.model.load import named_entries
from megatron_entropic.policy.publish.gather import gather_hf_tensors, sends_weights
from megatron_entropic.weight_sync.plan import PublishPlan


def export_hf(
    output_dir: Path,
    model: torch.nn.ModuleList,
    plan: PublishPlan,
    parameter_map: ParameterMap,
    parallel: ParallelState,
    *,
    template_dir: Path,
) -> None:
    """Write the policy for transformers and vLLM, called by all ranks together.

    Args:
        output_dir: new directory; an earlier export there is replaced when the new one is complete.
        model: the chunks of this rank's stage, not wrapped, with synchronised parameters.
        plan: buckets in which parameters are gathered, and their dtype.
        parameter_map: of the model.
        parallel: this rank's place.
        template_dir: Hugging Face directory whose config and tokenizer are copied.

    Raises:
        RunError: on every rank, when rank 0 cannot write.
    """
    problem: list[str | None] = [None]
    if sends_weights(parallel):
        values = {entry.megatron_name: value for entry, value in named_entries(model, parameter_map, parallel)}
        tensors = gather_hf_tensors(plan, values, parameter_map, parallel, "export")
        if parallel.rank == 0:
            try:
                write_hf_directory(output_dir, tensors, template_dir, overwrite=True)
            except (OSError, ValueError) as error:
                problem = [f"export to {output_dir} failed: {error}"]
        # Other ranks send here. After a failure rank 0 receives what is left, so that nobody waits for it.
        for _ in tensors:
            pass
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise RunError(problem[0])
