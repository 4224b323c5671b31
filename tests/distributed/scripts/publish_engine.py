"""A vLLM engine of two workers that samples from weights version 0, 1 and 2, the latter from policy ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.observability.stacks import stacks_of_family
from megatron_entropic.rollout.engine import RolloutEngine
from megatron_entropic.types import GenerationRequest
from megatron_entropic.weight_sync.checksums import checksums, mismatches
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan

WAIT_S = 240
NAMES = ("zero", "one", "two")


def plan_for(hf_dir: Path) -> PublishPlan:
    parameter_map = ParameterMap(read_dimensions(hf_dir))
    return publish_plan(parameter_map, PolicyConfig(tensor_parallel=2), bucket_bytes=100_000, dtype="float32")


def generate(engine: RolloutEngine) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    requests = []
    for index, length in enumerate((150, 1, 30)):
        tokens = torch.randint(4, 97, (length,), generator=generator, dtype=torch.int32).numpy()
        requests += [GenerationRequest(tokens, 10 * index + sample) for sample in range(3)]
    return [
        {
            "prompt": request.tokens.tolist(),
            "response": response.segment.tokens.tolist(),
            "logprobs": response.segment.logprobs.tolist(),
            "version": response.segment.weights_version,
        }
        for request, response in zip(requests, engine.generate(requests), strict=True)
    ]


def main(directory: Path) -> None:
    config = RolloutConfig(
        tensor_parallel=2, max_response_tokens=24, temperature=0.8, kv_cache_gb=0.1, max_concurrent_sequences=16
    )
    engine = RolloutEngine(directory / "zero", "float32", config, max_model_tokens=180, seed=1, device="cpu")
    seen: dict[str, Any] = {"0": generate(engine)}
    try:
        engine.receive(plan_for(directory / "other"), 5)
    except ValueError as error:
        seen["misfit"] = str(error)
    rendezvous = directory / "rendezvous.json"
    deadline = time.monotonic() + WAIT_S
    while not rendezvous.exists():
        assert time.monotonic() < deadline, "the policy ranks did not open a rendezvous"
        time.sleep(0.1)
    engine.connect(json.loads(rendezvous.read_text()), rank_offset=1)
    plan = plan_for(directory / "zero")
    for version in (1, 2):
        engine.receive(plan, version)
        seen[str(version)] = generate(engine)
        sent = checksums(load_file(directory / NAMES[version] / "model.safetensors").items())
        seen[f"{version} weights"] = mismatches(sent, {"engine": engine.weight_pieces()})
    sent["model.norm.weight"] += 1
    seen["wrong"] = mismatches(sent, {"engine": engine.weight_pieces()})
    seen["stacks"] = stacks_of_family(os.getpid())
    torch.save(seen, directory / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
