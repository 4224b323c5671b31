"""The one map between Megatron parameters and Hugging Face tensors of a model.

Bijective by construction: every Hugging Face tensor belongs to exactly one exported entry, and a layout moves values
in both directions by one definition. Loading, publishing and export are derived from it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.families import ARCHITECTURES, Row
from megatron_entropic.models.layouts import Layout, Shape, slice_for_rank, write_slice
from megatron_entropic.models.stages import PipelineStages

# Transformer Engine's layer specs fuse a norm into the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
_LAYER_PREFIX = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.local_experts\.)(\d+)(?=\.)")
# Transformer Engine's grouped layer holds the experts' matrices as numbered parameters of one module.
_GROUPED_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
_OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter, or buffer, of the unsharded model."""

    megatron_name: str
    """Name in megatron-core, with the global layer number, counted over all pipeline stages."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    layout: Layout
    shape: Shape
    """Shape of the Megatron parameter before sharding and padding."""
    layer: int | None
    """Global layer number; None outside the layers."""
    expert: int | None = None
    """Global number of the expert within its layer, if it is an expert's: sharded over expert tensor ranks then."""
    exported: bool = True
    """Whether it is exported: not so a tied output layer, which is a copy of the embedding; the embedding is."""
    buffer: bool = False
    """Whether it is a float32 buffer, whatever the dtype of the parameters."""


def to_global_name(local_name: str, first_layer: int, first_expert: int = 0) -> str:
    """Name of a rank's parameter (layers and experts counted from 0) in the whole model.

    `first_layer` is the global number of the pipeline stage's layer 0, `first_expert` that of the expert-parallel
    rank's expert 0. Experts in Transformer Engine's grouped layer get the names of separate ones. Other names pass
    unchanged.
    """
    name = _LAYER_PREFIX.sub(lambda match: f"decoder.layers.{int(match[1]) + first_layer}.", local_name)
    name = _GROUPED_EXPERT.sub(r".mlp.experts.local_experts.\2.\1.weight", name)
    return _EXPERT.sub(lambda match: str(int(match[1]) + first_expert), name)


def to_local_name(global_name: str, first_layer: int, first_expert: int = 0) -> str:
    """Inverse of `to_global_name`, for experts that are separate modules."""
    return to_global_name(global_name, -first_layer, -first_expert)


class ParameterMap:
    """All parameters of one model, in the order of the forward pass.

    Args:
        entries: parameters beside the model's own that are mapped instead, such as adapters'; None: the model's.
    """

    def __init__(self, dimensions: ModelDimensions, entries: Iterable[Entry] | None = None) -> None:
        self.dimensions = dimensions
        self.entries: tuple[Entry, ...] = tuple(_entries(dimensions) if entries is None else entries)
        self._by_name = {entry.megatron_name: entry for entry in self.entries}
        self.hf_tensors: dict[str, Shape] = {
            name: shape
            for entry in self.entries
            if entry.exported
            for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
        }
        """Name and shape of every tensor of the Hugging Face checkpoint (a tied one has no lm_head.weight)."""
        self.buffers = frozenset(name for entry in self.entries if entry.buffer for name in entry.hf_names)
        """Names of those Hugging Face tensors that are buffers, not parameters."""

    def by_megatron_name(self, name: str) -> Entry:
        """Entry of a global Megatron name; norms may be named as Transformer Engine fuses them.

        Raises:
            KeyError: the model has no such parameter.
        """
        prefix = _LAYER_PREFIX.match(name)
        if prefix is not None:
            rest = name[prefix.end() :]
            name = prefix[0] + _FUSED_NORMS.get(rest, rest)
        if name not in self._by_name:
            raise KeyError(f"{name}: no such parameter in a {self.dimensions.family} model")
        return self._by_name[name]

    def is_buffer(self, name: str) -> bool:
        """Whether a global Megatron name is that of a buffer whose values the checkpoint holds."""
        return name in self._by_name and self._by_name[name].buffer

    def stage_of(self, entry: Entry, stages: PipelineStages) -> int:
        """Pipeline stage that owns a parameter: that of its layer, embedding first, final norm and output last."""
        if entry.layer is not None:
            return stages.place(entry.layer)[0]
        return 0 if entry.megatron_name == self.entries[0].megatron_name else stages.count - 1

    def chunk_of(self, entry: Entry, stages: PipelineStages) -> int:
        """Index of the chunk, among its stage's, that a parameter belongs to; see `stage_of`."""
        if entry.layer is not None:
            return stages.place(entry.layer)[1]
        return 0 if entry.megatron_name == self.entries[0].megatron_name else stages.chunks - 1

    def entries_of_stage(self, stage: int, stages: PipelineStages) -> tuple[Entry, ...]:
        """Parameters that a stage's GPTModels hold.

        With tied embeddings the output layer is a parameter of its own only where the last stage is not the first.
        """
        layers = set(stages.of_stage(stage))
        return tuple(
            entry
            for entry in self.entries
            if (entry.layer in layers if entry.layer is not None else self.stage_of(entry, stages) == stage)
            and (entry.exported or stages.count > 1)
        )

    def expert_rank(self, entry: Entry, expert_parallel: int) -> int:
        """Expert-parallel rank that owns an expert's parameter: equal runs of experts, as in megatron-core."""
        assert entry.expert is not None
        assert self.dimensions.experts is not None
        return entry.expert // (self.dimensions.experts.count // expert_parallel)

    def first_expert(self, expert_rank: int, expert_parallel: int) -> int:
        """Global number of an expert-parallel rank's expert 0; 0 for dense models."""
        self.dimensions.check_parallel(1, expert_parallel=expert_parallel)
        experts = self.dimensions.experts
        return 0 if experts is None else expert_rank * (experts.count // expert_parallel)

    def shard_shape(self, entry: Entry, tp_size: int) -> Shape:
        """Shape of the parameter on each of `tp_size` ranks, padding included; for experts' entries, of
        `tp_size` expert tensor ranks.

        Raises:
            ValueError: the model cannot be laid out over `tp_size` ranks.
        """
        self._check_tensor_parallel(entry, tp_size)
        if entry.layout.partition_dim is None:
            return entry.shape
        shape = list(entry.shape)
        shape[entry.layout.partition_dim] = -(-shape[entry.layout.partition_dim] // tp_size)
        return tuple(shape)

    def to_megatron_shard(self, entry: Entry, hf: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> Tensor:
        """One rank's parameter from Hugging Face tensors; only this rank's slices are read.

        The result may be a view of the tensors in `hf` (copy it, never write to it); dtype is theirs.

        Raises:
            ValueError: the model cannot be laid out over `tp_size` ranks.
        """
        self._check_tensor_parallel(entry, tp_size)
        dim = entry.layout.partition_dim
        parts = [slice_for_rank(hf[name], dim, tp_rank, tp_size) for name in entry.hf_names]
        return entry.layout.combine(self.dimensions, parts)

    def write_to_hf(self, entry: Entry, shard: Tensor, hf: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> None:
        """Put one TP rank's parameter into the entry's tensors in `hf`; with all ranks' they are complete.

        Padding is dropped; values are copied once, into the tensors' dtype.

        Raises:
            ValueError: the model cannot be laid out over `tp_size` ranks.
        """
        self._check_tensor_parallel(entry, tp_size)
        parts = entry.layout.separate(self.dimensions, shard)
        for name, part in zip(entry.hf_names, parts, strict=True):
            write_slice(hf[name], part, entry.layout.partition_dim, tp_rank, tp_size)

    def _check_tensor_parallel(self, entry: Entry, size: int) -> None:
        if entry.expert is None:
            self.dimensions.check_parallel(size, expert_tensor_parallel=1)
        else:
            self.dimensions.check_parallel(1, expert_tensor_parallel=size)


def _entries(dimensions: ModelDimensions) -> list[Entry]:
    """Entries of the rows before, in and after the layers, in table order."""
    rows = ARCHITECTURES[dimensions.family].rows
    in_layers = [row for row in rows if row.per_layer]
    first = rows.index(in_layers[0])
    assert rows[first : first + len(in_layers)] == tuple(in_layers), "rows of a layer stand together"
    entries = [_entry(row, dimensions, None) for row in rows[:first]]
    latent = dimensions.latent
    absent_query = "direct" if latent is not None and latent.query_rank is not None else "latent"
    for layer in range(dimensions.num_layers):
        absent = "dense" if dimensions.has_experts(layer) else "sparse"
        present = [row for row in in_layers if row.layers != absent and row.query != absent_query]
        for per_expert, some in itertools.groupby(present, key=lambda row: row.per_expert):
            entries += _layer_entries(list(some), dimensions, layer, per_expert)
    return entries + [_entry(row, dimensions, None) for row in rows[first + len(in_layers) :]]


def _layer_entries(rows: list[Row], dimensions: ModelDimensions, layer: int, per_expert: bool) -> list[Entry]:
    """Entries of one layer; those of experts are repeated, all of one expert before the next, as megatron-core does."""
    if not per_expert:
        return [_entry(row, dimensions, layer) for row in rows]
    return [_entry(row, dimensions, layer, expert) for expert in range(dimensions.size("experts")) for row in rows]


def _entry(row: Row, dimensions: ModelDimensions, layer: int | None, expert: int | None = None) -> Entry:
    """Entry of a row, with its numbers and sizes filled in."""
    tied_output = dimensions.tie_word_embeddings and row.megatron == _OUTPUT_LAYER
    hf_names = ARCHITECTURES[dimensions.family].rows[0].hf if tied_output else row.hf
    hf_shapes = row.layout.hf_shapes(dimensions)
    return Entry(
        megatron_name=row.megatron.format(layer=layer, expert=expert),
        hf_names=tuple(name.format(layer=layer, expert=expert) for name in hf_names),
        hf_shapes=hf_shapes,
        layout=row.layout,
        # Every layout with several tensors stacks them along axis 0.
        shape=(sum(shape[0] for shape in hf_shapes), *hf_shapes[0][1:]),
        layer=layer,
        expert=expert,
        exported=not tied_output,
        buffer=row.buffer,
    )
