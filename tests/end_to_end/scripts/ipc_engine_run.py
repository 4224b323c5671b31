"""An engine of two workers takes in weights through vLLM's own IPC engine; of CUDA only handles are replaced.

python ipc_engine_run.py MODEL OUTPUT.json

A handle is the path of a file in a folder with its GPU's name. Everything else is what runs on GPUs: both ends of the
transport, vLLM's connection and update calls to its workers, their unpacking, loading and processing of the weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
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

WORKERS = 2
TIMEOUT_S = 60.0


def own_gpu() -> str:
    """Name of a worker's GPU."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return f"GPU-{get_tensor_model_parallel_rank()}"


def open_handle(*arguments: Any) -> torch.Tensor:
    """Open what `Buffers` exported, in a worker, whose GPU has to be that of the buffers."""
    tensor_class, size, stride, offset, _, dtype, _, handle, nbytes, *_ = arguments
    assert tensor_class is torch.Tensor
    assert dtype is torch.uint8
    path = Path(handle.decode())
    assert path.parent.name == own_gpu()
    return torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8).as_strided(size, stride, offset)


# vLLM starts its workers anew, and each imports this file.
torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=own_gpu())
reductions.rebuild_cuda_tensor = open_handle


class Buffers:
    """Two buffers in turn, as a policy rank has them, instead of memory of its GPU."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        folder.mkdir()
        self._gpu = folder.name
        self._paths = [str(folder / str(number)) for number in range(2)]
        self._buffers = [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in self._paths]

    def export(self, number: int, flat: torch.Tensor) -> DeviceMemory:
        """Overwrite the buffer that was used before the last one."""
        content, place = flat.view(torch.uint8), number % 2
        self._buffers[place].fill_(255)[: content.numel()].copy_(content)
        storage = (0, self._paths[place].encode(), content.numel(), 0, False, b"counter", number, b"event", True)
        return DeviceMemory(self._gpu, 0, content.numel(), storage)


def publish(
    engine: RolloutEngine, senders: list[IpcSender], plan: PublishPlan, tensors: dict[str, torch.Tensor], version: int
) -> None:
    """Send every bucket of the plan from every rank; the engine receives it."""
    nbytes = max(bucket.bytes for bucket in plan.buckets)

    def send(sender: IpcSender, buffers: Buffers) -> None:
        for number, bucket in enumerate(plan.buckets):
            flat = torch.cat([tensors[name].flatten() for name in bucket.hf_names])
            assert sender.announce(FlatContents.of_bucket(bucket), buffers.export(number, flat)) == bucket.elements

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as threads:
        buffers = [Buffers(Path(folder, f"GPU-{rank}"), nbytes) for rank in range(WORKERS)]
        sending = [threads.submit(send, *one) for one in zip(senders, buffers, strict=True)]
        engine.receive(plan, version)
        for one in sending:
            one.result()


def failed_publication(engine: RolloutEngine, senders: list[IpcSender], plan: PublishPlan) -> list[str]:
    """Handles of other GPUs: what the engine, the policy ranks, and the engine asked to generate say."""
    bucket: Bucket = plan.buckets[0]
    foreign = DeviceMemory("GPU-of-another-node", 0, bucket.bytes, (0, b"0", bucket.bytes, 0, False, b"", 0, b"", True))
    said = []
    with ThreadPoolExecutor(WORKERS) as threads:
        sending = [threads.submit(one.announce, FlatContents.of_bucket(bucket), foreign) for one in senders]
        attempts = [lambda: engine.receive(plan, 9), *(one.result for one in sending), lambda: engine.generate([])]
        for attempt in attempts:
            try:
                attempt()
            except (ValueError, PeerDied, RuntimeError) as error:
                said.append(str(error))
    return said


def main(model_dir: Path, output: Path) -> None:
    parameter_map = ParameterMap(read_dimensions(model_dir))
    config = RolloutConfig(max_response_tokens=8, kv_cache_gb=0.1, max_concurrent_sequences=4, tensor_parallel=WORKERS)
    engine = RolloutEngine(model_dir, "float32", config, max_model_tokens=64, seed=1, device="cpu", transport="ipc")
    plan = publish_plan(parameter_map, PolicyConfig(pipeline_parallel=2), bucket_bytes=50_000, dtype="float32")
    old = load_file(model_dir / "model.safetensors")
    new = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in old.items()}
    seen: dict[str, Any] = {"buckets": len(plan.buckets)}
    for connection in range(2):
        senders = [
            IpcSender("127.0.0.1", 1, TIMEOUT_S, name=f"policy rank {WORKERS + number}, connection {connection}")
            for number in range(WORKERS)
        ]
        # The engine is the second one, and has to choose the ranks that share its GPUs.
        addresses = [("192.0.2.1", 1)] * WORKERS + [sender.address for sender in senders]
        found = [
            {"master_address": host, "master_port": port, "world_size": 2, "timeout_s": TIMEOUT_S}
            for host, port in addresses
        ]
        engine.connect(found, rank_offset=1 + WORKERS)
        for sender in senders:
            sender.accept()
        for version, tensors in ((2, new), (3, old)):
            publish(engine, senders, plan, tensors, version)
            problems = mismatches(checksums(tensors.items()), {"engine": engine.weight_pieces()})
            seen[f"connection {connection}, version {version}"] = [problems, engine.weights_version]
    seen["failure"] = failed_publication(engine, senders, plan)
    output.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
