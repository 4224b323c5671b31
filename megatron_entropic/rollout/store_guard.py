"""A guard for what vLLM's processes unpickle in a weight transfer: the id of a NCCL communicator, nothing else.

Over `cluster.transport=nccl` the policy hands the communicator's id to the engines' workers through vLLM's
`StatelessProcessGroup`. That is a TCP store without any password whose values are unpickled as they are: whoever
reaches its port first could run commands in every worker (vLLM 0.24 to 0.32). Here the id is taken out of the pickle
without calling what it names, and everything else is refused.
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import Any

from megatron_entropic.checkpoints.checkpoint_pickle import UNREADABLE

_ID_CLASS = ("vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId")
_CTYPES_UNPICKLE = ("_ctypes", "_unpickle")


def guard_store() -> None:
    """Replace the unpickling of vLLM's process groups without torch, in this process. Repeatable."""
    from vllm.distributed import utils

    utils.pickle = SimpleNamespace(dumps=pickle.dumps, loads=read_unique_id)


def read_unique_id(data: bytes) -> Any:
    """Read the `ncclUniqueId` that is pickled in `data`.

    Raises:
        pickle.UnpicklingError: it is something else.
    """
    from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId

    try:
        content = _IdUnpickler(io.BytesIO(data)).load()
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError(f"it is {type(content).__name__}")
        return ncclUniqueId.from_buffer_copy(content)
    except UNREADABLE as error:
        raise pickle.UnpicklingError(
            "the store of the weight transfer holds something else than the id of a NCCL communicator, which somebody "
            f"on the cluster's network may have put there: {error}"
        ) from error


class _UniqueId:
    """Stand-in for the class of ids; only named, never made."""

    def __new__(cls) -> _UniqueId:
        raise pickle.UnpicklingError("an id without bytes")

    def __setstate__(self, _state: Any) -> None:
        """Keep nothing. Called on the class it lacks an argument: nothing can be set on it."""


def _bytes_of(kind: Any, state: Any) -> bytes:
    """Stand-in for ctypes' function that makes an object of a class from (attributes, memory); returns the memory."""
    if kind is not _UniqueId or not isinstance(state, tuple) or state[:1] != ({},) or type(state[-1]) is not bytes:
        raise pickle.UnpicklingError("not the memory of an id")
    content: bytes = state[-1]
    return content


class _IdUnpickler(pickle.Unpickler):
    """Unpickler that knows the two names in the pickle of an id."""

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in for either of the two names; any other is refused."""
        if (module, name) == _ID_CLASS:
            return _UniqueId
        if (module, name) == _CTYPES_UNPICKLE:
            return _bytes_of
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the id of a communicator")
