"""What megatron-core's distributed checkpoints call the parameters of a GPTModel.

A checkpoint holds unsharded tensors; layers and experts are either leading axes of one tensor or numbers in its name:

    decoder.layers.REST               [layers, ...]           all layers alike (the default of dense models)
    decoder.layers.N.REST             [...]                   layers of several kinds
    mlp.experts.experts.linear_fc1    [..., experts, ...]     in either
    mlp.experts.experts.N.linear_fc1  [...]                   with the option singleton_local_shards, which also splits
    mlp.linear_fc1.weight_w, _v                               gate and up projection

Norms before a linear layer have the names that Transformer Engine's fused layers give them; megatron-core's other
layer specs translate theirs when saving. Where experts follow, only those specs use the fused name: with Transformer
Engine the norm stands alone. Under latent attention they translate nothing, and the norm before attention stands alone
with both; this project's layers translate the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.layouts import Shape
from megatron_entropic.models.parameter_map import Entry

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.\d+\.")
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_FUSED_LATENT = {
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
"""Under latent attention."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: in tensor `key`, below leading axes of lengths `axes` at the indices `index`."""

    key: str
    axes: Shape = ()
    index: tuple[int, ...] = ()
    first_row: int = 0
    """Row of the parameter that is row 0 here; not 0 only for the second half of a split pair."""

    def shape(self, entry: Entry) -> Shape:
        """Of the stored tensor, without padding of the vocabulary."""
        return (*self.axes, *entry.shape)


def places_to_write(entry: Entry, dimensions: ModelDimensions) -> tuple[Place, ...]:
    """Where a new checkpoint has a parameter, as megatron-core itself saves a model of these dimensions.

    More than one place for norms that layer specs name differently, so that each finds it under its own name.
    """
    stacked = dimensions.experts is None
    wanted = _by_spec(entry, dimensions)
    return tuple(place for place in possible_places(entry, dimensions, stacked=stacked) if place.key.endswith(wanted))


def _by_spec(entry: Entry, dimensions: ModelDimensions) -> tuple[str, ...]:
    """Last parts of the names under which megatron-core's specs look for the parameter."""
    rest = _LAYER.sub("", entry.megatron_name)
    if entry.expert is not None:
        return ("mlp.experts.experts." + _EXPERT.sub("", rest),)
    fused = _fused(dimensions)
    if entry.layer is None or rest not in fused:
        return (rest,)
    before_experts = rest == "pre_mlp_layernorm.weight" and dimensions.has_experts(entry.layer)
    if dimensions.latent is not None:
        return (rest,) if before_experts else (fused[rest], rest)
    return (fused[rest], rest) if before_experts else (fused[rest],)


def _fused(dimensions: ModelDimensions) -> dict[str, str]:
    """Names of norms -> those in Transformer Engine's fused layers."""
    return _FUSED if dimensions.latent is None else _FUSED_LATENT


def possible_places(entry: Entry, dimensions: ModelDimensions, *, stacked: bool | None = None) -> Iterator[Place]:
    """Every single tensor that can hold the whole parameter; with layers as axis (`stacked`), numbered, or both."""
    if entry.layer is None:
        yield Place(entry.megatron_name)
        return
    rest, fused = _LAYER.sub("", entry.megatron_name), _fused(dimensions)
    forms: list[tuple[str, Shape, tuple[int, ...]]] = []
    if stacked is not False:
        forms.append(("decoder.layers.", (dimensions.num_layers,), (entry.layer,)))
    if stacked is not True:
        forms.append((f"decoder.layers.{entry.layer}.", (), ()))
    for prefix, axes, index in forms:
        if entry.expert is None:
            for name in (fused.get(rest, rest), *([rest] if rest in fused else [])):
                yield Place(prefix + name, axes, index)
        else:
            name = _EXPERT.sub("", rest)
            experts = dimensions.size("experts")
            yield Place(f"{prefix}mlp.experts.experts.{name}", (*axes, experts), (*index, entry.expert))
            yield Place(f"{prefix}mlp.experts.experts.{entry.expert}.{name}", axes, index)


def split_pairs(entry: Entry, dimensions: ModelDimensions) -> Iterator[tuple[Place, Place]]:
    """Every pair of tensors that can hold gate and up projection apart; nothing for other parameters."""
    if not entry.megatron_name.endswith("linear_fc1.weight"):
        return
    for place in possible_places(entry, dimensions):
        gate, up = (Place(f"{place.key}_{half}", place.axes, place.index) for half in "wv")
        yield gate, Place(up.key, up.axes, up.index, first_row=entry.hf_shapes[0][0])
