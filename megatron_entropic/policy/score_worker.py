"""The megatron backend of `megatron-entropic score`: the policy's own score pass over a file, in any layout.

    parent   check input, write the job, run the ranks, merge their results, write the output
    rank     load its shard, score its data-parallel share, write scores-<data rank>.json

Ranks are processes of this machine; Ray is not involved.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.checkpoints.peft_adapter import PeftAdapter
from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import Dtype
from megatron_entropic.data.token_file import TokenLine, read_token_file, write_scored_file
from megatron_entropic.errors import UserError
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.batch.balance import attention_weight
from megatron_entropic.policy.batch.prefix_sharing import deal, shares_prefixes
from megatron_entropic.policy.local_ranks import run_as_rank, run_local_ranks, tell_phase
from megatron_entropic.policy.megatron.parallel import ParallelState, initialise_model_parallel, layout_problems
from megatron_entropic.policy.megatron.platform import Device, Platform, Rendezvous, select_platform
from megatron_entropic.policy.model.adapters import fill_adapters
from megatron_entropic.policy.model.load import load_weights
from megatron_entropic.policy.step.forward import pack_alike
from megatron_entropic.policy.step.score import score
from megatron_entropic.types import Scores, Sequence

_MICROBATCHES_PER_REPORT = 16


@dataclass(frozen=True)
class _Job:
    """Job that the parent hands to the ranks, as job.json."""

    hf_dir: str
    policy: dict[str, Any]
    temperature: float
    dtype: Dtype
    device: Device
    tokens: list[list[int]]
    prompt_lengths: list[int]


def score_file(
    hf_dir: Path,
    tokens_path: Path,
    output_path: Path,
    policy: PolicyConfig,
    temperature: float,
    dtype: Dtype,
    device: Device,
) -> None:
    """Score every line of a token file with a policy laid out over `policy.world_size` processes of this machine.

    Raises:
        UserError: bad input (model, layout or lines), before any process starts.
        PeerDied, PhaseTimeout: a rank failed or all stood still for `policy.distributed_timeout_s`.
    """
    reader = HfReader(hf_dir)
    dimensions = reader.parameter_map.dimensions
    lines = read_token_file(tokens_path, dimensions.vocab_size)
    problems = [
        *layout_problems(policy, policy.world_size),
        *dimensions.layout_problems(policy),
    ]
    if temperature <= 0:
        problems.append(f"temperature {temperature:g} must be positive")
    if policy.data_parallel > len(lines):
        problems.append(f"data_parallel={policy.data_parallel}, but there are {len(lines)} sequences")
    if policy.lora.enabled and policy.lora.adapter_dir is not None:
        PeftAdapter(policy.lora.adapter_dir, reader.parameter_map, policy.lora)
    if problems:
        raise UserError(f"{hf_dir} cannot be scored as asked:\n" + "\n".join(f"  - {p}" for p in problems))
    job = _Job(
        hf_dir=str(Path(hf_dir).absolute()),
        policy=policy.model_dump(mode="json"),
        temperature=temperature,
        dtype=dtype,
        device=device,
        tokens=[line.tokens for line in lines],
        prompt_lengths=[line.prompt_length for line in lines],
    )
    with tempfile.TemporaryDirectory(prefix="megatron-entropic-score-") as folder:
        _run_job(job, Path(folder), policy)
        _write_output(output_path, lines, Path(folder), policy.data_parallel)


def _run_job(job: _Job, job_dir: Path, policy: PolicyConfig) -> None:
    (job_dir / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    run_local_ranks(__name__, job_dir, policy.world_size, stall_timeout_s=policy.distributed_timeout_s)


def _write_output(output_path: Path, lines: list[TokenLine], job_dir: Path, data_parallel: int) -> None:
    scored: dict[str, tuple[list[float], list[float]]] = {}
    for data_rank in range(data_parallel):
        scored |= json.loads((job_dir / f"scores-{data_rank}.json").read_text(encoding="utf-8"))
    in_order = [scored[str(index)] for index in range(len(lines))]
    write_scored_file(output_path, lines, [pair[0] for pair in in_order], [pair[1] for pair in in_order])


def run_rank(job_dir: Path) -> None:
    """Run one rank of a job, from start to end; its place comes from the environment."""
    rendezvous = Rendezvous.from_environment()
    rank = rendezvous.rank
    job = _Job(**json.loads((job_dir / "job.json").read_text(encoding="utf-8")))
    policy = PolicyConfig(**job.policy)
    tell_phase(job_dir, rank, "rendezvous")
    platform = select_platform(job.device)
    platform.init_process_group(rendezvous, timeout_s=policy.distributed_timeout_s)
    dimensions = read_dimensions(Path(job.hf_dir))
    shared = shares_prefixes(policy, dimensions, on_cpu=platform.takes_prefixes)
    state = initialise_model_parallel(policy, share_prefixes=shared)
    tell_phase(job_dir, rank, "load weights")
    model = _load_model(job, policy, platform, state)
    indices, results = _score_own_share(model, job, policy, state, job_dir, attention_weight(dimensions))
    if state.reports:
        scored = {
            index: (logprobs.tolist(), entropies.tolist())
            for index, logprobs, entropies in zip(indices, results.logprobs, results.entropies, strict=True)
        }
        (job_dir / f"scores-{state.data_rank}.json").write_text(json.dumps(scored), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _load_model(job: _Job, policy: PolicyConfig, platform: Platform, state: ParallelState) -> torch.nn.ModuleList:
    from megatron_entropic.policy.model.build import build_model

    platform.manual_seed(0)
    dimensions = HfReader(Path(job.hf_dir)).parameter_map.dimensions
    model = build_model(dimensions, policy, job.dtype, state, platform)
    load_weights(model, Path(job.hf_dir), state)
    if policy.lora.enabled:
        fill_adapters(model, ParameterMap(dimensions), policy.lora, state, seed=0)
    return model


def _score_own_share(
    model: torch.nn.ModuleList, job: _Job, policy: PolicyConfig, state: ParallelState, job_dir: Path, weight: float
) -> tuple[list[int], Scores]:
    """Score this replica's sequences; returns their indices in the file, and scores in that order (last stage only).

    `weight` is the model's `attention_weight`.
    """
    everything = [
        Sequence(torch.tensor(tokens), prompt) for tokens, prompt in zip(job.tokens, job.prompt_lengths, strict=True)
    ]
    own = deal(everything, weight, state.data_size, shared=state.share_prefixes)[state.data_rank]
    sequences = [everything[index] for index in own]
    micro_batches = pack_alike(sequences, policy.tokens_per_microbatch, state, next(model.parameters()).device)
    order: list[int] = []
    scored = Scores([], [])
    at_once = -(-_MICROBATCHES_PER_REPORT // state.packing.count_multiple) * state.packing.count_multiple
    for first in range(0, len(micro_batches), at_once):
        tell_phase(job_dir, state.rank, f"score micro-batch {first} of {len(micro_batches)}")
        some = micro_batches[first : first + at_once]
        order += sorted(index for micro_batch in some for index in micro_batch.indices)
        scores = score(model, some, state, temperature=job.temperature)
        if scores is not None:
            scored.logprobs.extend(scores.logprobs)
            scored.entropies.extend(scores.entropies)
    return [own[index] for index in order], scored


if __name__ == "__main__":
    run_as_rank(run_rank)
