"""Layers of every pipeline stage, equal and unequal, as megatron-core shares them out."""

from __future__ import annotations

import pytest
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_entropic.models.stages import StageSizes

ALLOWED = [
    (4, StageSizes()),
    (8, StageSizes(4)),
    (8, StageSizes(2, 2)),
    (94, StageSizes(8, 1, 11, 11)),
    (61, StageSizes(16, 1, 3, 2)),
    (61, StageSizes(4, 1, None, 13)),
    (7, StageSizes(3, 1, 1)),
    (5, StageSizes(2, 1, 3, 2)),
    (16, StageSizes(4, 2, 2, 2)),
    (12, StageSizes(3, 2, None, 4)),
]


@pytest.mark.parametrize(("layers", "sizes"), ALLOWED, ids=str)
def test_stages_are_those_of_megatron(layers: int, sizes: StageSizes) -> None:
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=sizes.stages,
        virtual_pipeline_model_parallel_size=sizes.chunks if sizes.chunks > 1 else None,
        num_layers_in_first_pipeline_stage=sizes.first_layers,
        num_layers_in_last_pipeline_stage=sizes.last_layers,
        pipeline_dtype="bfloat16",
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )
    stages = sizes.of_layers(layers)
    for stage in range(sizes.stages):
        for chunk in range(sizes.chunks):
            number = chunk if sizes.chunks > 1 else None
            found = stages.of_chunk(stage, chunk)
            assert found.start == get_transformer_layer_offset(config, number, stage)
            assert len(found) == get_num_layers_to_build(config, number, stage)
            assert all(stages.place(layer) == (stage, chunk) for layer in found)
    assert sorted(layer for stage in range(sizes.stages) for layer in stages.of_stage(stage)) == list(range(layers))


@pytest.mark.parametrize(
    ("layers", "sizes", "words"),
    [
        (94, StageSizes(8), "pipeline_parallel=8 does not divide the 94 layers: give the first or the last stage"),
        (8, StageSizes(2, 3), "virtual_pipeline_parallel=3 x pipeline_parallel=2 does not divide the 8 layers"),
        (8, StageSizes(1, 1, 4), "first_stage_layers=4 needs pipeline_parallel > 1"),
        (94, StageSizes(8, 1, 11, 12), "leave 71, which pipeline_parallel's other 6 stages cannot share"),
        (5, StageSizes(2, 1, 2, 2), "first_stage_layers=2 and last_stage_layers=2 of 5 layers leave 1 for the other 0"),
        (4, StageSizes(3, 1, None, 3), "last_stage_layers=3 of 4 layers leave 1 for the other 2 stages"),
        (12, StageSizes(2, 2, 4, 8), "needs a stage between the first and the last"),
        (14, StageSizes(4, 2, 3, 3), "virtual_pipeline_parallel=2 does not divide first_stage_layers=3"),
    ],
)
def test_layers_that_cannot_be_shared_out_are_refused(layers: int, sizes: StageSizes, words: str) -> None:
    with pytest.raises(ValueError, match="this model cannot be laid out") as error:
        sizes.of_layers(layers)
    assert words in str(error.value)
