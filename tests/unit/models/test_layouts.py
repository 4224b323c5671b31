"""Every layout moves values without loss, in both directions and over any number of TP ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.layouts import (
    ColumnShard,
    Layout,
    QkvInterleaved,
    Replicated,
    RowShard,
    VocabularyShard,
    slice_for_rank,
    write_slice,
)

LAYOUTS: dict[str, Layout] = {
    "replicated": Replicated(("hidden",)),
    "row": RowShard(("hidden", "query")),
    "vocabulary": VocabularyShard(("vocab", "hidden")),
    "column": ColumnShard(("ffn",), "hidden"),
    "gate_up": ColumnShard(("ffn", "ffn"), "hidden"),
    "qkv": QkvInterleaved("hidden"),
    "qkv_bias": QkvInterleaved(None),
}


def dimensions(groups: int = 4, ratio: int = 3, head: int = 5, hidden: int = 7, ffn: int = 8, vocab: int = 13):
    return ModelDimensions(
        family="qwen3",
        num_layers=4,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * ratio,
        num_query_groups=groups,
        head_dim=head,
        vocab_size=vocab,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        rope_theta=1e4,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
    )


@st.composite
def drawn_dimensions(draw: st.DrawFn) -> ModelDimensions:
    """Any sizes that TP 1, 2 and 4 allow; the vocabulary may leave whole ranks empty."""
    small = st.integers(1, 5)
    return dimensions(
        groups=4 * draw(st.integers(1, 2)),
        ratio=draw(small),
        head=draw(small),
        hidden=draw(small),
        ffn=4 * draw(small),
        vocab=draw(st.integers(1, 17)),
    )


def random_bits(layout: Layout, dims: ModelDimensions, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Tensors of arbitrary bit patterns, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    ints, low, high = (torch.int16, -(2**15), 2**15) if dtype == torch.bfloat16 else (torch.int32, -(2**31), 2**31)
    return [
        torch.randint(low, high, shape, generator=generator).to(ints).view(dtype) for shape in layout.hf_shapes(dims)
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    ints = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(ints), b.contiguous().view(ints))


def shards_of(layout: Layout, dims: ModelDimensions, parts: list[torch.Tensor], tp: int) -> list[torch.Tensor]:
    return [
        layout.combine(dims, [slice_for_rank(part, layout.partition_dim, rank, tp) for part in parts])
        for rank in range(tp)
    ]


def hf_of(layout: Layout, dims: ModelDimensions, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    separated = [layout.separate(dims, shard) for shard in shards]
    tensors = [torch.empty(shape, dtype=shards[0].dtype) for shape in layout.hf_shapes(dims)]
    for index, tensor in enumerate(tensors):
        for rank, parts in enumerate(separated):
            write_slice(tensor, parts[index], layout.partition_dim, rank, len(shards))
    return tensors


@pytest.mark.parametrize("name", LAYOUTS)
@settings(deadline=None, max_examples=25)
@given(dims=drawn_dimensions(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**16))
def test_round_trip_over_tensor_parallel_sizes_is_bit_exact(
    name: str, dims: ModelDimensions, dtype: torch.dtype, seed: int
):
    layout = LAYOUTS[name]
    parts = random_bits(layout, dims, dtype, seed)
    full = shards_of(layout, dims, parts, 1)[0]
    for tp in (1, 2, 4):
        shards = shards_of(layout, dims, parts, tp)
        assert len({shard.shape for shard in shards}) == 1
        back = hf_of(layout, dims, shards)
        assert all(same_bits(a, b) for a, b in zip(parts, back, strict=True))
        # Gathering over any size gives the one unsharded Megatron tensor.
        assert same_bits(full, layout.combine(dims, back))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_qkv_rows_are_grouped_per_query_group_and_split_by_groups(tp: int):
    """Rows written as (matrix, head, element), against an interleaving spelt out row by row."""
    dims = dimensions(groups=4, ratio=3, head=5)
    rows = {"q": 12 * 5, "k": 4 * 5, "v": 4 * 5}
    offset = {"q": 0, "k": 1000, "v": 2000}
    parts = [(torch.arange(rows[x]) + offset[x]).unsqueeze(1).expand(-1, 7).float() for x in "qkv"]
    expected = []
    for group in range(4):
        expected += [offset["q"] + head * 5 + d for head in range(group * 3, group * 3 + 3) for d in range(5)]
        expected += [offset[x] + group * 5 + d for x in "kv" for d in range(5)]
    shards = shards_of(QkvInterleaved("hidden"), dims, parts, tp)
    assert [shard.shape for shard in shards] == [(100 // tp, 7)] * tp
    assert torch.cat(shards)[:, 0].int().tolist() == expected
    bias_shards = shards_of(QkvInterleaved(None), dims, [part[:, 0] for part in parts], tp)
    assert torch.cat(bias_shards).int().tolist() == expected


def test_a_rank_holds_its_rows_of_gate_then_its_rows_of_up():
    dims = dimensions(ffn=8, hidden=1)
    gate, up = torch.arange(8.0).unsqueeze(1), torch.arange(100.0, 108.0).unsqueeze(1)
    shards = shards_of(ColumnShard(("ffn", "ffn"), "hidden"), dims, [gate, up], 2)
    assert shards[0].flatten().tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert shards[1].flatten().tolist() == [4, 5, 6, 7, 104, 105, 106, 107]


def test_row_shard_cuts_the_input_axis():
    dims = dimensions(groups=2, ratio=1, head=2, hidden=3)
    weight = torch.arange(12.0).reshape(3, 4)
    shards = shards_of(RowShard(("hidden", "query")), dims, [weight], 2)
    assert torch.equal(shards[1], weight[:, 2:])


def test_vocabulary_is_padded_with_zero_rows_even_over_whole_ranks():
    dims = dimensions(vocab=5, hidden=2)
    weight = torch.arange(1.0, 11.0).reshape(5, 2)
    shards = shards_of(VocabularyShard(("vocab", "hidden")), dims, [weight], 4)
    assert dims.padded_vocab_size(4) == 8
    padded = torch.cat(shards)
    assert padded.shape == (8, 2)
    assert torch.equal(padded[:5], weight)
    assert torch.count_nonzero(padded[5:]) == 0


def test_slices_are_views_so_that_loading_reads_only_a_rank_s_part():
    weight = torch.arange(40.0).reshape(8, 5)
    piece = slice_for_rank(weight, 0, 1, 4)
    assert piece.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (8, ["exceeds the model's 4 key/value heads"]),
        (3, ["attention heads (10)", "key/value heads (5)", "feed-forward width (8)"]),
    ],
)
def test_impossible_tensor_parallel_sizes_are_refused_with_every_reason(tp: int, words: list[str]):
    dims = dimensions(groups=4, ratio=3) if tp == 8 else dimensions(groups=5, ratio=2)
    with pytest.raises(ValueError, match="cannot be laid out") as error:
        dims.check_parallel(tp)
    for word in words:
        assert word in str(error.value)
