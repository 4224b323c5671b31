"""Handing memory of a GPU to an engine: what the two ends tell each other. Opening it takes a GPU: tests/gpu."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from megatron_entropic.errors import PeerDied, PhaseTimeout
from megatron_entropic.rollout.ipc_transport import DeviceMemory, IpcReceiver, IpcSender, IpcUpdates, packing_options
from megatron_entropic.weight_sync.gloo import FlatContents

HOST = "127.0.0.1"
CONTENTS = FlatContents(("a.weight", "b.bias"), ((2, 3), (5,)), "bfloat16")
OTHER = FlatContents(("a.weight",), ((2, 3),), "bfloat16")
# Behind the dtype, torch 2.13's reduce_tensor has: device, handle, bytes and offset of the storage, requires_grad,
# handle and offset of the counter, handle of the event, whether to wait for it.
STORAGE = (0, b"\x00\xffhandle", 1024, 512, False, b"counter\x80", 3, b"event", True)
MEMORY = DeviceMemory("GPU-1234", 8, 22, STORAGE)

Background = Callable[..., Future]


@pytest.fixture
def background():
    """Runs a function in a thread, as another process would."""
    with ThreadPoolExecutor(2) as threads:
        yield threads.submit


def connected(background: Background, timeout_s: float = 60) -> tuple[IpcSender, IpcReceiver]:
    sender = IpcSender(HOST, 1, timeout_s, name="policy rank 0")
    receiver = background(IpcReceiver, *sender.address, timeout_s)
    sender.accept()
    return sender, receiver.result()


def test_a_handle_survives_as_text_and_becomes_the_arguments_that_torch_takes():
    memory = DeviceMemory.from_json(json.loads(json.dumps(MEMORY.to_json())))
    assert memory == MEMORY
    (arguments,) = memory.handles.values()
    assert arguments == (
        *(torch.Tensor, torch.Size([22]), (1,), 8, torch.storage.TypedStorage, torch.uint8),
        *STORAGE,
    )
    parameters = torch.multiprocessing.reductions.rebuild_cuda_tensor.__code__
    assert parameters.co_varnames[: parameters.co_argcount] == (
        *("tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype"),
        *("storage_device", "storage_handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad"),
        *("ref_counter_handle", "ref_counter_offset", "event_handle", "event_sync_required"),
    )


def test_the_engine_gets_calls_that_vllm_takes_and_the_sender_waits_for_each(background):
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo

    assert IPCWeightTransferInitInfo(**packing_options()[0]).packed
    sender, receiver = connected(background)
    for turn in range(3):
        sending = background(sender.announce, CONTENTS, MEMORY)
        with receiver.next(CONTENTS) as update_info:
            call = IPCWeightTransferUpdateInfo(**update_info)
            assert call.names == ["a.weight", "b.bias"]
            assert call.shapes == [[2, 3], [5]]
            assert call.dtype_names == ["bfloat16"] * 2
            assert call.tensor_sizes == [12, 10]
            assert call.ipc_handles == MEMORY.handles
            time.sleep(0.05)
            assert not sending.done(), turn
        assert sending.result(timeout=30) == CONTENTS.elements


def test_an_engine_that_fails_tells_why_and_the_next_buffer_is_another(background):
    sender, receiver = connected(background)
    sending = background(sender.announce, CONTENTS, MEMORY)
    with pytest.raises(RuntimeError, match="no room"), receiver.next(CONTENTS):
        raise RuntimeError("CUDA: no room")
    with pytest.raises(PeerDied, match=r"buffer 0, a\.weight .*policy rank 0 was told .* RuntimeError: CUDA: no room"):
        sending.result(timeout=30)
    sending = background(sender.announce, OTHER, MEMORY)
    with pytest.raises(ValueError, match=r"policy rank 0 at .* announces a\.weight"), receiver.next(CONTENTS):
        pass
    with pytest.raises(PeerDied, match="announces"):
        sending.result(timeout=30)


def test_an_engine_of_two_workers_gets_the_memory_of_both_their_ranks_and_tells_both(background):
    senders = [IpcSender(HOST, 1, 60, name=f"policy rank {rank}") for rank in range(4)]
    found = [{"master_address": s.address[0], "master_port": s.address[1], "timeout_s": 60} for s in senders]
    joining = background(IpcUpdates, found, range(3, 5))
    for sender in senders[2:]:
        sender.accept()
    updates = joining.result()

    def announce(fails: bool) -> list[Future]:
        memories = [DeviceMemory(f"GPU-{rank}", 8, 22, STORAGE) for rank in (2, 3)]
        contents = [CONTENTS, OTHER if fails else CONTENTS]
        return [background(*one) for one in zip([s.announce for s in senders[2:]], contents, memories, strict=True)]

    sending = announce(fails=False)
    with updates._next(CONTENTS) as update_info:
        assert list(update_info["ipc_handles"]) == ["GPU-2", "GPU-3"]
        assert not any(one.done() for one in sending)
    assert [one.result(timeout=30) for one in sending] == [CONTENTS.elements] * 2
    sending = announce(fails=True)
    with pytest.raises(ValueError, match=r"policy rank 3 at .* announces a\.weight"), updates._next(CONTENTS):
        pass
    for one in sending:
        with pytest.raises(PeerDied, match="announces"):
            one.result(timeout=30)


def test_waits_end_and_name_who_did_not_come(background):
    lonely = IpcSender(HOST, 1, 0.5, name="policy rank 0")
    with pytest.raises(PhaseTimeout, match=r"rendezvous at .*: policy rank 0 waited .* for the engine on its GPU"):
        lonely.accept()
    sender, receiver = connected(background, timeout_s=0.5)
    with pytest.raises(PhaseTimeout, match=r"buffer 0, .*: an engine waited .* for policy rank 0 at 127\.0\.0\.1"):
        receiver.next(CONTENTS).__enter__()
    with pytest.raises(PhaseTimeout, match=r"buffer 0, .*: policy rank 0 waited .* for the engine on its GPU"):
        sender.announce(CONTENTS, MEMORY)
    sender, receiver = connected(background)
    waiting = background(receiver.next(CONTENTS).__enter__)
    time.sleep(0.2)
    sender.close()
    with pytest.raises(PeerDied, match="an engine lost policy rank 0"):
        waiting.result(timeout=30)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.publish=delta needs cluster\.transport=gloo"):
        IpcSender(HOST, 1, 1, delta=True)
    with pytest.raises(ValueError, match="not 2 of them"):
        IpcSender(HOST, 2, 1)
