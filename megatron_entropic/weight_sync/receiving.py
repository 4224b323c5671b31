"""An engine worker's end of a publication: buckets of several senders, received while earlier ones are loaded.

    sender of stage 0 ==> thread --+
                                   +--> one waiting bucket --> the caller, which loads it
    sender of stage 1 ==> thread --+

Each thread holds one bucket at most, so a worker holds one a sender, one that waits and one that is loaded. A bucket in
a sender's own memory goes back to it when it is loaded, and the sender fills its other buffer meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import torch

from megatron_entropic.errors import PhaseTimeout
from megatron_entropic.weight_sync.gloo import FlatContents, GlooReceiver

_POLL_S = 0.5
_GRACE_S = 1.0
"""Seconds that the caller waits longer than a receiver, so that the more telling error of the receiver comes first."""


class _Arrival:
    """A bucket on its way from a thread to the caller."""

    def __init__(self, contents: FlatContents, flat: torch.Tensor) -> None:
        self.contents = contents
        self._flat: torch.Tensor | None = flat
        self.used = threading.Event()

    def use(self, load: Callable[[FlatContents, torch.Tensor], None]) -> None:
        """Hand the bucket to `load`, once; afterwards nothing here refers to the buffer."""
        flat, self._flat = self._flat, None
        assert flat is not None, "an arrival is used once"
        load(self.contents, flat)
        del flat
        self.used.set()


class Arrivals:
    """All buckets of one publication in the order of arrival, for one use."""

    def __init__(self, receivers: Sequence[GlooReceiver], contents: Sequence[Sequence[FlatContents]]) -> None:
        """Start to receive from every sender, each its own buckets in order.

        Args:
            receivers: receivers, one for each sender.
            contents: contents of the buckets that each of them will send.
        """
        self._count = sum(map(len, contents))
        self._limit_s = max(receiver.timeout_s for receiver in receivers) + _GRACE_S
        self._missing = {receiver.sender: len(buckets) for receiver, buckets in zip(receivers, contents, strict=True)}
        self._arrived: queue.Queue[_Arrival | Exception] = queue.Queue(maxsize=1)
        self._abandoned = threading.Event()
        for receiver, buckets in zip(receivers, contents, strict=True):
            # A thread whose sender is gone ends by the receiver's own time limit; nobody has to wait for that.
            threading.Thread(target=self._receive, args=(receiver, buckets), daemon=True).start()

    def deliver(self, load: Callable[[FlatContents, torch.Tensor], None]) -> None:
        """Call `load` with the contents and the flat buffer of every bucket; it may keep views of the buffer.

        Raises:
            PhaseTimeout, PeerDied, ValueError: the first failure of a receiver; or nothing came for longer than the
                receivers' limit.
        """
        try:
            for number in range(self._count):
                arrival = self._next(number)
                if isinstance(arrival, Exception):
                    raise arrival
                arrival.use(load)
        finally:
            self._abandoned.set()

    def _next(self, number: int) -> _Arrival | Exception:
        """Wait for whatever arrives next. torch's store has no limit once the process that holds it stands still."""
        try:
            return self._arrived.get(timeout=self._limit_s)
        except queue.Empty as error:
            senders = " and ".join(sender for sender, count in self._missing.items() if count)
            raise PhaseTimeout(
                f"publish: bucket {number} of {self._count}: an engine worker waited {self._limit_s:g} s for {senders}"
            ) from error

    def _receive(self, receiver: GlooReceiver, buckets: Sequence[FlatContents]) -> None:
        try:
            for contents in buckets:
                arrival = _Arrival(contents, receiver.receive(contents))
                self._missing[receiver.sender] -= 1
                if not self._hand_over(arrival) or (receiver.lends and not self._await_use(arrival)):
                    return
                receiver.release()
        except Exception as error:  # noqa: BLE001 - raised again where the buckets are consumed
            self._hand_over(error)

    def _await_use(self, arrival: _Arrival) -> bool:
        """Wait until the caller has used a bucket; False if it will not come so far."""
        while not arrival.used.wait(timeout=_POLL_S):
            if self._abandoned.is_set():
                return False
        return True

    def _hand_over(self, arrival: _Arrival | Exception) -> bool:
        """Wait for room and put a bucket or an error there; False if nobody takes anything any more."""
        while not self._abandoned.is_set():
            try:
                self._arrived.put(arrival, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
