"""One life of a rollout engine in a fresh process; what it saw goes into a file for the test to judge.

python rollout_engine_run.py DIRECTORY full|resumed|asynchronous|second_runner

full     generates with the starting weights, fails an update, takes in new weights, generates again, scores.
resumed  has no file of weights to read, takes in the same new weights at once and generates, as a restarted run would.
asynchronous  as full, with the next forward pass scheduled before the last one's tokens are known, as on a GPU.
second_runner  as asynchronous, by the model runner that vLLM takes on a GPU, its Triton kernels interpreted; a few
    short responses, since those are slow.
"""

from __future__ import annotations

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.errors import PhaseTimeout
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.rollout.engine import RolloutEngine
from megatron_entropic.types import GenerationRequest, Response
from megatron_entropic.weight_sync.gloo import FlatContents, GlooSender
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan

HOST = "127.0.0.1"
RESPONSE_TOKENS = 40
LONGEST_PROMPT = 200


def requests_of_step(step: int, vocabulary: int) -> list[GenerationRequest]:
    """Prompts from 1 to LONGEST_PROMPT tokens, the longest first: longer than a cache block, so that it is cached."""
    generator = torch.Generator().manual_seed(step)
    lengths = [LONGEST_PROMPT, 1, *torch.randint(2, LONGEST_PROMPT, (8,), generator=generator).tolist()]
    requests = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(4, vocabulary, (length,), generator=generator, dtype=torch.int32).numpy()
        requests += [GenerationRequest(tokens, 1000 * step + 10 * index + sample) for sample in range(4)]
    return requests


def send_weights(sender: GlooSender, plan: PublishPlan, tensors: dict[str, torch.Tensor]) -> None:
    for bucket in plan.buckets:
        sender.send(FlatContents.of_bucket(bucket), torch.cat([tensors[name].flatten() for name in bucket.hf_names]))


def publish(
    engine: RolloutEngine, plan: PublishPlan, tensors: dict[str, torch.Tensor], version: int, *, receivers: int = 1
) -> None:
    """Connects afresh and moves `tensors` into the engine."""
    sender = GlooSender(HOST, receivers, 60.0)
    host, port = sender.address
    rendezvous = [{"master_address": host, "master_port": port, "world_size": 1 + receivers, "timeout_s": 60.0}]
    with ThreadPoolExecutor(1) as threads:
        accepted = threads.submit(sender.accept)
        engine.connect(rendezvous, rank_offset=1)
        accepted.result()
        sent = threads.submit(send_weights, sender, plan, tensors)
        engine.receive(plan, version)
        sent.result()
    sender.close()


def failed_update(engine: RolloutEngine, plan: PublishPlan) -> tuple[str, str]:
    """A sender that joins and then sends nothing: the engine's error, and what it says when asked to generate."""
    sender = GlooSender(HOST, 1, 2.0)
    host, port = sender.address
    with ThreadPoolExecutor(1) as threads:
        accepted = threads.submit(sender.accept)
        engine.connect(
            [{"master_address": host, "master_port": port, "world_size": 2, "timeout_s": 2.0}], rank_offset=1
        )
        accepted.result()
    try:
        engine.receive(plan, 9)
    except PhaseTimeout as error:
        message = str(error)
    try:
        engine.generate([])
    except RuntimeError as error:
        return message, str(error)
    raise AssertionError("an engine with incomplete weights generated")


def cached_tokens(engine: RolloutEngine, prompt: list[int]) -> int:
    """How much of a prompt vLLM finds in its prefix cache."""
    from vllm import SamplingParams, TokensPrompt

    (output,) = engine._llm.generate(
        [TokensPrompt(prompt_token_ids=prompt)],
        SamplingParams(temperature=0.0, max_tokens=1, detokenize=False),
        use_tqdm=False,
    )
    return int(output.num_cached_tokens)


def every_tensor(engine: RolloutEngine) -> dict[str, str]:
    """SHA-256 of every tensor in a worker's model: parameters, buffers and what layers keep as plain attributes."""

    def look(worker: Any) -> dict[str, str]:
        found = {}
        for name, module in worker.get_model().named_modules():
            for kind in (module._parameters, module._buffers, vars(module)):
                for key, value in kind.items():
                    if isinstance(value, torch.Tensor) and key != "kv_cache":
                        content = value.detach().flatten().view(torch.uint8).numpy()
                        found[f"{name}.{key}"] = hashlib.sha256(content).hexdigest()
        return found

    (found,) = engine._llm.collective_rpc(look)
    return found


def plain(requests: list[GenerationRequest], responses: list[Response]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": request.tokens.tolist(),
            "seed": request.seed,
            "response": response.segment.tokens.tolist(),
            "logprobs": response.segment.logprobs.tolist(),
            "finish_reason": response.finish_reason,
            "version": response.segment.weights_version,
        }
        for request, response in zip(requests, responses, strict=True)
    ]


def schedule_asynchronously() -> None:
    """Undoes what vLLM switches off on a CPU only because it gains nothing there."""
    from vllm.platforms.cpu import CpuPlatform

    switch_off = CpuPlatform.check_and_update_config

    def check(vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        switch_off(vllm_config)
        assert wanted, "vLLM no longer schedules asynchronously by default"
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = staticmethod(check)


def take_the_second_runner() -> None:
    """Has vLLM run its Triton kernels in Triton's interpreter, for which it believes in a Triton made for CPUs.

    Before vLLM is imported.
    """
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    from triton.backends import backends

    driver: Any = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(compiler=None, driver=driver)


def main(directory: Path, life: str) -> None:
    requests, response_tokens = None, RESPONSE_TOKENS
    if life == "second_runner":
        take_the_second_runner()
        requests, response_tokens = 8, 6
    if life in ("asynchronous", "second_runner"):
        schedule_asynchronously()
    old, new = directory / "old", directory / "new"
    parameter_map = ParameterMap(read_dimensions(old))
    vocabulary = parameter_map.dimensions.vocab_size
    config = RolloutConfig(
        max_response_tokens=response_tokens, temperature=0.7, kv_cache_gb=0.1, max_concurrent_sequences=16
    )
    bare = directory / "bare"  # the same model without a file of weights
    engine = RolloutEngine(
        bare if life == "resumed" else old,
        "float32",
        config,
        max_model_tokens=LONGEST_PROMPT + response_tokens,
        seed=1,
        device="cpu",
        load_weights=life != "resumed",
    )
    in_flight = engine._llm.llm_engine.engine_core.engine_core.batch_queue_size
    assert in_flight == (1 if life in ("full", "resumed") else 2), f"{in_flight} forward passes at a time"
    assert engine._llm.llm_engine.vllm_config.use_v2_model_runner == (life == "second_runner")
    plan = publish_plan(parameter_map, PolicyConfig(pipeline_parallel=2), bucket_bytes=50_000, dtype="float32")
    tensors = load_file(new / "model.safetensors")
    seen: dict[str, Any] = {"buckets": len(plan.buckets)}
    if life != "resumed":
        first = requests_of_step(1, vocabulary)[:requests]
        longest = first[0].tokens.tolist()
        seen["before"] = plain(first, engine.generate(first))
        seen["repeated"] = plain(first, engine.generate(first))
        # A caller who stops asking leaves no running request behind, which would forbid the publication below.
        responses = engine.respond(first)
        seen["first finished"] = [
            (position, *plain([first[position]], [response]))
            for position, response in next(finished for finished in responses if finished)
        ]
        responses.close()
        seen["cached before"] = cached_tokens(engine, longest)
        seen["vllm version before"] = engine._llm.get_weight_version()
        seen["timeout"], seen["incomplete"] = failed_update(engine, plan)
    publish(engine, plan, tensors, version=2)
    seen["vllm version after"] = engine._llm.get_weight_version()
    if life != "resumed":
        seen["cached after"] = cached_tokens(engine, longest)
        seen["after"] = plain(first, engine.generate(first))
        # The same state as that of a restarted engine, which has generated nothing yet.
        publish(engine, plan, tensors, version=2)
    second = requests_of_step(2, vocabulary)[:requests]
    seen["step 2"] = plain(second, engine.generate(second))
    seen["every tensor"] = every_tensor(engine)
    seen["pieces"] = sorted((p.name, p.row, p.column, p.checksum) for p in engine.weight_pieces())
    if life != "resumed":
        # vLLM needs room for one token more, which the longest do not leave.
        fitting = [s for s in seen["after"] if len(s["prompt"]) < LONGEST_PROMPT]
        seen["scored"] = engine.score_tokens([(s["prompt"] + s["response"], len(s["prompt"])) for s in fitting])
        too_long = GenerationRequest(np.full(LONGEST_PROMPT + 1, 5, np.int32), 0)
        try:
            engine.generate([too_long])
        except ValueError as error:
            seen["too long"] = str(error)
    torch.save(seen, directory / f"{life}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
