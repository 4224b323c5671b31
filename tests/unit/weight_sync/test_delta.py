"""Deltas and checksums: exact over many optimizer steps, and no difference goes unnoticed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_entropic.weight_sync.checksums import Piece, checksum, checksums, mismatches
from megatron_entropic.weight_sync.delta import Delta, bitmap_bytes, bits_of
from megatron_entropic.weight_sync.gloo import FlatContents, GlooReceiver, GlooSender

HOST = "127.0.0.1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [1, 7, 8, 1001])
def test_a_delta_gives_the_new_bytes(dtype: torch.dtype, elements: int):
    generator = torch.Generator().manual_seed(elements)
    last = torch.randn(elements, generator=generator).to(dtype)
    new = last.clone()
    new[torch.rand(elements, generator=generator) < 0.3] *= 1.5
    new[0] = float("nan")
    delta = Delta.between(last, new)
    assert delta.bitmap.numel() == bitmap_bytes(elements)
    assert delta.changed == int((bits_of(last) != bits_of(new)).sum())
    delta.apply_to(last)
    assert torch.equal(bits_of(last), bits_of(new))


def test_signs_of_zero_and_payloads_of_nan_are_changes():
    last, new = torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([-0.0, float("nan"), 1.0])
    bits_of(new)[1] += 1
    delta = Delta.between(last, new)
    assert delta.changed == 2
    delta.apply_to(last)
    assert torch.equal(bits_of(last), bits_of(new))


def test_deltas_of_many_bf16_steps_arrive_bit_for_bit_and_are_small():
    """AdamW at 1e-6 with float32 master weights, published after each of 30 steps."""
    generator = torch.Generator().manual_seed(1)
    master = torch.nn.Parameter(0.02 * torch.randn(200_003, generator=generator))
    optimizer = torch.optim.AdamW([master], lr=1e-6)
    contents = FlatContents(("w", "b"), ((200, 1000), (3,)), "bfloat16")
    sender = GlooSender(HOST, 1, 60.0, delta=True)
    fractions = []
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(GlooReceiver, *sender.address, 1, 1, 60.0)
        sender.accept()
        receiver = joining.result()
        for _ in range(30):
            flat = master.detach().bfloat16()
            pending = threads.submit(receiver.receive, contents)
            fractions.append(sender.send(contents, flat) / contents.elements)
            assert torch.equal(bits_of(pending.result()), bits_of(flat))
            master.grad = torch.randn(master.shape, generator=generator)
            optimizer.step()
        unchanged = threads.submit(receiver.receive, contents)
        assert sender.send(contents, flat) == 0
        assert torch.equal(bits_of(unchanged.result()), bits_of(flat))
    assert fractions[0] == 1
    assert 0 < max(fractions[1:]) < 0.1


def test_checksums_of_pieces_add_up_and_tell_every_difference():
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(2100, 1030, generator=generator)
    wanted = checksum(whole)
    rows = checksum(whole[:900]) + checksum(whole[900:], row=900)
    columns = checksum(whole[:, :7], columns=1030) + checksum(whole[:, 7:], column=7, columns=1030)
    for total in (rows, columns):
        assert (total - wanted) % 2**64 == 0
    changed = whole.clone()
    bits_of(changed)[1234, 567] ^= 1
    swapped = whole.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len({wanted, checksum(changed), checksum(swapped), checksum(whole.t().contiguous())}) == 4
    assert checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([-0.0, 1.0]))


def test_mismatches_name_tensor_and_engine():
    tensors = {name: torch.full((4, 2), float(i)) for i, name in enumerate("abcd")}
    sent = checksums(tensors.items())
    whole = [Piece(name, 0, 0, sent[name]) for name in "abcd"]
    halves = [
        Piece("a", 0, 0, checksum(tensors["a"][:2])),
        Piece("a", 2, 0, checksum(tensors["a"][2:], row=2)),
        *whole[1:],
        whole[1],
    ]
    assert mismatches(sent, {"engine 0": whole, "engine 1": halves}) == []
    wrong = [Piece("a", 0, 0, sent["a"] + 1), whole[1], Piece("b", 0, 0, 5), whole[2], Piece("e", 0, 0, 1)]
    assert mismatches(sent, {"engine 1": wrong}) == [
        "a: engine 1 holds other values than were sent",
        "b: the workers of engine 1 hold different copies",
        "d: not found in engine 1",
        "e: in engine 1, but was not sent",
    ]
