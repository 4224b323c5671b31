"""Low-rank adapters beside the parameters of a model: which there are, their shapes, and how ranks hold them.

    W [out, in] of q_proj        A [rank, in]    B [out, rank]        W + alpha/rank B A

Adapters belong to Hugging Face's matrices, as in peft. Where Megatron has several of those in one parameter (q, k, v;
gate and up), each has its own A and B beside it. Of a matrix that is cut along its outputs every tensor rank has its
rows of B and all of A; of one that is cut along its inputs, its columns of A and all of B. So a rank's part of B A is
the product of what it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.models.layouts import Layout, OutputShard, Replicated, RowShard
from megatron_entropic.models.parameter_map import Entry, ParameterMap

PEFT_PREFIX = "base_model.model."
"""What peft puts before the name of a module."""
_SUFFIX = "_adapter"


@dataclass(frozen=True)
class AdaptedMatrix:
    """One Hugging Face matrix with an adapter, a part of one Megatron parameter."""

    module: str
    """Last part of the module's name, such as q_proj."""
    hf_module: str
    """Whole name of the module, such as model.layers.0.self_attn.q_proj."""
    base: Entry
    """The Megatron parameter that the matrix is in."""
    part: int
    """Index of the matrix among those of the parameter."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the matrix."""
        rows, columns = self.base.hf_shapes[self.part]
        return rows, columns

    @property
    def cut_along_inputs(self) -> bool:
        """Whether tensor ranks have columns of the matrix, not rows."""
        return self.base.layout.partition_dim == 1


def adapted_matrices(parameter_map: ParameterMap, lora: LoraConfig) -> Iterator[AdaptedMatrix]:
    """Yields the matrices that get adapters, in the order of the forward pass."""
    for entry in parameter_map.entries:
        if entry.layer is None or len(entry.shape) != 2:
            continue
        for part, name in enumerate(entry.hf_names):
            hf_module = name.removesuffix(".weight")
            module = hf_module.rpartition(".")[2]
            if module in lora.target_modules:
                yield AdaptedMatrix(module, hf_module, entry, part)


def adapter_name(base_name: str) -> str:
    """Megatron name of the module that holds the adapters of a parameter, global or local as that is.

    decoder.layers.0.mlp.linear_fc1.weight -> decoder.layers.0.mlp.linear_fc1_adapter
    """
    return base_name.removesuffix(".weight") + _SUFFIX


def is_adapter(megatron_name: str) -> bool:
    """Whether a Megatron name is that of an adapter's matrix."""
    return megatron_name.rpartition(".")[0].endswith(_SUFFIX)


def adapter_map(parameter_map: ParameterMap, lora: LoraConfig) -> ParameterMap:
    """The matrices A and B of a model's adapters, by Megatron's names and by peft's."""
    entries = []
    for matrix in adapted_matrices(parameter_map, lora):
        rows, columns = matrix.shape
        whole, cut = Replicated(()), RowShard(()) if matrix.cut_along_inputs else OutputShard(())
        layouts: tuple[Layout, Layout] = (cut, whole) if matrix.cut_along_inputs else (whole, cut)
        for letter, shape, layout in zip("AB", ((lora.rank, columns), (rows, lora.rank)), layouts, strict=True):
            entries.append(
                Entry(
                    megatron_name=f"{adapter_name(matrix.base.megatron_name)}.{matrix.module}_{letter.lower()}",
                    hf_names=(f"{PEFT_PREFIX}{matrix.hf_module}.lora_{letter}.weight",),
                    hf_shapes=(shape,),
                    layout=layout,
                    shape=shape,
                    layer=matrix.base.layer,
                )
            )
    return ParameterMap(parameter_map.dimensions, entries)
