"""Blocks are taken again when nobody looks at them, and never before."""

from __future__ import annotations

import torch

from megatron_entropic.weight_sync.shared_memory import FlatMemory


def test_memory_is_taken_again_when_the_last_view_is_gone():
    memory = FlatMemory()
    first = memory.take(1000, torch.float32)
    address, view = first.data_ptr(), first[10:20].view(2, 5)
    del first
    assert memory.take(1000, torch.float32).data_ptr() != address
    del view
    again = memory.take(1500, torch.bfloat16)
    assert (again.data_ptr(), again.shape, again.dtype) == (address, (1500,), torch.bfloat16)


def test_tensors_that_are_held_keep_their_values():
    memory = FlatMemory()
    held = []
    for value in range(20):
        taken = memory.take(100 + value % 3, torch.float32).fill_(value)
        if value % 2:
            held.append(taken[:50])
    assert [float(tensor.unique()) for tensor in held] == list(range(1, 20, 2))


def test_the_smallest_free_block_is_taken_and_small_ones_are_dropped_for_a_larger():
    memory = FlatMemory()
    small, large = memory.take(10, torch.float32), memory.take(100, torch.float32)
    small_address, large_address = small.data_ptr(), large.data_ptr()
    del small, large
    first = memory.take(10, torch.float32)
    assert first.data_ptr() == small_address
    assert memory.take(20, torch.float32).data_ptr() == large_address
    del first
    whole = memory.take(1000, torch.float32)
    assert whole.data_ptr() not in {small_address, large_address}
