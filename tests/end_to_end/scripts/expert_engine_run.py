"""An engine of a model with experts that starts without weights and takes in two publications; what it saw is a file.

python expert_engine_run.py DIRECTORY TENSOR_PARALLEL

DIRECTORY/one and DIRECTORY/two are Hugging Face directories, DIRECTORY/bare the first without its weights; the result
is DIRECTORY/seen.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rollout_engine_run import plain, publish, requests_of_step
from safetensors.torch import load_file

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.rollout.engine import RolloutEngine
from megatron_entropic.weight_sync.checksums import checksums, mismatches
from megatron_entropic.weight_sync.plan import publish_plan


def main(directory: Path, tensor_parallel: int) -> None:
    parameter_map = ParameterMap(read_dimensions(directory / "one"))
    config = RolloutConfig(
        tensor_parallel=tensor_parallel,
        max_response_tokens=12,
        temperature=0.7,
        kv_cache_gb=0.1,
        max_concurrent_sequences=16,
    )
    engine = RolloutEngine(
        directory / "bare", "float32", config, max_model_tokens=240, seed=1, device="cpu", load_weights=False
    )
    requests = requests_of_step(1, parameter_map.dimensions.vocab_size)[::4]
    seen: dict[str, Any] = {}
    try:
        engine.generate(requests)
    except RuntimeError as error:
        seen["refusal"] = str(error)
    plan = publish_plan(parameter_map, PolicyConfig(pipeline_parallel=2), bucket_bytes=100_000, dtype="float32")
    for version, name in enumerate(("one", "two"), start=1):
        tensors = load_file(directory / name / "model.safetensors")
        publish(engine, plan, tensors, version, receivers=tensor_parallel)
        sent = checksums(tensors.items())
        seen[f"{name} weights"] = mismatches(sent, {"engine": engine.weight_pieces()})
        seen[name] = plain(requests, engine.generate(requests))
    changed = next(name for name in reversed(sent) if ".experts.3." in name)
    tensors[changed][1, 2] += 1.0
    seen["changed"] = changed
    seen["wrong"] = mismatches(checksums(tensors.items()), {"engine": engine.weight_pieces()})
    torch.save(seen, directory / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
