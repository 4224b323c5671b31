"""Weights through our NCCL sender into vLLM's own NCCL engine, both ends real; only NCCL itself is gloo here."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from no_driver import Stream

from megatron_entropic.weight_sync.gloo import FlatContents

HOST = "127.0.0.1"
WORKERS = 2
BUCKETS = [
    FlatContents(("a.weight", "b.bias"), ((2, 3), (5,)), "bfloat16"),
    FlatContents(("c.weight",), ((7, 11),), "bfloat16"),
    FlatContents(("d.weight", "e.weight", "f.weight"), ((1,), (3, 3), (2, 2)), "float32"),
]


class GlooCommunicator:
    """vLLM's PyNcclCommunicator over gloo, with vLLM's own rendezvous before it."""

    def __init__(self, group: Any, device: Any) -> None:
        assert isinstance(device, int), "NCCL wants the number of a device"
        store = dist.PrefixStore("data", group.store)
        self.group = dist.ProcessGroupGloo(store, group.rank, group.world_size)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Blocks until it is done."""
        options = dist.BroadcastOptions()
        options.rootRank = src
        self.group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """Nothing to free."""


def without_driver() -> None:
    """What vLLM asks the driver in a transfer, answered for a process with tensors in host memory."""
    import contextlib

    from vllm.distributed.device_communicators import pynccl

    pynccl.PyNcclCommunicator = GlooCommunicator
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.synchronize = lambda *_: None
    cuda: Any = torch.cuda
    cuda.Stream = Stream
    cuda.current_stream = lambda *_: Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()


def flats(version: int) -> list[torch.Tensor]:
    """Contents of all buckets."""
    generator = torch.Generator().manual_seed(version)
    return [torch.randn(bucket.elements, generator=generator).to(bucket.torch_dtype) for bucket in BUCKETS]


def send(connection: Any, versions: int) -> None:
    """The policy's first rank: tells where it listens, then sends every version."""
    without_driver()
    from megatron_entropic.rollout.nccl_transport import NcclSender

    sender = NcclSender(HOST, WORKERS, 60)
    for _ in range(WORKERS):
        connection.put(sender.address)
    sender.accept()
    for version in range(versions):
        for bucket, flat in zip(BUCKETS, flats(version), strict=True):
            assert sender.send(bucket, flat) == bucket.elements
    sender.close()


def receive(connection: Any, worker: int, versions: int) -> list[list[tuple[str, torch.Tensor]]]:
    """One worker of an engine: vLLM's engine with a model that keeps what is loaded into it."""
    without_driver()
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from megatron_entropic.rollout.nccl_transport import packing_options

    loaded: list[tuple[str, torch.Tensor]] = []
    model: Any = SimpleNamespace(load_weights=lambda pairs: loaded.extend((name, t.clone()) for name, t in pairs))
    place = SimpleNamespace(data_parallel_index=0, world_size=WORKERS, rank=worker)
    config: Any = SimpleNamespace(parallel_config=place, model_config=None)
    engine = NCCLWeightTransferEngine(WeightTransferConfig(backend="nccl"), config, torch.device("cpu"), model)
    host, port = connection.get(timeout=120)
    of_connection, of_update = packing_options()
    address = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": WORKERS + 1}
    engine.init_transfer_engine(engine.parse_init_info(address | of_connection))
    found = []
    for _ in range(versions):
        for bucket in BUCKETS:
            engine.update_weights(bucket.update_info() | of_update)
        found.append(list(loaded))
        loaded.clear()
    engine.shutdown()
    return found


@pytest.mark.timeout(900)
def test_every_worker_of_an_engine_gets_every_bucket_of_every_publication() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(WORKERS + 1, mp_context=context) as pool:
        addresses = manager.Queue()
        workers = [pool.submit(receive, addresses, worker, 2) for worker in range(WORKERS)]
        pool.submit(send, addresses, 2).result(timeout=800)
        for worker in workers:
            for version, loaded in enumerate(worker.result(timeout=60)):
                wanted = [
                    pair for bucket, flat in zip(BUCKETS, flats(version), strict=True) for pair in bucket.split(flat)
                ]
                assert [name for name, _ in loaded] == [name for name, _ in wanted]
                for (name, got), (_, value) in zip(loaded, wanted, strict=True):
                    assert torch.equal(got, value), f"version {version}: {name}"
                    assert got.dtype == value.dtype
