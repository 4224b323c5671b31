"""Calls into vLLM, megatron-core and Transformer Engine, against the installed functions' own signatures and fields."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import te_bindings
import torch
from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer import nccl_common, packed_tensor
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo
from vllm.v1.executor import abstract

from megatron_entropic.rollout import engine, ipc_transport, nccl_transport
from megatron_entropic.weight_sync.gloo import FlatContents

CONTENTS = FlatContents(("a.weight", "b.bias"), ((2, 3), (5,)), "bfloat16")
PACKAGE = Path(engine.__file__).parents[1]
ADDRESS = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}


def calls(path: Path, name: str) -> list[ast.Call]:
    """Every call of a function or method of this name in a file of the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [call for call in found if getattr(call.func, "attr", getattr(call.func, "id", None)) == name]
    assert found, f"{path.name} does not call {name} any more"
    return found


def fits(call: ast.Call, function: Callable[..., Any], *, method: bool = False) -> None:
    """The call's arguments are ones that the function takes."""
    positional: list[Any] = [None] * method + [None for argument in call.args if not isinstance(argument, ast.Starred)]
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    inspect.signature(function).bind(*positional, **named)


def test_calls_of_the_llm_fit() -> None:
    for name in (
        "enqueue",
        "generate",
        "sleep",
        "wake_up",
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_prefix_cache",
        "get_weight_version",
        "collective_rpc",
    ):
        for call in calls(PACKAGE / "rollout/engine.py", name):
            if name != "generate" or (
                isinstance(call.func, ast.Attribute) and ast.unparse(call.func).startswith("self._llm")
            ):
                fits(call, getattr(LLM, name), method=True)
    for call in calls(PACKAGE / "rollout/engine.py", "SamplingParams"):
        fits(call, SamplingParams)


def test_nccl_connections_and_updates_are_vllms() -> None:
    of_connection, of_update = nccl_transport.packing_options()
    info = NCCLWeightTransferInitInfo(**ADDRESS, **of_connection)
    assert info.packed
    assert info.packed_num_buffers == 1, "one buffer: a bucket is one broadcast"
    update = NCCLWeightTransferUpdateInfo(**CONTENTS.update_info(), **of_update)
    assert update.dtype_names == ["bfloat16"] * 2
    assert all(hasattr(torch, name) for name in update.dtype_names)


def test_the_trainers_end_of_nccl_is_vllms() -> None:
    assert nccl_transport._trainer_init() is nccl_common.trainer_init
    assert set(inspect.signature(nccl_common.trainer_init).parameters) >= {"init_info"}
    for call in calls(PACKAGE / "rollout/nccl_transport.py", "packed_nccl_broadcast_producer"):
        fits(call, packed_tensor.packed_nccl_broadcast_producer)
    producer = inspect.signature(packed_tensor.packed_nccl_broadcast_producer).parameters
    consumer = inspect.signature(packed_tensor.packed_nccl_broadcast_consumer).parameters
    assert {"buffer_size_bytes", "num_buffers"} <= set(producer) & set(consumer)


def test_ipc_updates_are_vllms() -> None:
    of_connection, _ = ipc_transport.packing_options()
    assert IPCWeightTransferInitInfo(**of_connection).packed
    memory = ipc_transport.DeviceMemory("GPU-1", 0, 22, (0, b"handle", 22, 0, False, b"counter", 0, b"event", True))
    update = IPCWeightTransferUpdateInfo(**ipc_transport._update_info(CONTENTS, memory))
    assert update.tensor_sizes == [12, 10]
    # vLLM puts its own device number at this place of rebuild_cuda_tensor's arguments.
    rebuild = inspect.signature(torch.multiprocessing.reductions.rebuild_cuda_tensor)
    assert list(rebuild.parameters)[6] == "storage_device"


def test_sleeping_memory_has_the_names_that_the_driver_wakes() -> None:
    assert {"weights", "kv_cache"} == abstract.SLEEP_TAGS
    turns = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "cluster").glob("*.py"))
    assert '"weights"' in turns
    assert '"kv_cache"' in turns


def test_packed_sequences_have_the_fields_that_te_attention_takes() -> None:
    te_bindings.install()
    from megatron.core.extensions import transformer_engine as extensions
    from megatron.core.models.gpt import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from transformer_engine.pytorch import DotProductAttention

    from megatron_entropic.policy.model.attention import PackedSegments

    taken = inspect.signature(DotProductAttention.forward).parameters
    # megatron-core hands these over by name; ours are more, and must not reach Transformer Engine.
    handed = {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"}
    handed |= {"cu_seqlens_q_padded", "cu_seqlens_kv_padded"}
    assert handed <= set(taken)
    assert handed <= {field.name for field in fields(PackedSeqParams)}
    own = {field.name for field in fields(PackedSegments)} - {field.name for field in fields(PackedSeqParams)}
    assert own, "PackedSegments adds nothing any more"
    # Its text: the class is a stand-in where another test imported megatron-core before Transformer Engine came.
    source = inspect.getsource(extensions).partition("class TEDotProductAttention")[2]
    assert "kept_packed_seq_params" in source, "megatron-core no longer keeps the fields that it knows"
    assert not own & set(taken)

    processor = inspect.signature(GPTModel.forward).parameters["output_processor"]
    assert processor.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
