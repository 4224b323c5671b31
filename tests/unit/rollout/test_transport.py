"""The gloo transfer group between threads of one process: what arrives, and what each failure says."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megatron_entropic.errors import PeerDied, PhaseTimeout
from megatron_entropic.weight_sync import gloo as transport
from megatron_entropic.weight_sync.gloo import FlatContents, GlooReceiver, GlooSender
from megatron_entropic.weight_sync.receiving import Arrivals
from megatron_entropic.weight_sync.shared_memory import SharedBlock

HOST = "127.0.0.1"
PATIENT_S = 60.0
HASTY_S = 1.5
CONTENTS = FlatContents(("a.weight", "b.bias"), ((2, 3), (5,)), "float32")


@pytest.fixture
def background():
    """Runs a function in a thread, as another process would."""
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit


Background = Callable[..., Future]


def joined(
    background: Background, receivers: int, timeout_s: float = PATIENT_S, lent: Sequence[SharedBlock] = ()
) -> tuple[GlooSender, list[Any]]:
    """A sender with its receivers, all connected."""
    sender = GlooSender(HOST, receivers, timeout_s, lent=lent)
    pending = [
        background(GlooReceiver, *sender.address, rank, receivers, timeout_s) for rank in range(1, receivers + 1)
    ]
    sender.accept()
    return sender, [future.result() for future in pending]


@pytest.mark.parametrize("sharing", [3, 2, 0], ids=["all share memory", "one does not", "none does"])
def test_every_receiver_gets_the_bytes_of_every_buffer(background, monkeypatch, sharing):
    monkeypatch.setattr(transport, "BLOCK_BYTES", 300)  # several pieces a buffer
    opened = SharedBlock.open
    seen = itertools.count()
    monkeypatch.setattr(SharedBlock, "open", lambda *place: opened(*place) if next(seen) < sharing else None)
    sender, receivers = joined(background, 3)
    through = [receiver._channel.block is not None for receiver in receivers]
    assert through == [sharing == 3] * 3
    generator = torch.Generator().manual_seed(3)
    # More than the announcements that are kept, so that old ones are deleted on the way.
    for turn in range(150):
        dtype = ("float32", "bfloat16")[turn % 2]
        contents = FlatContents((f"layer.{turn}", "norm"), ((4, turn + 1), (3,)), dtype)
        flat = torch.randn(contents.elements, generator=generator).to(contents.torch_dtype)
        pending = [background(receiver.receive, contents) for receiver in receivers]
        sender.send(contents, flat)
        for future in pending:
            tensors = dict(contents.split(future.result()))
            assert torch.equal(tensors[f"layer.{turn}"], flat[: 4 * (turn + 1)].view(4, turn + 1))
            assert torch.equal(tensors["norm"], flat[-3:])
            assert tensors["norm"].dtype == contents.torch_dtype


def test_a_lent_buffer_is_not_copied_and_views_of_it_outlive_the_loan(background):
    blocks = [SharedBlock.create(4 * CONTENTS.elements) for _ in range(2)]
    sender, receivers = joined(background, 2, lent=blocks)
    kept: list[list[torch.Tensor]] = [[], []]

    def load(rank: int, turn: int, flat: torch.Tensor) -> None:
        assert flat.eq(turn).all()
        if turn % 2:
            kept[rank].append(flat[1:3])

    def receive_all(rank: int) -> None:
        turns = iter(range(6))
        arrivals = Arrivals([receivers[rank]], [[CONTENTS] * 6])
        arrivals.deliver(lambda _contents, flat: load(rank, next(turns), flat))

    pending = [background(receive_all, rank) for rank in range(2)]
    for turn in range(6):
        flat = blocks[turn % 2].tensor(CONTENTS.elements, torch.float32).fill_(turn)
        # Comes back when both have loaded it, so the memory can be filled again at once.
        assert sender.send(CONTENTS, flat) == CONTENTS.elements
    for future in pending:
        future.result()
    for block in blocks:
        block.bytes.fill_(0)
    assert [[float(view.mean()) for view in views] for views in kept] == [[1, 3, 5], [1, 3, 5]]


def test_a_worker_that_never_gives_a_loan_back_is_named(background):
    (block,) = blocks = [SharedBlock.create(4 * CONTENTS.elements)]
    sender, (receiver,) = joined(background, 1, HASTY_S, lent=blocks)
    background(receiver.receive, CONTENTS)
    with pytest.raises(PhaseTimeout, match=r"broadcast 0, a.weight .* the engine workers .*by engine worker: 1: 1"):
        sender.send(CONTENTS, block.tensor(CONTENTS.elements, torch.float32))


def test_received_buffers_stay_valid(background):
    sender, (receiver,) = joined(background, 1)
    kept = []
    for value in (1.0, 2.0):
        future = background(receiver.receive, CONTENTS)
        sender.send(CONTENTS, torch.full((CONTENTS.elements,), value))
        kept.append(future.result())
    assert [flat.unique().tolist() for flat in kept] == [[1.0], [2.0]]


def test_listens_on_the_given_address_only():
    sender = GlooSender("127.0.0.2", 1, HASTY_S)
    _, port = sender.address
    socket.create_connection(("127.0.0.2", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=5)


def test_rendezvous_names_the_workers_that_did_not_come(background):
    sender = GlooSender(HOST, 3, HASTY_S)
    present = background(GlooReceiver, *sender.address, 2, 3, HASTY_S)
    started = time.monotonic()
    with pytest.raises(PhaseTimeout, match=r"publish: rendezvous at .*policy rank waited .* engine worker 1, 3 of 3"):
        sender.accept()
    assert time.monotonic() - started < HASTY_S + 10
    with pytest.raises(PhaseTimeout, match=r"rendezvous at .*engine worker 2 waited .* policy rank at 127.0.0.1:\d+"):
        present.result()


def test_receiver_whose_sender_never_comes_names_it_within_the_limit(background):
    with socket.create_server((HOST, 0)) as unused:
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(PhaseTimeout, match=rf"publish: rendezvous at {HOST}:{port}: engine worker 1 waited"):
        GlooReceiver(HOST, port, 1, 1, HASTY_S)
    assert time.monotonic() - started < 3 * HASTY_S + 10


def test_receiver_that_waits_in_vain_for_a_broadcast_names_it(background):
    _sender, (receiver,) = joined(background, 1, HASTY_S)
    started = time.monotonic()
    with pytest.raises(
        PhaseTimeout, match=r"broadcast 0, a.weight .. b.bias .*engine worker 1 waited .* the sending policy rank at"
    ):
        receiver.receive(CONTENTS)
    assert HASTY_S <= time.monotonic() - started < HASTY_S + 10


def test_sender_without_receivers_says_how_far_each_has_come(background):
    sender, (first, _second) = joined(background, 2, HASTY_S)
    background(first.receive, CONTENTS)
    # Larger than any socket buffer, so that it cannot be sent into the void.
    large = FlatContents(("a.weight", "b.bias"), ((2, 3), (5_000_000,)), "float32")
    with pytest.raises(
        (PhaseTimeout, PeerDied), match=r"broadcast 0, a.weight .*broadcasts begun by engine worker: 1: 1, 2: 0"
    ):
        sender.send(large, torch.zeros(large.elements))


STANDING_SENDER = """
import time, torch
from megatron_entropic.weight_sync.gloo import FlatContents, GlooSender
sender = GlooSender("127.0.0.1", 1, 60.0, name="policy rank 3")
print(sender.address[1], flush=True)
sender.accept()
sender.send(FlatContents(("a.weight", "b.bias"), ((2, 3), (5,)), "float32"), torch.zeros(11))
print("sent", flush=True)
time.sleep(60)
"""


def test_a_sender_that_stands_still_is_named_within_the_limit():
    with subprocess.Popen([sys.executable, "-c", STANDING_SENDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        receiver = GlooReceiver(HOST, int(process.stdout.readline()), 1, 1, HASTY_S)
        stopped_at = []

        def stop_the_sender(_contents: FlatContents, _flat: torch.Tensor) -> None:
            assert process.stdout is not None
            assert process.stdout.readline() == "sent\n"
            process.send_signal(signal.SIGSTOP)
            stopped_at.append(time.monotonic())

        with pytest.raises(PhaseTimeout, match=r"publish: .*1.* engine worker.* waited .* for policy rank 3"):
            Arrivals([receiver], [[CONTENTS, CONTENTS]]).deliver(stop_the_sender)
        assert time.monotonic() - stopped_at[0] < HASTY_S + 10
        process.kill()


def test_receiver_of_a_sender_that_left_does_not_wait_for_the_limit(background):
    sender, (receiver,) = joined(background, 1)
    pending = background(receiver.receive, CONTENTS)
    time.sleep(0.2)
    started = time.monotonic()
    sender.close()
    with pytest.raises(PeerDied, match=r"broadcast 0.*engine worker 1 lost the sending policy rank"):
        pending.result()
    assert time.monotonic() - started < PATIENT_S / 2


@pytest.mark.parametrize(
    "other",
    [
        FlatContents(("a.weight", "c.bias"), ((2, 3), (5,)), "float32"),
        FlatContents(("a.weight", "b.bias"), ((3, 2), (5,)), "float32"),
        FlatContents(("a.weight", "b.bias"), ((2, 3), (5,)), "bfloat16"),
    ],
    ids=["name", "shape", "dtype"],
)
def test_receiver_refuses_what_it_does_not_expect(background, other):
    sender, (receiver,) = joined(background, 1, HASTY_S)
    sending = background(sender.send, CONTENTS, torch.zeros(CONTENTS.elements))
    with pytest.raises(ValueError, match="expected this, but the sender announces") as error:
        receiver.receive(other)
    assert other.describe() in str(error.value)
    assert CONTENTS.describe() in str(error.value)
    assert isinstance(sending.exception(), PhaseTimeout | None)


def test_both_sides_must_count_the_same_receivers(background):
    sender = GlooSender(HOST, 2, PATIENT_S)
    with pytest.raises(ValueError, match="the sender expects 2 engine workers, this is 1 of 4"):
        GlooReceiver(*sender.address, 1, 4, PATIENT_S)


def test_contents_of_vllm_lists():
    contents = FlatContents.of_update(["a.weight", "b.bias"], ["float32"] * 2, [[2, 3], [5]])
    assert contents == CONTENTS
    assert contents.update_info() == {
        "names": ["a.weight", "b.bias"],
        "dtype_names": ["float32", "float32"],
        "shapes": [[2, 3], [5]],
    }
    with pytest.raises(ValueError, match="one dtype"):
        FlatContents.of_update(["a", "b"], ["float32", "bfloat16"], [[1], [1]])
    with pytest.raises(ValueError, match="2 names, 1 dtypes and 2 shapes"):
        FlatContents.of_update(["a", "b"], ["float32"], [[1], [1]])
    with pytest.raises(ValueError, match="not a torch dtype"):
        _ = FlatContents(("a",), ((1,),), "sum").torch_dtype
