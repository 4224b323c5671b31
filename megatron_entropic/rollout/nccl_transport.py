"""The CUDA side of publishing: vLLM's own NCCL engine receives, and its trainer-side calls send.

vLLM's interface has two generations. Up to 0.24 the packing options travel with every update; later they are part of
the connection. Both are told apart by the fields of vLLM's own dataclasses. Written from the sources of 0.24 and 0.32.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from inspect import signature
from typing import Any, ClassVar

import torch

from megatron_entropic.errors import UserError
from megatron_entropic.weight_sync.gloo import FlatContents, SendingRanks
from megatron_entropic.weight_sync.plan import PublishPlan
from megatron_entropic.weight_sync.shared_memory import SharedBlock

# One broadcast a bucket: larger than any bucket. vLLM allocates what a bucket needs, not this.
_PACKED = {"packed": True, "packed_buffer_size_bytes": 2**40, "packed_num_buffers": 1}


def packing_options() -> tuple[dict[str, Any], dict[str, Any]]:
    """Extra fields of vLLM's NCCL connection and of each of its updates, for the installed version."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

    of_connection = "packed" in {field.name for field in fields(NCCLWeightTransferInitInfo)}
    return (_PACKED, {}) if of_connection else ({}, _PACKED)


class NcclUpdates:
    """`UpdateCalls` over NCCL: vLLM's own engine, one call for each bucket, from one sender."""

    def __init__(self, senders: Sequence[dict[str, Any]], ranks: range) -> None:
        """Let all workers of all engines join one group."""
        (sender,) = senders
        of_connection, self._of_update = packing_options()
        found = {key: sender[key] for key in ("master_address", "master_port", "world_size")}
        self.init_info: dict[str, Any] = {"rank_offset": ranks.start, **found, **of_connection}

    def of(self, plan: PublishPlan) -> list[AbstractContextManager[dict[str, Any]]]:
        """Arguments of one vLLM broadcast for each bucket."""
        contents = map(FlatContents.of_bucket, plan.buckets)
        return [nullcontext(bucket.update_info() | self._of_update) for bucket in contents]


class NcclSender:
    """`WeightSender` over NCCL; the tensors are on the current CUDA device.

    NCCL has no time limit of its own here: whoever awaits the policy and the engines sets it.
    """

    sending_ranks: ClassVar[SendingRanks] = "first"  # vLLM's receiving engine belongs to one group

    def __init__(
        self,
        host: str,
        receivers: int,
        timeout_s: float,
        *,
        name: str = "",
        delta: bool = False,
        lent: Sequence[SharedBlock] = (),
    ) -> None:
        """Take a port for the rendezvous of `receivers` workers, which nobody else gets any more; see `accept`.

        Raises:
            UserError: `delta`, which vLLM's receiving engine does not understand.
        """
        del timeout_s, name, lent  # host memory plays no part
        if delta:
            raise UserError("rollout.publish=delta needs cluster.transport=gloo; over NCCL use full")
        self._receivers = receivers
        self._group: Any = None
        self._listener = _claimed_port(host)
        self._address = (host, int(self._listener.getsockname()[1]))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port at which the workers find this group."""
        return self._address

    def accept(self) -> None:
        """Wait until every worker has joined."""
        self._group = _open_group(self._listener, self._address, self._receivers + 1)

    def send(self, contents: FlatContents, flat: torch.Tensor) -> int:
        """Broadcast `flat` [contents.elements] to all workers; returns their number when it may be reused."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        assert self._group is not None, "accept() comes before send()"
        # vLLM broadcasts from streams of its own, which do not wait for the one that filled the buffer.
        torch.cuda.current_stream().synchronize()
        packed_nccl_broadcast_producer(
            iterator=contents.split(flat),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=_PACKED["packed_buffer_size_bytes"],
            num_buffers=_PACKED["packed_num_buffers"],
        )
        return contents.elements

    def close(self) -> None:
        """End the communicator: it keeps buffers on the device, and a broadcast whose engine is gone goes on in it.

        Nothing of NCCL ends with the last reference to vLLM's object.
        """
        if self._group is not None:
            self._group.destroy()
        self._group = None
        self._listener.close()


def _takes_listener() -> bool:
    """Whether vLLM's store is handed its listening socket; older versions open a port by its number."""
    from vllm.distributed.utils import StatelessProcessGroup

    return "listen_socket" in signature(StatelessProcessGroup.create).parameters


def _claimed_port(host: str) -> socket.socket:
    """A socket with a port of its own, which listens if vLLM takes it over."""
    if _takes_listener():
        return socket.create_server((host, 0))
    # Bound, but not listening: Linux gives the port to nobody but who names it and shares the address, as vLLM does.
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, 0))
    return holder


def _open_group(listener: socket.socket, address: tuple[str, int], world_size: int) -> Any:
    """Open the trainer's end of the group, rank 0, as vLLM's `trainer_init` does, on a port that is ours already."""
    host, port = address
    if not _takes_listener():
        return _trainer_init()({"master_address": host, "master_port": port, "world_size": world_size})
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    store = StatelessProcessGroup.create(host=host, port=port, rank=0, world_size=world_size, listen_socket=listener)
    with unpinned_nccl_env():
        return PyNcclCommunicator(store, device=torch.accelerator.current_device_index())


def _trainer_init() -> Any:
    """vLLM's function that opens the trainer's end, which moved between the generations."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    if hasattr(NCCLWeightTransferEngine, "trainer_init"):
        return NCCLWeightTransferEngine.trainer_init
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init
