"""One publication and one cycle of sleep through vLLM's own classes, from our engine down to where the driver begins.

    RolloutEngine -> vllm.LLM -> (collective_rpc) -> vLLM's GPU worker -> its NCCL or IPC engine -> recorded
    Cluster       -> vllm.LLM -> vLLM's EngineCore -> its Executor -> (collective_rpc) -> recorded

Everything named here is the installed class with its own methods; only `__init__` is left out, and what would touch a
GPU is recorded with its arguments.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader import reload
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu_worker import Worker

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.config.names import TRANSPORTS
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import ClusterConfig
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.rollout.engine import RolloutEngine
from megatron_entropic.rollout.ipc_transport import DeviceMemory, IpcReceiver, _update_info
from megatron_entropic.weight_sync.gloo import FlatContents
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan

MODEL_CONFIGS = Path(__file__).resolve().parents[2] / "megatron_entropic/planning/model_configs"
SENDER = {"master_address": "10.0.0.1", "master_port": 4321, "world_size": 9, "timeout_s": 60.0}
MEMORY = DeviceMemory("GPU-1", 64, 12, (0, b"handle", 22, 0, False, b"counter", 0, b"event", True))
Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def calls() -> Calls:
    """What was called, in order, with the arguments by name."""
    return []


@pytest.fixture
def plan(tmp_path: Path) -> PublishPlan:
    """Of a model of 1.5 billion parameters; nothing of it is ever there."""
    shutil.copy(MODEL_CONFIGS / "OpenReasoning-Nemotron-1.5B.json", tmp_path / "config.json")
    parameter_map = ParameterMap(read_dimensions(tmp_path))
    return publish_plan(parameter_map, PolicyConfig(tensor_parallel=2), dtype="bfloat16", bucket_bytes=512 * 2**20)


def _recorded(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: Calls) -> None:
    """In place of a function: notes its arguments, which have to be ones that it takes."""
    signature = inspect.signature(getattr(module, name))

    def call(*arguments: Any, **options: Any) -> list[Any]:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        calls.append((name, dict(bound.arguments)))
        return []

    monkeypatch.setattr(module, name, call)


@pytest.fixture
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Any:
    """vLLM's GPU worker with the transfer engine that the test names, without a device."""
    for module, names in (
        (reload, ("initialize_layerwise_reload", "finalize_layerwise_reload")),
        (nccl_engine, ("worker_init_process_group", "packed_nccl_broadcast_consumer")),
        (ipc_engine, ("packed_ipc_consumer",)),
        (torch.accelerator, ("synchronize",)),
    ):
        for name in names:
            _recorded(monkeypatch, module, name, calls)
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    model: Any = SimpleNamespace(load_weights=lambda pairs: list(pairs))
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    made = object.__new__(Worker)
    made.vllm_config, made.rank = None, 0
    made._weight_update_active = made._weight_update_is_draft = False
    made.model_runner = SimpleNamespace(reset_lora_state=lambda: None)
    transfer = WeightTransferConfig(backend=request.param)
    engines = {"nccl": NCCLWeightTransferEngine, "ipc": IPCWeightTransferEngine}
    made.weight_transfer_engine = engines[request.param](transfer, config, torch.device("cuda", 3), model)
    return made


def engine(transport: Any, plan: PublishPlan, worker: Any, calls: Calls, *, width: int = 1) -> Any:
    """Our engine of `width` GPUs around vLLM's LLM over one of its workers, in this process."""
    version = ["none"]

    def collective_rpc(method: str, *, kwargs: dict[str, Any] | None = None) -> None:
        calls.append((method, kwargs or {}))
        getattr(worker, method)(**(kwargs or {}))

    def reset_prefix_cache(*_: Any) -> bool:
        calls.append(("reset_prefix_cache", {}))
        return True

    llm: Any = object.__new__(LLM)
    llm.llm_engine = SimpleNamespace(
        collective_rpc=collective_rpc,
        set_weight_version=lambda value: version.__setitem__(0, value),
        get_weight_version=lambda: version[0],
        reset_prefix_cache=reset_prefix_cache,
    )
    made: Any = object.__new__(RolloutEngine)
    made._llm, made._weights_version, made._refusal = llm, None, ""
    made._config = SimpleNamespace(tensor_parallel=width)
    made._updates_type = find_attribute("cluster.transport", TRANSPORTS[transport].receiver, arguments=2)
    made._hf_tensors = {
        name: shape for bucket in plan.buckets for name, shape in zip(bucket.hf_names, bucket.hf_shapes, strict=True)
    }
    return made


def _names(calls: Calls) -> list[str]:
    return [name for name, _ in calls]


@pytest.mark.parametrize("worker", ["nccl"], indirect=True)
def test_a_publication_over_nccl_reaches_vllms_group_bucket_by_bucket(
    worker: Any, plan: PublishPlan, calls: Calls
) -> None:
    ours = engine("nccl", plan, worker, calls)
    ours.connect([SENDER], rank_offset=5)
    assert _names(calls) == ["init_weight_transfer_engine", "worker_init_process_group"]
    info = calls[-1][1]["init_info"]
    assert (info.master_address, info.master_port, info.rank_offset, info.world_size) == ("10.0.0.1", 4321, 5, 9)
    assert info.packed
    del calls[:]

    ours.receive(plan, 7)
    update = ["update_weights", "packed_nccl_broadcast_consumer", "synchronize"]
    begin, end = ["start_weight_update", "initialize_layerwise_reload"], ["finish_weight_update"]
    end += ["finalize_layerwise_reload", "reset_prefix_cache"]
    assert len(plan.buckets) > 4
    assert _names(calls) == begin + update * len(plan.buckets) + end
    received = [arguments for name, arguments in calls if name == "packed_nccl_broadcast_consumer"]
    for bucket, arguments in zip(plan.buckets, received, strict=True):
        wanted = [(n, (list(s), torch.bfloat16)) for n, s in zip(bucket.hf_names, bucket.hf_shapes, strict=True)]
        assert list(arguments["iterator"]) == wanted
        assert (arguments["src"], arguments["num_buffers"], arguments["device"].index) == (0, 1, 3)
        assert arguments["buffer_size_bytes"] >= bucket.bytes, "a bucket is one broadcast, as it is sent"
    assert ours.weights_version == 7


@pytest.mark.parametrize("worker", ["ipc"], indirect=True)
def test_a_publication_over_ipc_names_the_memory_of_the_ranks_on_the_engines_gpus(
    worker: Any, plan: PublishPlan, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Receiver:
        """Says where a bucket lies, as a policy rank on one of these GPUs would."""

        def __init__(self, *address: Any) -> None:
            calls.append(("receiver", {"address": address}))
            self.memory = replace(MEMORY, gpu=f"GPU of {address[1]}")

        @contextmanager
        def next(self, contents: FlatContents) -> Iterator[dict[str, Any]]:
            calls.append(("lent", {}))
            yield _update_info(contents, self.memory)
            calls.append(("given back", {}))

    assert set(inspect.signature(IpcReceiver.next).parameters) == {"self", "contents"}
    monkeypatch.setattr("megatron_entropic.rollout.ipc_transport.IpcReceiver", Receiver)
    ours = engine("ipc", plan, worker, calls, width=2)
    ours.connect([SENDER | {"master_port": port} for port in range(4321, 4325)], rank_offset=3)
    # The second engine of two GPUs: third and fourth rank.
    assert calls[:2] == [("receiver", {"address": ("10.0.0.1", port, 60.0)}) for port in (4323, 4324)]
    assert worker.weight_transfer_engine.packed
    del calls[:3]

    ours.receive(plan, 8)
    # The ranks may fill their memory again only when the device has copied.
    update = ["lent", "lent", "update_weights", "packed_ipc_consumer", "synchronize", "given back", "given back"]
    assert _names(calls)[2:-3] == update * len(plan.buckets)
    opened = [arguments for name, arguments in calls if name == "packed_ipc_consumer"]
    for bucket, arguments in zip(plan.buckets, opened, strict=True):
        assert arguments["names"] == list(bucket.hf_names)
        assert sum(arguments["tensor_sizes"]) == bucket.bytes
        assert arguments["device_index"] == 3
        assert list(arguments["ipc_handle"]) == ["GPU of 4323", "GPU of 4324"]
    assert ours.weights_version == 8


class RecordingExecutor(Executor):
    """vLLM's, whose workers are notes."""

    def __init__(self, calls: Calls) -> None:
        self.sleeping_tags: set[str] = set()
        self._calls = calls

    def collective_rpc(self, method: str, *_: Any, kwargs: dict[str, Any] | None = None, **__: Any) -> Any:
        """Notes the call."""
        self._calls.append((method, kwargs or {}))

    def _init_executor(self) -> None: ...

    def check_health(self) -> None: ...


def test_turns_are_ones_that_vllm_takes_and_the_scheduler_runs_while_the_engines_have_theirs(calls: Calls) -> None:
    """Rollout, training, publication, rollout, and the turns that an evaluation without a publication makes."""
    core: Any = object.__new__(EngineCore)
    core.model_executor = RecordingExecutor(calls)
    core.scheduler = SimpleNamespace(
        finish_requests=lambda *_: None, set_pause_state=lambda state: setattr(core, "state", state.name)
    )
    core._finish_pause = lambda clear_cache: calls.append(("caches cleared", {"really": clear_cache}))
    llm: Any = object.__new__(LLM)
    llm.llm_engine = SimpleNamespace(sleep=core.sleep, wake_up=core.wake_up)
    ours: Any = object.__new__(RolloutEngine)
    ours._llm = llm
    policy: Any = SimpleNamespace(offload=lambda keep_parameters=False: calls.append(("offload", {})))
    turns: Any = Cluster(ClusterConfig(colocate=True), ours, policy)
    ours.sleep()
    del calls[:]

    woken: dict[str, list[list[str]]] = {}
    for turn in ("publish", "rollout", "training", "rollout", "training", "publish", "training"):
        getattr(turns, f"_to_{turn}")()
        woken.setdefault(turn, []).append([str(a.get("tags", name)) for name, a in calls if name != "offload"])
        if turn == "rollout":
            assert core.state == "UNPAUSED"
            assert not core.model_executor.is_sleeping
        else:
            assert core.state != "UNPAUSED", f"{turn}: vLLM would schedule without a KV cache"
        del calls[:]
    asleep, everything = ["caches cleared", "sleep"], ["['weights', 'kv_cache']"]
    assert woken["publish"] == [["['weights']"], ["['weights']"]]
    assert woken["rollout"] == [["['kv_cache']"], everything]
    # From half awake it wakes up first, since vLLM falls asleep from being awake.
    assert woken["training"] == [asleep, asleep, ["['kv_cache']", *asleep]]
    assert core.model_executor.sleeping_tags == {"weights", "kv_cache"}
