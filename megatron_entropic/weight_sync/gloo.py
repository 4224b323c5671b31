"""Broadcasting weights from one policy rank to the rollout engines' workers over gloo.

    sender (rank 0)                              receivers (ranks 1..n)
    GlooSender(host, n)   listens at once
    accept()              <---- store: join/r -- GlooReceiver(address, r)      rendezvous
    send(contents, flat)  ----- store: k ------> receive(contents)             announcement k: what comes next
                          ===== channel ========>                              one flat tensor, or what changed of it
                          <---- all are done --- release()

The bytes go through shared memory where all receivers see that of the sender, otherwise by gloo broadcast (`channel`).
Where the flat tensor itself lies in memory that all of them see, nothing is copied: the sender lends it to them.
An announcement precedes every broadcast: a receiver that expects something else fails with both descriptions instead
of reading foreign bytes, and one whose sender never comes fails by its own time limit. Nothing here knows vLLM.

With `delta` both ends keep the buffers of the last publication, and only elements that differ travel (see `delta`).
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import ClassVar, Literal, Protocol

import torch
import torch.distributed as dist

from megatron_entropic.errors import PeerDied, PhaseTimeout
from megatron_entropic.weight_sync.channel import BLOCK_BYTES, Channel
from megatron_entropic.weight_sync.delta import Delta, bitmap_bytes
from megatron_entropic.weight_sync.plan import Bucket
from megatron_entropic.weight_sync.shared_memory import FlatMemory, Loan, SharedBlock

# Announcements are deleted this many broadcasts later. A gloo broadcast is a tree, so a sender can be ahead of its last
# receiver by the depth of that tree and no more.
_KEPT_ANNOUNCEMENTS = 64
_SEES_BLOCKS = "blocks"
"""Text that a worker writes into the store if it could open all of the sender's shared memory."""
_CHANGED = "; changed elements: "
"""End of the announcement of a buffer of which only these many elements follow, behind their bitmap."""
_LENT = "; in lent block "
"""End of the announcement of a buffer that receivers find in this block of the sender."""


@dataclass(frozen=True)
class FlatContents:
    """Contents of one flat buffer: tensors of one dtype, one behind the other."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    """Name of a torch dtype, such as float32."""

    @classmethod
    def of_bucket(cls, bucket: Bucket) -> FlatContents:
        """Contents of the buffer that a publish plan sends to the engines for one bucket."""
        return cls(bucket.hf_names, bucket.hf_shapes, bucket.dtype)

    @classmethod
    def of_update(cls, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> FlatContents:
        """Contents from the parallel lists that vLLM's update calls carry.

        Raises:
            ValueError: no tensors, lists of different lengths or more than one dtype.
        """
        if not names or not len(names) == len(dtypes) == len(shapes):
            raise ValueError(
                f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes: one of each per tensor"
            )
        if len(set(dtypes)) > 1:
            raise ValueError(f"a flat buffer holds one dtype, not {sorted(set(dtypes))}")
        return cls(tuple(names), tuple(tuple(shape) for shape in shapes), dtypes[0])

    def update_info(self) -> dict[str, list]:
        """The lists that vLLM's update calls carry; inverse of `of_update`."""
        return {
            "names": list(self.names),
            "dtype_names": [self.dtype] * len(self.names),
            "shapes": [list(shape) for shape in self.shapes],
        }

    @property
    def elements(self) -> int:
        """Length of the flat buffer, in elements."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names.

        Raises:
            ValueError: torch has no such dtype.
        """
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.dtype}: not a torch dtype")
        return dtype

    def describe(self) -> str:
        """Text for messages and announcements; its digest makes it differ if any name or shape differs."""
        digest = hashlib.sha256(repr((self.names, self.shapes)).encode()).hexdigest()[:12]
        return (
            f"{self.names[0]} .. {self.names[-1]} ({len(self.names)} tensors, {self.elements} elements "
            f"of {self.dtype}, names and shapes {digest})"
        )

    def split(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields name and view of every tensor in `flat` [elements]."""
        pieces = flat.split([prod(shape) for shape in self.shapes])
        for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True):
            yield name, piece.view(shape)


SendingRanks = Literal["first", "first_of_stages", "each"]
"""Policy ranks that send, each through a group of its own: rank 0 all buckets; the first rank of each pipeline stage
the buckets of that stage, receivers listening to all of them at once; or rank i all buckets, to worker i alone."""


class WeightSender(Protocol):
    """A policy rank's end of a transfer group; its other ranks are vLLM workers."""

    sending_ranks: ClassVar[SendingRanks]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port at which the workers find this group, valid from the start."""

    def accept(self) -> None:
        """Wait until every worker has joined."""

    def send(self, contents: FlatContents, flat: torch.Tensor) -> int:
        """Broadcast one flat buffer, which the caller may change afterwards; every worker must be receiving the same
        contents.

        Returns:
            Number of elements that travelled.
        """

    def close(self) -> None:
        """Leave the group."""


class GlooSender:
    """A `WeightSender` through host memory. Listens on `host` only, on a port of the system's choice."""

    sending_ranks: ClassVar[SendingRanks] = "first_of_stages"

    def __init__(
        self,
        host: str,
        receivers: int,
        timeout_s: float,
        *,
        name: str = "the sending policy rank",
        delta: bool = False,
        lent: Sequence[SharedBlock] = (),
    ) -> None:
        """Open the rendezvous for `receivers` workers; every later wait is limited to `timeout_s`.

        Args:
            host: address to listen on.
            receivers: number of workers.
            timeout_s: limit of every wait, in seconds.
            name: name of this rank, for messages.
            delta: whether to keep every buffer that was sent, and send only what differs from it the next time.
            lent: blocks of memory; flat tensors that begin where one of these does are not copied. They have to admit
                others until `accept` has returned.
        """
        self._host = host
        self._receivers = receivers
        self._timeout_s = timeout_s
        self._name = name
        self._last: dict[FlatContents, torch.Tensor] | None = {} if delta else None
        self._sent = 0
        self._channel: Channel | None = None
        self._block = SharedBlock.create(BLOCK_BYTES)
        self._lent = tuple(lent) if self._block else ()
        self._store, self._port = listening_store(host, timeout_s)
        self._store.set("receivers", str(receivers))
        self._store.set("sender", name)
        self._store.set("delta", str(int(delta)))
        blocks = [self._block, *self._lent] if self._block else []
        self._store.set("blocks", "\n".join(f"{block.token} {block.path}" for block in blocks))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port at which receivers find this group."""
        return self._host, self._port

    def accept(self) -> None:
        """Wait until every receiver has joined.

        Raises:
            PhaseTimeout: naming the receivers that did not come.
        """
        phase = f"publish: rendezvous at {self._host}:{self._port}"
        ranks = range(1, self._receivers + 1)
        try:
            self._store.wait([f"join/{rank}" for rank in ranks], timedelta(seconds=self._timeout_s))
        except dist.DistStoreError as error:
            missing = ", ".join(str(rank) for rank in ranks if not self._store.check([f"join/{rank}"]))
            raise PhaseTimeout(
                f"{phase}: {self._name} waited {self._timeout_s:g} s for engine worker {missing} of {self._receivers}"
            ) from error
        with named_wait(phase, self._name, f"{self._receivers} engine workers that have joined"):
            group = _gloo_group(self._store, 0, self._receivers + 1, self._host, self._timeout_s)
            if self._block is not None:
                self._block.admit_nobody_else()
                if any(self._store.get(f"join/{rank}").decode() != _SEES_BLOCKS for rank in ranks):
                    self._block, self._lent = None, ()
            self._store.set("through", "block" if self._block else "gloo")
        self._channel = Channel(group, self._block)

    def send(self, contents: FlatContents, flat: torch.Tensor) -> int:
        """Announce `contents`, then broadcast `flat` [contents.elements], or what changed of it, to all receivers.

        Returns:
            Number of elements that travelled.

        Raises:
            PhaseTimeout, PeerDied: naming the buffer and how far each receiver has come.
        """
        assert self._channel is not None, "accept() comes before send()"
        assert flat.numel() == contents.elements
        assert flat.dtype == contents.torch_dtype
        flat = flat.cpu()  # of a policy that shares its GPU with an engine
        parts, announcement = [flat], contents.describe()
        last = None if self._last is None else self._last.get(contents)
        if last is not None:
            delta = Delta.between(last, flat)
            announcement += f"{_CHANGED}{delta.changed}"
            parts = [delta.bitmap, delta.values] if delta.changed else []
        lent = self._lent_block(flat)
        if lent is not None:
            announcement += f"{_LENT}{lent}"
            parts = []
        self._store.set(f"announcement/{self._sent}", announcement)
        phase = f"publish: broadcast {self._sent}, {contents.describe()}"
        try:
            with named_wait(phase, self._name, "the engine workers"):
                for part in parts:
                    self._channel.send(part)
                if lent is not None:
                    self._channel.wait_for_all()
        except (PhaseTimeout, PeerDied) as error:
            raise type(error)(f"{error}; {self._progress()}") from error.__cause__
        if self._last is not None:
            self._last[contents] = flat.clone() if last is None else last.copy_(flat)
        if self._sent >= _KEPT_ANNOUNCEMENTS:
            self._store.delete_key(f"announcement/{self._sent - _KEPT_ANNOUNCEMENTS}")
        self._sent += 1
        return contents.elements if last is None else delta.changed

    def close(self) -> None:
        """Drop the connections; receivers that still wait fail at once."""
        if self._block is not None:
            self._block.admit_nobody_else()
        self._block = self._channel = None
        self._lent = ()
        del self._store

    def _lent_block(self, flat: torch.Tensor) -> int | None:
        """Number of the block that `flat` lies in, if receivers may look at it there; those of deltas keep a copy."""
        if self._last is not None:
            return None
        return next((number for number, block in enumerate(self._lent) if block.begins_with(flat)), None)

    def _progress(self) -> str:
        """Words for the number of buffers that each receiver asked for, as it wrote into the store."""
        asked = {rank: int(self._store.get(f"asked/{rank}")) for rank in range(1, self._receivers + 1)}
        return "broadcasts begun by engine worker: " + ", ".join(f"{rank}: {count}" for rank, count in asked.items())


class GlooReceiver:
    """One worker's end of a transfer group."""

    def __init__(self, host: str, port: int, rank: int, receivers: int, timeout_s: float) -> None:
        """Join the group of the sender at `host`:`port` as `rank` (1 to `receivers`).

        Raises:
            PhaseTimeout: the sender or another receiver did not come.
            ValueError: the sender counts another number of receivers.
        """
        self._name = f"engine worker {rank}"
        self._sender = f"the sending policy rank at {host}:{port}"
        self._rank = rank
        self._timeout_s = timeout_s
        self._received = 0
        phase = f"publish: rendezvous at {host}:{port}"
        limit = timedelta(seconds=timeout_s)
        with named_wait(phase, self._name, self._sender):
            self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
            expected = int(self._store.get("receivers"))
            self._sender = f"{self._store.get('sender').decode()} at {host}:{port}"
            delta = self._store.get("delta") == b"1"
        self._last: dict[FlatContents, torch.Tensor] | None = {} if delta else None
        if expected != receivers or not 1 <= rank <= receivers:
            raise ValueError(f"{phase}: the sender expects {expected} engine workers, this is {rank} of {receivers}")
        self._store.set(f"asked/{rank}", "0")
        blocks = self._open_blocks()
        self._lent = blocks[1:]
        self._store.set(f"join/{rank}", _SEES_BLOCKS if blocks else "")
        with named_wait(phase, self._name, f"{self._sender} and {receivers - 1} other engine workers"):
            group = _gloo_group(self._store, rank, receivers + 1, local_address(host, port), timeout_s)
            through_block = self._store.get("through") == b"block"
        self._channel = Channel(group, blocks[0] if through_block else None)
        self._memory = FlatMemory()
        self._loan: Loan | None = None

    @property
    def sender(self) -> str:
        """Name and address of the sending rank."""
        return self._sender

    @property
    def timeout_s(self) -> float:
        """Limit of each wait, seconds."""
        return self._timeout_s

    def receive(self, contents: FlatContents) -> torch.Tensor:
        """Receive the next flat buffer, [contents.elements] on the CPU. Call `release` before the next one.

        It stays as it is while it or a view of it exists, except that a sender of deltas makes the next receiving of
        the same contents change it in place.

        Raises:
            PhaseTimeout, PeerDied: the sender did not come or is gone.
            ValueError: the sender announces something else.
        """
        phase = f"publish: broadcast {self._received}, {contents.describe()}"
        with named_wait(phase, self._name, self._sender):
            self._store.set(f"asked/{self._rank}", str(self._received + 1))
            # Waits for the key, at most as long as the store's own limit.
            announcement = self._store.get(f"announcement/{self._received}").decode()
        announced, _, lent = announcement.partition(_LENT)
        announced, _, changed = announced.partition(_CHANGED)
        if announced != contents.describe():
            raise ValueError(f"{phase}: {self._name} expected this, but the sender announces {announced}")
        self._received += 1
        if lent:
            flat = self._lent[int(lent)].tensor(contents.elements, contents.torch_dtype)
            self._loan = Loan(flat)
            return flat
        with named_wait(phase, self._name, self._sender):
            return self._receive_changes(contents, int(changed)) if changed else self._receive_all(contents)

    @property
    def lends(self) -> bool:
        """Whether the last buffer lies in the sender's memory, and the sender waits for `release`."""
        return self._loan is not None

    def release(self) -> None:
        """Let the sender have its memory back; call it when the last buffer has been used. Views of it stay valid.

        Raises:
            PhaseTimeout, PeerDied: the sender or another worker did not come so far, or is gone.
        """
        if self._loan is None:
            return
        self._loan.end()
        self._loan = None
        with named_wait(f"publish: broadcast {self._received - 1}", self._name, f"{self._sender} and other workers"):
            self._channel.wait_for_all()

    def _open_blocks(self) -> list[SharedBlock]:
        """Open all blocks of the sender, its channel's first; empty if any is not to be seen from here."""
        places = [line.partition(" ") for line in self._store.get("blocks").decode().splitlines()]
        blocks = [block for token, _, path in places if (block := SharedBlock.open(path, token))]
        return blocks if len(blocks) == len(places) else []

    def _receive_all(self, contents: FlatContents) -> torch.Tensor:
        flat = self._memory.take(contents.elements, contents.torch_dtype)
        self._channel.receive(flat)
        if self._last is not None:
            self._last[contents] = flat
        return flat

    def _receive_changes(self, contents: FlatContents, changed: int) -> torch.Tensor:
        assert self._last is not None, "the sender told at the rendezvous that it sends deltas"
        flat = self._last[contents]
        if changed:
            delta = Delta(
                torch.empty(bitmap_bytes(contents.elements), dtype=torch.uint8),
                torch.empty(changed, dtype=contents.torch_dtype),
            )
            self._channel.receive(delta.bitmap)
            self._channel.receive(delta.values)
            delta.apply_to(flat)
        return flat


def _gloo_group(store: dist.Store, rank: int, size: int, host: str, timeout_s: float) -> dist.ProcessGroupGloo:
    """A process group outside torch.distributed's global state, bound to one local address."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)


def listening_store(host: str, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """Open a store for others on a port of `host` that the system chooses; `timeout_s` limits each wait in it."""
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store owns the socket from here on
    )
    return store, port


def local_address(host: str, port: int) -> str:
    """Address of this machine on the route to `host`; nothing is sent."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


@contextmanager
def named_wait(phase: str, waiter: str, peer: str) -> Iterator[None]:
    """Give errors of torch.distributed in the block a phase, who waited and for whom.

    Raises:
        PhaseTimeout, PeerDied: in place of the RuntimeError that the block raised.
    """
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "timed out" in reason.lower() or "timeout" in reason.lower():
            elapsed = time.monotonic() - started
            raise PhaseTimeout(f"{phase}: {waiter} waited {elapsed:.1f} s for {peer} ({reason})") from error
        raise PeerDied(f"{phase}: {waiter} lost {peer} ({reason})") from error
