"""Hugging Face checkpoint directories: read through memory maps after a complete check, written atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_entropic.checkpoints.safetensors_files import SafetensorsWriter, read_header
from megatron_entropic.errors import Problems, UserError
from megatron_entropic.files.atomic import appears_when_complete
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.families import HF_LAYER
from megatron_entropic.models.layouts import Shape
from megatron_entropic.models.parameter_map import ParameterMap

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Dtypes that weights may have, as safetensors spells them."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 4096
"""Rows of the embedding that are compared with the head's at a time."""
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)
"""Patterns of the files that belong to a model beside config.json and weights; a model card would describe another
model."""


@dataclass(frozen=True)
class _Stored:
    """Place, dtype and shape of a tensor, by the header of its file."""

    path: Path
    dtype: str
    shape: Shape


class HfReader(Mapping[str, Tensor]):
    """The tensors of a Hugging Face directory by name, read through memory maps when asked for.

    Opening it reads headers only and compares them with what the model's config.json calls for. Rotary inv_freq buffers
    and layers that predict further tokens are tolerated and not offered: transformers and vLLM pass over them too. So
    is `lm_head.weight` of a tied checkpoint if its values are the embedding's, for which both are read.
    Tensors are views of the map: copy them, never write to them.

    Raises:
        UserError: from `read_dimensions`, or one error that lists every missing, unexpected or wrongly shaped
            tensor and every missing or truncated file.
    """

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = Path(hf_dir)
        self.parameter_map = ParameterMap(read_dimensions(self.hf_dir))
        expected = self.parameter_map.hf_tensors
        problems = Problems()
        stored = _read_headers(self.hf_dir, expected, problems)
        _compare(stored, expected, problems, passed_over=_prediction_layers(self.parameter_map))
        problems.raise_if_any(f"{self.hf_dir}: the checkpoint does not fit its config.json:")
        self._stored = {name: stored[name] for name in expected}
        self._open_files: dict[Path, Any] = {}
        if HEAD in stored and HEAD not in expected:
            self._check_tied_head(stored[HEAD])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the forward pass."""
        return tuple(self._stored)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, by the header of its file."""
        return FLOAT_DTYPES[self._stored[name].dtype]

    def _check_tied_head(self, head: _Stored) -> None:
        """Refuse a head of its own in a model whose config.json says that it has none.

        transformers 5 uses such a head, transformers 4 and vLLM's loaders do not all: two models, and no word of it.
        """
        if head.shape == self._stored[EMBEDDING].shape and head.dtype in FLOAT_DTYPES:
            embedding, own = self[EMBEDDING], self._read(head.path, HEAD)
            rows = range(0, head.shape[0], _COMPARED_ROWS)
            if all(torch.equal(*(t[r : r + _COMPARED_ROWS].float() for t in (embedding, own))) for r in rows):
                return
            difference = "its values are not those of"
        else:
            difference = f"it is {head.dtype} {list(head.shape)}, unlike"
        raise UserError(
            f"{self.hf_dir}: config.json says tie_word_embeddings=true, but {head.path.name} has a {HEAD} of its own: "
            f"{difference} {EMBEDDING}. Programs differ in which of the two they use. If the head belongs to the "
            'model, set "tie_word_embeddings": false in config.json; if not, remove the tensor'
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._stored[name].path, name)

    def _read(self, path: Path, name: str) -> Tensor:
        if path not in self._open_files:
            self._open_files[path] = safe_open(path, framework="pt", device="cpu")
        tensor: Tensor = self._open_files[path].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _read_headers(hf_dir: Path, expected: Mapping[str, Shape], problems: Problems) -> dict[str, _Stored]:
    """Tensors of every weight file. Expected ones that nobody stores are reported, unless the file that should hold
    them is itself reported."""
    stored: dict[str, _Stored] = {}
    explained: set[str] = set()
    for path, promised in _weight_files(hf_dir, expected, problems).items():
        if not path.is_file():
            problems.add("unusable files", f"{path.name}: missing, though {INDEX_FILE} names it")
            explained |= promised
            continue
        try:
            header = read_header(path)
        except UserError as error:
            problems.add("unusable files", f"{path.name}: {error}")
            explained |= promised
            continue
        unnamed = [name for name in header if name in expected and name not in promised]
        for name in unnamed:
            problems.add(f"tensors that {INDEX_FILE} does not name in their file", f"{name}: in {path.name}")
        for name, (dtype, shape) in header.items():
            if name in stored:
                problems.add("tensors stored twice", f"{name}: in {stored[name].path.name} and {path.name}")
            stored[name] = _Stored(path, dtype, shape)
    for name in expected:
        if name not in stored and name not in explained:
            problems.add("missing tensors", name)
    return stored


def _weight_files(hf_dir: Path, expected: Mapping[str, Shape], problems: Problems) -> dict[Path, set[str]]:
    """Weight files, each with the names of the tensors it should hold.

    Raises:
        UserError: there are none, or the index cannot be read (nothing else can be said then).
    """
    index, single = hf_dir / INDEX_FILE, hf_dir / SINGLE_FILE
    if single.is_file() and not index.is_file():
        # Without an index vLLM reads every file, one over the other.
        others = sorted(path.name for path in hf_dir.glob("*.safetensors") if path != single)
        if others:
            problems.add(f"files beside {SINGLE_FILE}, which no {INDEX_FILE} sorts out; remove them", ", ".join(others))
        return {single: set(expected)}
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pt") for path in hf_dir.glob(pattern))
        found = f"; found {', '.join(others[:5])}, which cannot be read without it" if others else ""
        raise UserError(f"{hf_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} exists{found}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file_name in sorted(weight_map.items(), key=lambda item: (item[1], item[0])):
            files.setdefault(hf_dir / file_name, set()).add(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from error
    if single.is_file() and set(files) != {single}:
        problems.add(
            "two sets of weights, of which transformers reads the first and vLLM the second; remove the one that is "
            "not the model",
            f"{SINGLE_FILE}; {INDEX_FILE} with {', '.join(sorted({path.name for path in files} - {SINGLE_FILE})[:3])}",
        )
    return files


def _prediction_layers(parameter_map: ParameterMap) -> tuple[str, ...]:
    """Beginnings of the names of layers behind the last one that predict further tokens."""
    dimensions = parameter_map.dimensions
    first = dimensions.num_layers
    return tuple(HF_LAYER.format(layer=first + index) for index in range(dimensions.prediction_layers))


def _compare(
    stored: Mapping[str, _Stored], expected: Mapping[str, Shape], problems: Problems, passed_over: tuple[str, ...]
) -> None:
    """Report tensors that are not what the model needs."""
    for name, tensor in stored.items():
        if name not in expected:
            known = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") or name.startswith(passed_over)
            if not known:
                problems.add("unexpected tensors", name)
        elif tensor.dtype.startswith("F8"):
            problems.add(
                "FP8 tensors of a block-quantised checkpoint, which cannot be trained", f"{name}: {tensor.dtype}"
            )
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.add("quantised tensors, which cannot be trained", f"{name}: {tensor.dtype}")
        elif tensor.shape != expected[name]:
            problems.add("wrong shapes", f"{name}: {list(tensor.shape)}, expected {list(expected[name])}")


def write_hf_directory(
    output_dir: Path,
    tensors: Iterable[tuple[str, Tensor]],
    template_dir: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    and_then: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint of the template's architecture that transformers and vLLM load.

    `tensors` may come in any order and are written as they come: one is in memory at a time, and it may be a view of
    a buffer that is used again for the next. They must be exactly those the template's config.json calls for, all
    of one dtype, which is noted in the new config.json; the model's own buffers are float32. Tokenizer and generation
    settings are copied. Everything is written to a hidden directory beside `output_dir`, flushed and renamed; whatever
    fails, `output_dir` is either complete or as it was before. With `overwrite` an existing directory steps aside as
    `.NAME.replaced` until the new one is in place. `and_then` adds to the hidden directory before it is renamed.

    Raises:
        UserError: `output_dir` exists and is not empty (with `overwrite`: and is not a model), or one error that
            lists every missing, unexpected, repeated, wrongly shaped or wrongly typed tensor.
        OSError: the disk is full or not writable.
    """
    output_dir, template_dir = Path(output_dir).absolute(), Path(template_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        if not overwrite:
            raise UserError(f"{output_dir}: exists and is not empty; a model is not written over it")
        if not (output_dir / "config.json").is_file():
            raise UserError(f"{output_dir}: exists and is not a model directory; only a model is replaced")
    parameter_map = ParameterMap(read_dimensions(template_dir))
    with appears_when_complete(output_dir) as partial:
        dtype = _write_weights(partial, tensors, parameter_map, max_shard_bytes, output_dir)
        copy_companions(partial, template_dir, dtype)
        if and_then is not None:
            and_then(partial)


def _write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    parameter_map: ParameterMap,
    max_shard_bytes: int,
    output_dir: Path,
) -> torch.dtype:
    """Fill the weight files in the order of arrival; the first parameter's dtype is every parameter's."""
    problems = Problems()
    expected = parameter_map.hf_tensors
    dtypes: dict[str, torch.dtype] = {}
    writers: dict[str, SafetensorsWriter] = {}
    dtype: torch.dtype | None = None
    written: set[str] = set()
    for name, tensor in _buffers_last(tensors, parameter_map.buffers):
        if dtype is None:
            dtype = tensor.dtype
            dtypes = dict.fromkeys(expected, dtype) | dict.fromkeys(parameter_map.buffers, torch.float32)
            writers = create_weight_files(directory, expected, dtypes, max_shard_bytes)
        if name not in expected:
            problems.add("unexpected tensors", name)
        elif name in written:
            problems.add("repeated tensors", name)
        elif tuple(tensor.shape) != expected[name]:
            problems.add("wrong shapes", f"{name}: {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype != dtypes[name]:
            problems.add("mixed dtypes", f"{name}: {tensor.dtype} among {dtypes[name]}")
        else:
            writers[name].write(name, tensor)
        written.add(name)
    for name in expected:
        if name not in written:
            problems.add("missing tensors", name)
    problems.raise_if_any(f"{output_dir}: not written, the tensors do not make up the model:")
    assert dtype is not None, "a model without tensors was reported above"
    return dtype


def _buffers_last(tensors: Iterable[tuple[str, Tensor]], buffers: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, buffers behind all parameters; buffers are small enough to be kept until then."""
    kept = []
    for name, tensor in tensors:
        if name in buffers:
            kept.append((name, tensor.clone()))
        else:
            yield name, tensor
    yield from kept


def create_weight_files(
    directory: Path, expected: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> dict[str, SafetensorsWriter]:
    """Create weight files of at most `max_shard_bytes` of data (one tensor may exceed it) and their index.

    Returns:
        The writer of each tensor, by name.
    """
    shards: list[dict[str, Shape]] = [{}]
    shard_bytes = total_bytes = 0
    for name, shape in expected.items():
        size = prod(shape) * dtypes[name].itemsize
        if shards[-1] and shard_bytes + size > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = shape
        shard_bytes += size
        total_bytes += size
    if len(shards) == 1:
        file_names = [SINGLE_FILE]
    else:
        file_names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(file_names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    writers: dict[str, SafetensorsWriter] = {}
    for file_name, shard in zip(file_names, shards, strict=True):
        writer = SafetensorsWriter(directory / file_name, shard, dtypes)
        writers |= dict.fromkeys(shard, writer)
    return writers


def copy_companions(directory: Path, template_dir: Path, dtype: torch.dtype) -> None:
    """Write config.json with the new dtype, and copy tokenizer and generation settings beside it."""
    config = json.loads((template_dir / "config.json").read_text(encoding="utf-8"))
    # The template's own key: torch_dtype before transformers 5.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in _COPIED:
        for source in template_dir.glob(pattern):
            if source.is_file():
                shutil.copyfile(source, directory / source.name)
