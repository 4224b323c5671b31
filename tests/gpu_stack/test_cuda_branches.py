"""What the package does of its own where its tensors are on a GPU, on a device that is fake or recorded.

The platform and what asks it, the loss that is taken in the forward pass, a teacher's divergence, Triton's launches,
the export of a bucket's memory, checksums of weights as an engine on a GPU keeps them.
"""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from no_driver import H100, Stream
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing import reductions

from megatron_entropic.policy.state import checkpoint, checkpoint_writer
from megatron_entropic.policy.state.kept_weights import KeptWeights
from megatron_entropic.rollout.ipc_transport import DeviceMemory, IpcSender
from megatron_entropic.tensor_parallel import triton_backend
from megatron_entropic.tensor_parallel.fused_policy_loss import _require_scale, fused_policy_loss
from megatron_entropic.tensor_parallel.reverse_kl import fused_reverse_kl
from megatron_entropic.tensor_parallel.statistics import GradientInputs, Merged
from megatron_entropic.weight_sync.checksums import checksum, mismatches
from megatron_entropic.weight_sync.gloo import FlatContents

HIDDEN, TOKENS, VOCABULARY, SHARD = 4096, 600, 75000, 75968


def _platform_without_a_driver() -> dict[str, Any]:
    """What the CUDA platform asks the driver and says itself, in a process without Transformer Engine."""
    asked: list[str] = []
    cuda: Any = torch.cuda

    def record(name: str, result: Any) -> None:
        def call(*arguments: Any) -> Any:
            asked.append(" ".join([name, *map(str, arguments)]))
            return result

        setattr(cuda, name, call)

    results = {"is_available": True, "device_count": 2, "current_device": 1, "current_stream": Stream()}
    results |= {"memory_allocated": 3 * 2**20, "max_memory_allocated": 5 * 2**20}
    for name, result in {**results, "set_device": None, "ipc_collect": None, "empty_cache": None}.items():
        record(name, result)
    from megatron_entropic.policy.megatron.platform import select_platform

    platform = select_platform("cuda")
    asked.clear()
    platform.empty_cache()
    platform.synchronize()
    return {
        "class": type(platform).__name__,
        "transformer engine": platform.transformer_engine,
        "fused kernels": platform.fused_kernels,
        "backend": platform.backend,
        "device": str(platform.device),
        "memory": [platform.memory_mb(), platform.peak_memory_mb()],
        "asked": asked[:3],
    }


def test_the_platform_without_transformer_engine() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        found = process.submit(_platform_without_a_driver).result(timeout=300)
    assert found == {
        "class": "CudaPlatform",
        "transformer engine": False,
        "fused kernels": True,
        "backend": "nccl",
        "device": "cuda:1",
        "memory": [3.0, 5.0],
        # What an engine has let go of is free only when it was collected.
        "asked": ["ipc_collect", "empty_cache", "current_stream"],
    }


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """Everything within the test is fake, and there are no gradients: autograd's engine wants a real device."""
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


def test_kept_weights_go_to_pinned_memory_and_the_host_waits(
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, waited = [], []
    empty = torch.empty

    def record(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*size, **options)

    model = torch.nn.Linear(3, 5, device="cuda")
    platform: Any = SimpleNamespace(device=torch.device("cuda"), synchronize=lambda: waited.append(len(pinned)))
    kept = KeptWeights(model, platform)
    monkeypatch.setattr(torch, "empty", record)
    kept.keep()
    with kept.in_place():
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert pinned == [True] * 4
    # Copied out, copied out, put into place, put back: copies run on the stream, and nobody may use them before.
    assert waited == [2, 4, 4, 4]


def test_generators_and_threads_are_told_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    for name in ("set_device", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda value, name=name: calls.append((name, value)))
    monkeypatch.setattr(checkpoint_writer.os, "getpriority", lambda *_: checkpoint_writer.BACKGROUND_NICENESS)
    checkpoint_writer._prepare_thread(torch.device("cuda", 1))
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    state = {"host": torch.get_rng_state(), "device": "bytes", "tracker": get_cuda_rng_tracker().get_states()}
    checkpoint._set_rng_state(state)
    assert calls == [("set_device", torch.device("cuda", 1)), ("set_rng_state", "bytes")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_loss_of_the_forward_pass(
    fake: FakeTensorMode, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.empty(TOKENS, HIDDEN, device="cuda", dtype=dtype)
    weight = torch.empty(SHARD, HIDDEN, device="cuda", dtype=dtype)
    target = torch.empty(TOKENS, device="cuda", dtype=torch.int64)
    loss, logprob, entropy = fused_policy_loss(
        hidden, weight, target, lambda own, h, _: own.sum() + h.sum(), vocab_size=VOCABULARY, backend="eager"
    )
    assert {loss.device.type, logprob.device.type, entropy.device.type} == {"cuda"}
    assert (loss.shape, logprob.shape, entropy.shape) == ((), (TOKENS,), (TOKENS,))
    # The scale that arrives is compared where it is; the host does not wait for it.
    compared: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "_assert_async", lambda equal, message: compared.append(equal))
    _require_scale(torch.empty((), device="cuda"), 0.5)
    assert compared[0].device.type == "cuda"


class Launches:
    """In place of a kernel: notes grid and arguments."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.made.append((grid, arguments, options))


def test_kernels_are_launched_on_the_logits_device(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    class Device:
        def __init__(self, tensor: torch.Tensor) -> None:
            entered.append(tensor.device)

        __enter__ = __exit__ = lambda self, *_: None

    forward, backward = Launches(), Launches()
    monkeypatch.setattr(torch.cuda, "device_of", Device)
    monkeypatch.setattr(triton_backend, "statistics_kernel", forward)
    monkeypatch.setattr(triton_backend, "gradient_kernel", backward)
    x = torch.empty(TOKENS, SHARD, device="cuda:1", dtype=torch.bfloat16)
    column, inverse = torch.empty(TOKENS, device=x.device, dtype=torch.int64), torch.empty(TOKENS, device=x.device)
    out = torch.empty(7, TOKENS, device=x.device)
    backend = triton_backend.TritonBackend()
    backend.statistics(x, column, inverse, valid=VOCABULARY, pieces=2, out=out)
    inputs = GradientInputs(
        column, inverse, Merged(inverse, inverse, inverse, inverse), inverse.expand(TOKENS), inverse
    )
    backend.gradient(x, inputs, valid=VOCABULARY, out=x)
    assert entered == [x.device] * 2
    ((grid, arguments, options),) = forward.made
    assert grid == (TOKENS, 2)
    assert arguments[4:] == (SHARD, TOKENS, SHARD, SHARD // 2, VOCABULARY)
    assert options["NEED_ENTROPY"]
    ((grid, arguments, options),) = backward.made
    assert grid == (TOKENS, -(-SHARD // options["BLOCK"]))
    assert options["HAS_ENTROPY_GRADIENT"]


def test_a_teachers_divergence(fake: FakeTensorMode) -> None:
    def of(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.empty(rows, width, device="cuda", dtype=torch.bfloat16) for rows in (TOKENS, SHARD))

    divergence = fused_reverse_kl(*of(HIDDEN), *of(HIDDEN // 2), vocab_size=VOCABULARY)
    assert (divergence.device.type, divergence.dtype, divergence.shape) == ("cuda", torch.float32, (TOKENS,))


def test_a_rank_exports_a_bucket_as_torchs_own_reader_takes_it(
    fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of what the reader is given, its own names for it.
    names = tuple(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    exported: list[torch.Tensor] = []
    order: list[str] = []

    def reduce_tensor(content: torch.Tensor) -> Any:
        exported.append(content)
        return reductions.rebuild_cuda_tensor, names

    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    stream = SimpleNamespace(synchronize=lambda: order.append("filled"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    told: list[DeviceMemory] = []

    class Sender(IpcSender):
        def __init__(self) -> None: ...

        def announce(self, contents: FlatContents, memory: DeviceMemory) -> int:
            order.append("told")
            told.append(memory)
            return contents.elements

    contents = FlatContents(("a.weight",), ((7, 11),), "bfloat16")
    assert Sender().send(contents, torch.empty(77, device="cuda", dtype=torch.bfloat16)) == 77
    assert order == ["filled", "told"]
    assert (exported[0].dtype, exported[0].shape) == (torch.uint8, (154,))
    (memory,) = told
    (entry,) = memory.handles.values()
    assert list(memory.handles) == [H100.uuid]
    assert memory.nbytes == 154
    assert entry[3] == names[3] == "tensor_offset"
    assert entry[6:] == names[6:]


def test_checksums_of_weights_that_no_kernel_has_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: linear layers as they are, and experts of the Triton kernel; two workers hold the whole."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import RowParallelLinear

    from megatron_entropic.rollout import weight_inspection

    generator = torch.Generator().manual_seed(5)
    experts, width, hidden, workers = 3, 8, 10, 2
    down = torch.randn(hidden, width, generator=generator)
    tensors = {"mlp.down_proj.weight": down}
    for expert in range(experts):
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            tensors[f"mlp.experts.{expert}.{name}_proj.weight"] = torch.randn(shape, generator=generator)

    def of(expert: int, name: str, part: slice, axis: int) -> torch.Tensor:
        whole = tensors[f"mlp.experts.{expert}.{name}_proj.weight"]
        return whole[part] if axis == 0 else whole[:, part]

    method: Any = object.__new__(UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(method)
    method.unquantized_backend = UnquantizedMoeBackend.TRITON
    pieces = []
    for worker in range(workers):
        part = slice(worker * width // workers, (worker + 1) * width // workers)
        linear = object.__new__(RowParallelLinear)
        torch.nn.Module.__init__(linear)
        linear.weight = torch.nn.Parameter(down[:, part])
        linear.bias, linear.tp_rank = None, worker
        linear.input_size, linear.input_size_per_partition, linear.output_size = width, width // workers, hidden
        pieces += weight_inspection._linear("mlp.down_proj", linear, {})
        w13 = [torch.cat((of(e, "gate", part, 0), of(e, "up", part, 0))) for e in range(experts)]
        parallel = SimpleNamespace(use_ep=False)
        module = SimpleNamespace(
            moe_config=SimpleNamespace(
                moe_parallel_config=parallel,
                intermediate_size_per_partition_unpadded=width // workers,
                tp_rank=worker,
                tp_size=workers,
            ),
            layer_name="mlp.experts.routed_experts",
            quant_method=method,
            w13_weight=torch.stack(w13),
            w2_weight=torch.stack([of(e, "down", part, 1) for e in range(experts)]),
            ckpt_gate_proj_name="gate_proj",
            ckpt_up_proj_name="up_proj",
            ckpt_down_proj_name="down_proj",
        )
        pieces += weight_inspection.expert_pieces(module)
    sent = {name: checksum(tensor) for name, tensor in tensors.items()}
    assert mismatches(sent, {"engine": pieces}) == []
    down[3, 5] += 1
    (wrong,) = mismatches(sent | {"mlp.down_proj.weight": checksum(down)}, {"engine": pieces})
    assert wrong == "mlp.down_proj.weight: engine holds other values than were sent"
