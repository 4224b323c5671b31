"""Packed micro-batches on a GPU that is not there: attention, RoPE, context parallelism, router replay, loss.

Tensors are fake: shapes, dtypes and devices are checked by every operation, nothing is computed, and what would have to
look at a value on the host raises. Collectives go through torch's fake process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_entropic.policy.batch.microbatch import MicroBatch, PackingRules, pack_one
from megatron_entropic.policy.batch.segments import ContextCut
from megatron_entropic.policy.megatron.rotary import apply_rotary_packed
from megatron_entropic.policy.model.attention import SegmentedAttention, packed_segments
from megatron_entropic.policy.model.output_head import gather_tokens
from megatron_entropic.policy.model.router_replay import ReplayedChoice, with_choices
from megatron_entropic.types import Sequence

CUDA = torch.device("cuda", 0)
LENGTHS = ((3, 17), (5, 2), (40, 33))
HEADS, KEY_HEADS, WIDTH = 8, 2, 64
LAYERS, EXPERTS, CHOSEN = 3, 60, 4


@pytest.fixture(params=[1, 2], ids=["whole", "two context ranks"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Context-parallel ranks, this one the first; tensors within the test are fake."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a driver, as does the next
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield request.param
    dist.destroy_process_group()


def packed(size: int, *, experts: bool = False) -> MicroBatch:
    """Three sequences and a padding tail, as a run packs them: of real tensors."""
    with torch._C._DisableTorchDispatch():
        sequences = [
            Sequence(
                torch.arange(prompt + response),
                prompt,
                experts=torch.zeros(prompt + response, LAYERS, CHOSEN, dtype=torch.uint8) if experts else None,
            )
            for prompt, response in LENGTHS
        ]
        rules = PackingRules(token_multiple=4, cut=ContextCut(0, size))
        micro_batch = pack_one(sequences, [0, 1, 2], rules)
        return with_choices(micro_batch, parallel(size)) if experts else micro_batch


def parallel(size: int) -> Any:
    """This rank's place."""
    world = dist.group.WORLD
    return SimpleNamespace(
        packing=PackingRules(token_multiple=4, cut=ContextCut(0, size)),
        tensor_size=1,
        tensor_rank=0,
        context_group=world,
        model_group=world,
    )


def heads(micro_batch: MicroBatch, count: int) -> torch.Tensor:
    """[T, count, width] on the GPU."""
    return torch.empty(micro_batch.tokens.numel(), count, WIDTH, device=CUDA, dtype=torch.bfloat16)


def test_attention_and_rope_run_where_the_queries_are(size: int) -> None:
    micro_batch = packed(size).to(CUDA)
    config: Any = SimpleNamespace(context_parallel_size=size, attention_dropout=0.0, kv_channels=WIDTH)
    groups = SimpleNamespace(cp=dist.group.WORLD)
    attention = SegmentedAttention(config, 1, None, pg_collection=groups)
    query, key, value = heads(micro_batch, HEADS), heads(micro_batch, KEY_HEADS), heads(micro_batch, KEY_HEADS)
    freqs = torch.empty(micro_batch.max_seqlen, 1, 1, WIDTH, device=CUDA)
    query = apply_rotary_packed(query, micro_batch.cu_seqlens, freqs, cp_group=parallel(size).context_group)
    parameters = packed_segments(micro_batch)
    for _ in range(2):
        result = attention(query, key, value, None, parameters)
    assert result.shape == (micro_batch.tokens.numel(), HEADS * WIDTH)
    assert (result.device, result.dtype) == (CUDA, torch.bfloat16)
    assert parameters.plan is not None
    assert parameters.plan.order.device == CUDA, "moved once, for all layers"


def test_statistics_of_all_context_ranks_come_together(size: int) -> None:
    micro_batch = packed(size).to(CUDA)
    own = torch.empty(2, micro_batch.targets.numel(), device=CUDA)
    owned = torch.arange(own.shape[1], device=CUDA) if micro_batch.owned is None else micro_batch.owned
    gathered = gather_tokens(own, owned, micro_batch.response_tokens, parallel(size).context_group)
    assert gathered.shape == (2, sum(response for _, response in LENGTHS))
    assert gathered.device == CUDA


def test_replayed_choices_travel_with_their_tokens(size: int) -> None:
    micro_batch = packed(size, experts=True).to(CUDA)
    assert micro_batch.choices is not None
    assert micro_batch.choices.shape == (micro_batch.tokens.numel(), LAYERS, CHOSEN)
    choice = ReplayedChoice()
    choice.choices = micro_batch.choices[:, 1]
    scores = torch.empty(micro_batch.tokens.numel(), EXPERTS, device=CUDA)
    values, chosen = choice.get_replay_topk(scores, CHOSEN, None, None, lambda s, k, *_: torch.topk(s, k, dim=1))
    assert values.device == chosen.device == CUDA
    assert choice.differing is not None
    assert choice.differing.device == CUDA
