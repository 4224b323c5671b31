"""The CUDA side of publishing: vLLM's own NCCL engine receives, and its trainer-side calls send.

vLLM's interface has two generations. Up to 0.24 the packing options travel with every update; later they are part of
the connection. Both are told apart by the fields of vLLM's own dataclasses. Written from the sources of 0.24 and 0.32.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch

from megatron_entropic.errors import UserError
from megatron_entropic.weights.shared_block import SharedBlock
from megatron_entropic.weights.transport import FlatContents, SendingRanks

# One broadcast a bucket: larger than any bucket. vLLM allocates what a bucket needs, not this.
_PACKED = {"packed": True, "packed_buffer_size_bytes": 2**40, "packed_num_buffers": 1}


def packing_options() -> tuple[dict[str, Any], dict[str, Any]]:
    """Extra fields of vLLM's NCCL connection and of each of its updates, for the installed version."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

    of_connection = "packed" in {field.name for field in fields(NCCLWeightTransferInitInfo)}
    return (_PACKED, {}) if of_connection else ({}, _PACKED)


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
        """Choose a port for the rendezvous of `receivers` workers; `accept` opens it.

        Raises:
            UserError: `delta`, which vLLM's receiving engine does not understand.
        """
        del timeout_s, name, lent  # host memory plays no part
        if delta:
            raise UserError("rollout.publish=delta needs cluster.transport=gloo; over NCCL use full")
        self._receivers = receivers
        self._group: Any = None
        with socket.create_server((host, 0)) as probe:
            self._address = (host, int(probe.getsockname()[1]))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port at which the workers find this group."""
        return self._address

    def accept(self) -> None:
        """Waits until every worker has joined."""
        host, port = self._address
        self._group = _trainer_init()({"master_address": host, "master_port": port, "world_size": self._receivers + 1})

    def send(self, contents: FlatContents, flat: torch.Tensor) -> int:
        """Broadcasts `flat` [contents.elements] to all workers; returns their number when it may be reused."""
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
        """Drops the communicator."""
        self._group = None


def _trainer_init() -> Any:
    """vLLM's function that opens the trainer's end, which moved between the generations."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    if hasattr(NCCLWeightTransferEngine, "trainer_init"):
        return NCCLWeightTransferEngine.trainer_init
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init
