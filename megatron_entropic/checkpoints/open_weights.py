"""The parameters of one model in a distributed checkpoint, by the map's rows or by their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.checkpoints.torch_dist import Place, TorchDistReader, possible_places, split_pairs
from megatron_entropic.errors import Problems, UserError
from megatron_entropic.models.adapters import is_adapter
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.layouts import VocabularyShard
from megatron_entropic.models.parameter_map import Entry, ParameterMap

_EMBEDDING = "embedding.word_embeddings.weight"
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(optimizer|chained_\d+|opt_param_scheduler|rng|rng_state|rerun_state_machine_state)(\.|/|$)"
)
_BUFFERS = (".inv_freq", "._extra_state")


class MegatronCheckpoint:
    """Weights of a checkpoint, whoever wrote it: a conversion, a run, or another Megatron training script.

    Opening it finds every parameter of the model in the metadata. Optimizer state and random state are passed over; all
    names may stand behind a common prefix such as `model.`; the vocabulary may be padded.

    Raises:
        UserError: from `TorchDistReader`, or one error that lists every missing, unexpected or wrongly shaped tensor.
    """

    def __init__(self, directory: Path, parameter_map: ParameterMap) -> None:
        self.directory = Path(directory)
        self.parameter_map = parameter_map
        self._reader = TorchDistReader(self.directory)
        self._prefix = self._find_prefix()
        self._places: dict[str, tuple[Place, ...]] = {}
        problems = Problems()
        used: set[str] = set()
        for entry in parameter_map.entries:
            if entry.exported:
                used |= self._find(entry, problems)
        for name in self._reader.tensors:
            if name not in used and not _NOT_WEIGHTS.search(name) and not name.endswith(_BUFFERS):
                problems.add("unexpected tensors", f"{name}: {list(self._reader.tensors[name].shape)}")
        problems.raise_if_any(f"{self.directory}: the checkpoint does not fit the model's config.json:")

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype of a parameter as stored."""
        return self._reader.tensors[self._prefix + self._places[entry.megatron_name][0].key].dtype

    def rows(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Rows of a parameter of the unsharded model, without padding. The result may be a view of a memory map: copy
        it, never write to it.

        Raises:
            UserError: the file is damaged where they lie.
        """
        parts = []
        places = self._places[entry.megatron_name]
        ends = [*(place.first_row for place in places[1:]), entry.shape[0]]
        for place, end in zip(places, ends, strict=True):
            first, last = max(start, place.first_row), min(stop, end)
            if first < last:
                parts.append(self._read(place, entry, first - place.first_row, last - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, place: Place, entry: Entry, first: int, count: int) -> Tensor:
        inner = (count, *entry.shape[1:])
        offsets = (*place.index, first, *(0 for _ in entry.shape[1:]))
        block = self._reader.read(self._prefix + place.key, offsets, (*(1 for _ in place.index), *inner))
        return block.view(inner) if block.is_contiguous() else block.reshape(inner)

    def _find_prefix(self) -> str:
        """Text before every name of a parameter; empty in most checkpoints, and in those of adapters."""
        if self.parameter_map.entries[0].megatron_name != _EMBEDDING:
            return ""
        prefixes = sorted(
            name.removesuffix(_EMBEDDING)
            for name in self._reader.tensors
            if name.endswith(_EMBEDDING) and not _NOT_WEIGHTS.search(name)
        )
        if len(prefixes) != 1:
            found = f"several times (behind {', '.join(map(repr, prefixes))})" if prefixes else "nowhere"
            if any(is_adapter(name) for name in self._reader.tensors):
                raise UserError(
                    f"{self.directory}: a checkpoint of a run with policy.lora, which holds adapters and no weights: "
                    "convert it with `megatron-entropic convert megatron-to-peft`, and merge the adapter with its "
                    "model by `convert peft-to-hf`"
                )
            raise UserError(f"{self.directory}: not a checkpoint of one GPT model: {_EMBEDDING} is {found} in it")
        return prefixes[0]

    def _find(self, entry: Entry, problems: Problems) -> set[str]:
        """Note the places of a parameter and check its shape; returns the names of all tensors that hold it."""
        dimensions = self.parameter_map.dimensions
        tensors = self._reader.tensors
        found: list[tuple[Place, ...]]
        found = [(place,) for place in possible_places(entry, dimensions) if self._prefix + place.key in tensors]
        if not found:
            pairs = split_pairs(entry, dimensions)
            found = [pair for pair in pairs if all(self._prefix + place.key in tensors for place in pair)]
        if not found:
            problems.add("missing tensors", next(possible_places(entry, dimensions)).key + self._of(entry))
            return set()
        fit = [[self._check_shape(place, entry, len(places), problems) for place in places] for places in found]
        if len(found) > 1 and all(map(all, fit)):
            self._compare_places(entry, found, problems)
        self._places[entry.megatron_name] = found[0]
        return {self._prefix + place.key for places in found for place in places}

    def _compare_places(self, entry: Entry, found: list[tuple[Place, ...]], problems: Problems) -> None:
        """Report a parameter stored under several names with different values."""
        # Conversions write norms under several names, one for each layer spec.
        values = []
        for places in found:
            self._places[entry.megatron_name] = places
            values.append(self.rows(entry, 0, entry.shape[0]))
        for places, other in zip(found[1:], values[1:], strict=True):
            if not torch.equal(values[0], other):
                keys = f"{found[0][0].key} and {places[0].key}{self._of(entry)}"
                problems.add("parameters stored twice with different values", keys)

    def _check_shape(self, place: Place, entry: Entry, parts: int, problems: Problems) -> bool:
        wanted = (*place.axes, entry.shape[0] // parts, *entry.shape[1:])
        shape = self._reader.tensors[self._prefix + place.key].shape
        padded = isinstance(entry.layout, VocabularyShard) and shape[1:] == wanted[1:] and shape[0] >= wanted[0]
        if shape != wanted and not padded:
            problems.add("wrong shapes", f"{place.key}: {list(shape)}, expected {list(wanted)}")
        return shape == wanted or padded

    @staticmethod
    def _of(entry: Entry) -> str:
        number = "" if entry.expert is None else f", expert {entry.expert}"
        return "" if entry.layer is None else f" (layer {entry.layer}{number})"


class MegatronTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their Hugging Face names, made of the Megatron parameters when asked for.

    Some are views of a memory map: copy them, never write to them. The tensors of one parameter are best asked for one
    after the other.
    """

    def __init__(self, checkpoint: MegatronCheckpoint) -> None:
        self.parameter_map = checkpoint.parameter_map
        self._checkpoint = checkpoint
        exported = [entry for entry in self.parameter_map.entries if entry.exported]
        self._entries = {name: entry for entry in exported for name in entry.hf_names}
        self._last: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._last:
            entry = self._entries[name]
            values = self._checkpoint.rows(entry, 0, entry.shape[0])
            parts = entry.layout.separate(self.parameter_map.dimensions, values)
            self._last = dict(zip(entry.hf_names, parts, strict=True))
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_weights(hf_dir: Path, megatron_dir: Path | None = None) -> HfReader | MegatronTensors:
    """The tensors of a model by name, with its `parameter_map`; nothing but headers and metadata is read yet.

    Args:
        megatron_dir: distributed checkpoint from which its weights are taken instead.

    Raises:
        UserError: from `read_dimensions`, `HfReader` or `MegatronCheckpoint`: the weights are not those of the model.
    """
    if megatron_dir is None:
        return HfReader(hf_dir)
    return MegatronTensors(MegatronCheckpoint(megatron_dir, ParameterMap(read_dimensions(hf_dir))))
