"""One model and one engine of `benchmarks.publish`: policy ranks in their processes, the engine in this one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.policies import ModelSize, write_model
from benchmarks.ranks import run_processes
from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.local_ranks import held_port
from megatron_entropic.policy.publish.gather import RankWeights
from megatron_entropic.policy.publish.publisher import Publisher
from megatron_entropic.types import GenerationRequest, Segment
from megatron_entropic.weight_sync.checksums import checksums, mismatches
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan

LAYOUT = {"tensor_parallel": 2, "pipeline_parallel": 2}
RANKS = 4
FACTOR = 1.0625
"""Every parameter is multiplied by it before it is published, which float32 does exactly alike everywhere."""
PROMPT_TOKENS, RESPONSE_TOKENS = 24, 16
TIMEOUT_S = 900.0


@dataclass
class CaseResult:
    """What was measured; seconds."""

    name: str
    engine_workers: int
    bytes: int
    tensors: int
    buckets: int
    collectives: int
    raw_s: list[float] = field(default_factory=list)
    publish_s: list[float] = field(default_factory=list)
    different_tensors: int = 0
    logprob_distance: float = 0.0


def measure_case(
    name: str, size: ModelSize, engine_workers: int, folder: Path, bucket_mib: float, repetitions: int
) -> CaseResult:
    """Starts policy and engine, measures, compares.

    Args:
        name: for the table.
        size: of the model, float32.
        engine_workers: tensor parallel size of the engine.
        folder: empty.
        bucket_mib: size of the plan's buckets.
        repetitions: measured pairs of a broadcast and a publication, after one that is not.

    Raises:
        RuntimeError: a rank failed.
    """
    from megatron_entropic.rollout.engine import RolloutEngine

    hf_dir = folder / "model"
    write_model(size, hf_dir)
    plan = _plan(hf_dir, bucket_mib)
    rollout = RolloutConfig(
        tensor_parallel=engine_workers,
        max_response_tokens=RESPONSE_TOKENS,
        kv_cache_gb=0.05,
        max_concurrent_sequences=8,
    )
    engine = RolloutEngine(
        hf_dir, "float32", rollout, max_model_tokens=PROMPT_TOKENS + RESPONSE_TOKENS, seed=1, device="cpu"
    )
    result = CaseResult(
        name=name,
        engine_workers=engine_workers,
        bytes=plan.bytes,
        tensors=sum(len(bucket.hf_names) for bucket in plan.buckets),
        buckets=len(plan.buckets),
        # Gloo: one gathering and one broadcast a bucket, no send between stages.
        collectives=2 * len(plan.buckets),
    )
    with held_port() as port:
        arguments = (port, hf_dir, folder, bucket_mib, repetitions, engine_workers)
        told = run_processes(_policy_rank, RANKS, *arguments, timeout_s=TIMEOUT_S)
        engine.connect(next(told), rank_offset=1)  # the ranks have met by then
    for repetition in range(repetitions + 1):
        raw_s = next(told)
        with ThreadPoolExecutor(1) as waiting:
            (folder / f"go-{repetition}").touch()
            started = waiting.submit(next, told)
            engine.receive(plan, repetition + 1)
            ended = time.time()
            publish_s = ended - started.result()
        if repetition:
            result.raw_s.append(raw_s)
            result.publish_s.append(publish_s)
    for _ in told:
        pass
    _compare(engine, hf_dir, size, result)
    return result


def _plan(hf_dir: Path, bucket_mib: float) -> PublishPlan:
    return publish_plan(
        ParameterMap(read_dimensions(hf_dir)),
        PolicyConfig(**LAYOUT),
        bucket_bytes=int(bucket_mib * 2**20),
        dtype="float32",
    )


def _policy_rank(
    rank: int,
    ranks: int,
    port: int,
    hf_dir: Path,
    folder: Path,
    bucket_mib: float,
    repetitions: int,
    engine_workers: int,
) -> Iterator[Any]:
    """On rank 0: the senders, then for each repetition the time of the broadcast and the start of the publication."""
    from megatron_entropic.policy.megatron.parallel import initialise_model_parallel
    from megatron_entropic.policy.megatron.platform import Rendezvous, select_platform
    from megatron_entropic.policy.model.load import load_weights

    platform = select_platform("cpu")
    platform.init_process_group(Rendezvous(port, rank=rank, world_size=ranks), timeout_s=TIMEOUT_S)
    from megatron_entropic.policy.model.build import build_model

    policy = PolicyConfig(**LAYOUT)
    parallel = initialise_model_parallel(policy)
    platform.manual_seed(1)
    parameter_map = ParameterMap(read_dimensions(hf_dir))
    model = build_model(parameter_map.dimensions, policy, "float32", parallel, platform)
    load_weights(model, hf_dir, parallel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(FACTOR)
    plan = _plan(hf_dir, bucket_mib)
    receivers = dist.new_group(list(range(1 + engine_workers)))
    publisher = Publisher(RankWeights(model, plan, parameter_map, parallel), host="127.0.0.1", timeout_s=TIMEOUT_S)
    senders: list[Any] = [None] * ranks
    dist.all_gather_object(senders, publisher.open(engine_workers))
    yield [sender for sender in senders if sender]
    publisher.accept()
    buffer = torch.ones(plan.bytes, dtype=torch.uint8)
    for repetition in range(repetitions + 1):
        dist.barrier()
        started = time.perf_counter()
        if rank <= engine_workers:
            dist.broadcast(buffer, src=0, group=receivers)
        dist.barrier()
        yield time.perf_counter() - started
        while not (folder / f"go-{repetition}").exists():
            time.sleep(0.001)
        dist.barrier()
        yield time.time()
        publisher.publish()
    dist.barrier()
    publisher.close()


def _compare(engine: Any, hf_dir: Path, size: ModelSize, result: CaseResult) -> None:
    reader = HfReader(hf_dir)
    expected = checksums((name, reader[name] * FACTOR) for name in reader)
    result.different_tensors = len(mismatches(expected, {"engine": engine.weight_pieces()}))
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(size.vocab, (4, PROMPT_TOKENS), generator=generator, dtype=torch.int32).numpy()
    responses = engine.generate([GenerationRequest(prompt, seed) for seed, prompt in enumerate(prompts)])
    pairs = zip(prompts.tolist(), responses, strict=True)
    result.logprob_distance = max(_distance(hf_dir, prompt, response.segment) for prompt, response in pairs)


def _distance(hf_dir: Path, prompt: list[int], sampled: Segment) -> float:
    """Largest |engine - transformers| of the response's log-probs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    response = sampled.tokens.tolist()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(FACTOR)
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    return float((torch.from_numpy(sampled.logprobs) - wanted).abs().max())
