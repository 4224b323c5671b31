"""CUDA IPC: engine workers read buckets in the memory of the policy ranks on their GPUs; vLLM's own engine receives.

    each policy rank                                                     the engine with a worker on the same GPU
    IpcSender(host)       listens at once
    accept()              <-- store: joined ----------------------------  IpcReceiver(address)
    send(contents, flat)  --- store: bucket/k, where `flat` lies ------>  with the announcements of all its ranks:
                                                                              each worker opens, copies, loads its own
                          <-- store: answer/k, an error or nothing -----

No bytes of weights travel, not even to the host. The store carries a CUDA handle as JSON: nothing that comes out of it
is executed. vLLM's worker waits for its copies before an update call returns, so the answer means that `flat` is free.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from math import prod
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from megatron_entropic.errors import PeerDied, UserError
from megatron_entropic.weight_sync.gloo import FlatContents, SendingRanks, listening_store, named_wait
from megatron_entropic.weight_sync.plan import PublishPlan
from megatron_entropic.weight_sync.shared_memory import SharedBlock

_LOADED = "loaded"
"""Answer to a bucket that is in the engine; any other says what went wrong there."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a GPU that another process can open: `rebuild_cuda_tensor`'s arguments for a flat tensor of uint8."""

    gpu: str
    """UUID of the GPU, the same in all processes."""
    first_byte: int
    """Offset of the first byte in the storage that is exported."""
    nbytes: int
    storage: tuple[Any, ...]
    """Device number, CUDA handle and counters of the storage: all that `reduce_tensor` has behind the dtype."""

    @classmethod
    def of(cls, flat: torch.Tensor) -> DeviceMemory:
        """Export a contiguous CUDA tensor; every call counts for one opening of it."""
        from torch.multiprocessing.reductions import reduce_tensor

        content = flat.detach().flatten().view(torch.uint8)
        _, arguments = reduce_tensor(content)
        gpu = str(torch.cuda.get_device_properties(flat.device).uuid)
        return cls(gpu, arguments[3], content.numel(), arguments[6:])

    @property
    def handles(self) -> dict[str, tuple[Any, ...]]:
        """Entry of this memory in vLLM's `ipc_handles` of a packed buffer."""
        tensor = (torch.Tensor, torch.Size([self.nbytes]), (1,), self.first_byte, torch.storage.TypedStorage)
        return {self.gpu: (*tensor, torch.uint8, *self.storage)}

    def to_json(self) -> dict[str, Any]:
        """The fields as numbers and text, which JSON can hold."""
        storage = [{"base64": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for v in self.storage]
        return {"gpu": self.gpu, "first_byte": self.first_byte, "nbytes": self.nbytes, "storage": storage}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DeviceMemory:
        """Inverse of `to_json`."""
        storage = (base64.b64decode(v["base64"]) if isinstance(v, dict) else v for v in value["storage"])
        return cls(**{**value, "storage": tuple(storage)})


def packing_options() -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields that say buckets come as one buffer each: those of vLLM's connection, and those of each of its updates.

    Up to 0.24 they travel with every update, later they are part of the connection.

    Raises:
        UserError: this vLLM takes tensors one by one only.
    """
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo

    if "packed" in {field.name for field in fields(IPCWeightTransferInitInfo)}:
        return {"packed": True}, {}
    if "packed" in {field.name for field in fields(IPCWeightTransferUpdateInfo)}:
        return {}, {"packed": True}
    raise UserError("this vLLM has no packed IPC connection: install 0.24 or later, or set cluster.transport=gloo")


class IpcSender:
    """`WeightSender` to the one engine worker on this rank's GPU."""

    sending_ranks: ClassVar[SendingRanks] = "each"

    def __init__(
        self,
        host: str,
        receivers: int,
        timeout_s: float,
        *,
        name: str = "the policy rank",
        delta: bool = False,
        lent: Sequence[SharedBlock] = (),
    ) -> None:
        """Open the rendezvous; `GlooSender` has the arguments.

        Raises:
            UserError: `delta`, which vLLM's receiving engine does not understand.
            ValueError: more than one receiver.
        """
        del lent  # host memory plays no part
        if delta:
            raise UserError("rollout.publish=delta needs cluster.transport=gloo; over CUDA IPC use full")
        if receivers != 1:
            raise ValueError(f"CUDA IPC reaches the engine worker on the same GPU, not {receivers} of them")
        self._host = host
        self._name = name
        self._sent = 0
        self._store, self._port = listening_store(host, timeout_s)
        self._store.set("sender", name)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port at which the engine finds this rank."""
        return self._host, self._port

    def accept(self) -> None:
        """Wait until the engine has joined.

        Raises:
            PhaseTimeout: it did not come.
        """
        with named_wait(f"publish: rendezvous at {self._host}:{self._port}", self._name, "the engine on its GPU"):
            self._store.wait(["joined"])

    def send(self, contents: FlatContents, flat: torch.Tensor) -> int:
        """Tell the engine where `flat` [contents.elements] lies; returns their number when the engine has them.

        Raises:
            PhaseTimeout: the engine did not answer.
            PeerDied: the engine could not take it in; says why.
        """
        torch.cuda.current_stream().synchronize()
        return self.announce(contents, DeviceMemory.of(flat))

    def announce(self, contents: FlatContents, memory: DeviceMemory) -> int:
        """Do what `send` does, with memory that is exported and ready."""
        bucket, answer = f"bucket/{self._sent}", f"answer/{self._sent}"
        phase = f"publish: buffer {self._sent}, {contents.describe()}"
        self._sent += 1
        self._store.set(bucket, json.dumps({"contents": contents.describe(), "memory": memory.to_json()}))
        with named_wait(phase, self._name, "the engine on its GPU"):
            told = self._store.get(answer).decode()
        self._store.delete_key(bucket)
        self._store.delete_key(answer)
        if told != _LOADED:
            raise PeerDied(f"{phase}: {self._name} was told by the engine on its GPU: {told}")
        return contents.elements

    def close(self) -> None:
        """Drop the connection; an engine that still waits fails at once."""
        del self._store


class IpcUpdates:
    """`UpdateCalls` over CUDA IPC: each of vLLM's workers opens the memory of the rank on the same GPU."""

    def __init__(self, senders: Sequence[dict[str, Any]], ranks: range) -> None:
        """Join the senders on this engine's GPUs: policy rank i has that of a group's rank i + 1."""
        own = senders[ranks.start - 1 : ranks.stop - 1]
        self.init_info = packing_options()[0]
        self._receivers = [IpcReceiver(one["master_address"], one["master_port"], one["timeout_s"]) for one in own]

    def of(self, plan: PublishPlan) -> list[AbstractContextManager[dict[str, Any]]]:
        """Arguments of one call a bucket, for whose time the ranks lend their memory."""
        return [self._next(FlatContents.of_bucket(bucket)) for bucket in plan.buckets]

    @contextmanager
    def _next(self, contents: FlatContents) -> Iterator[dict[str, Any]]:
        """Arguments of vLLM's call for all workers, of which each takes the memory that is on its own GPU."""
        with ExitStack() as lent:
            updates = [lent.enter_context(receiver.next(contents)) for receiver in self._receivers]
            handles = {gpu: handle for update in updates for gpu, handle in update["ipc_handles"].items()}
            yield updates[0] | {"ipc_handles": handles}


class IpcReceiver:
    """Receiver of buckets from one policy rank."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        """Join the policy rank at `host`:`port`.

        Raises:
            PhaseTimeout, PeerDied: it is not there.
        """
        self._sender = f"the policy rank at {host}:{port}"
        self._received = 0
        with named_wait(f"publish: rendezvous at {host}:{port}", "an engine", self._sender):
            self._store = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
            self._sender = f"{self._store.get('sender').decode()} at {host}:{port}"
            self._store.set("joined", "yes")

    @contextmanager
    def next(self, contents: FlatContents) -> Iterator[dict[str, Any]]:
        """Arguments of vLLM's update call for the next buffer, to be made in this context; its end gives the memory
        back.

        Raises:
            PhaseTimeout, PeerDied: the sender did not come or is gone.
            ValueError: the sender announces something else.
        """
        number, self._received = self._received, self._received + 1
        phase = f"publish: buffer {number}, {contents.describe()}"
        with named_wait(phase, "an engine", self._sender):
            announcement = json.loads(self._store.get(f"bucket/{number}"))
        answer = _LOADED
        try:
            if announcement["contents"] != contents.describe():
                raise ValueError(f"{phase}: {self._sender} announces {announcement['contents']}")
            yield _update_info(contents, DeviceMemory.from_json(announcement["memory"]))
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._store.set(f"answer/{number}", answer)


def _update_info(contents: FlatContents, memory: DeviceMemory) -> dict[str, Any]:
    itemsize = contents.torch_dtype.itemsize
    sizes = [prod(shape) * itemsize for shape in contents.shapes]
    return contents.update_info() | packing_options()[1] | {"ipc_handles": memory.handles, "tensor_sizes": sizes}
