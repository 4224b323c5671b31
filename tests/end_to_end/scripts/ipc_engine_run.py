"""An engine takes in weights through vLLM's own IPC engine; of CUDA only the opening of a handle is replaced.

python ipc_engine_run.py MODEL OUTPUT.json

A handle is the number of a buffer of this process. Everything else is what runs on a GPU: both ends of the transport,
vLLM's connection and update calls, its unpacking, loading and processing of the weights.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch.multiprocessing import reductions

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.errors import PeerDied
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.rollout.engine import RolloutEngine
from megatron_entropic.rollout.ipc_transport import DeviceMemory, IpcSender
from megatron_entropic.weight_sync.checksums import checksums, mismatches
from megatron_entropic.weight_sync.gloo import FlatContents
from megatron_entropic.weight_sync.plan import Bucket, PublishPlan, publish_plan

GPU = "GPU-of-this-test"
TIMEOUT_S = 60.0


class Buffers:
    """Two buffers in turn, as a policy rank has them, instead of memory of a GPU."""

    def __init__(self, nbytes: int) -> None:
        self._buffers = [torch.full((nbytes,), 255, dtype=torch.uint8) for _ in range(2)]
        torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=GPU)
        reductions.rebuild_cuda_tensor = self._open

    def export(self, number: int, flat: torch.Tensor) -> DeviceMemory:
        """Overwrite the buffer that was used before the last one."""
        content = flat.view(torch.uint8)
        self._buffers[number % 2].fill_(255)[: content.numel()].copy_(content)
        storage = (0, b"%d" % (number % 2), content.numel(), 0, False, b"counter", number, b"event", True)
        return DeviceMemory(GPU, 0, content.numel(), storage)

    def _open(self, *arguments: Any) -> torch.Tensor:
        tensor_class, size, stride, offset, _, dtype, _, handle, *_ = arguments
        assert tensor_class is torch.Tensor
        assert dtype is torch.uint8
        return self._buffers[int(handle)].as_strided(size, stride, offset)


def publish(
    engine: RolloutEngine, sender: IpcSender, plan: PublishPlan, tensors: dict[str, torch.Tensor], version: int
) -> None:
    """Send every bucket of the plan; the engine receives it."""
    buffers = Buffers(max(bucket.bytes for bucket in plan.buckets))

    def send() -> None:
        for number, bucket in enumerate(plan.buckets):
            flat = torch.cat([tensors[name].flatten() for name in bucket.hf_names])
            assert sender.announce(FlatContents.of_bucket(bucket), buffers.export(number, flat)) == bucket.elements

    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(send)
        engine.receive(plan, version)
        sending.result()


def failed_publication(engine: RolloutEngine, sender: IpcSender, plan: PublishPlan) -> list[str]:
    """A handle of another GPU: what the engine, the policy rank, and the engine asked to generate say."""
    bucket: Bucket = plan.buckets[0]
    foreign = DeviceMemory("GPU-of-another-node", 0, bucket.bytes, (0, b"0", bucket.bytes, 0, False, b"", 0, b"", True))
    said = []
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(sender.announce, FlatContents.of_bucket(bucket), foreign)
        for attempt in (lambda: engine.receive(plan, 9), sending.result, lambda: engine.generate([])):
            try:
                attempt()
            except (ValueError, PeerDied, RuntimeError) as error:
                said.append(str(error))
    return said


def main(model_dir: Path, output: Path) -> None:
    parameter_map = ParameterMap(read_dimensions(model_dir))
    config = RolloutConfig(max_response_tokens=8, kv_cache_gb=0.1, max_concurrent_sequences=4)
    engine = RolloutEngine(model_dir, "float32", config, max_model_tokens=64, seed=1, device="cpu", transport="ipc")
    plan = publish_plan(parameter_map, PolicyConfig(pipeline_parallel=2), bucket_bytes=50_000, dtype="float32")
    old = load_file(model_dir / "model.safetensors")
    new = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in old.items()}
    seen: dict[str, Any] = {"buckets": len(plan.buckets)}
    for connection in range(2):
        sender = IpcSender("127.0.0.1", 1, TIMEOUT_S, name=f"policy rank 0, connection {connection}")
        host, port = sender.address
        # The engine is the second one, and has to choose the rank that shares its GPU.
        elsewhere = {"master_address": "192.0.2.1", "master_port": 1}
        own = {"master_address": host, "master_port": port}
        senders = [{**one, "world_size": 2, "timeout_s": TIMEOUT_S} for one in (elsewhere, own)]
        engine.connect(senders, rank_offset=2)
        sender.accept()
        for version, tensors in ((2, new), (3, old)):
            publish(engine, sender, plan, tensors, version)
            problems = mismatches(checksums(tensors.items()), {"engine": engine.weight_pieces()})
            seen[f"connection {connection}, version {version}"] = [problems, engine.weights_version]
    seen["failure"] = failed_publication(engine, sender, plan)
    output.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
