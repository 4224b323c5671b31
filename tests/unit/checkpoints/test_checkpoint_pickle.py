"""Pickles of a checkpoint: every Python's form of them is read, and nothing that they name is called."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_entropic.checkpoints.checkpoint_pickle import read_checkpoint_metadata
from megatron_entropic.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_entropic.checkpoints.run_checkpoints import CheckpointError, check_only_data
from megatron_entropic.checkpoints.torch_dist import TorchDistReader
from megatron_entropic.errors import UserError


class _EnumsByName(pickle.Pickler):
    """As Python 3.11.0 to 3.11.2 pickle enums, Debian 12's among them."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


class _EnumsByValue(pickle.Pickler):
    """As all others do."""

    def reducer_override(self, obj: Any) -> Any:
        return (type(obj), (obj.value,)) if isinstance(obj, Enum) else NotImplemented


@pytest.fixture
def megatron_dir(tmp_path: Path, qwen3_dir: Path) -> Path:
    hf_to_megatron(qwen3_dir, tmp_path / "megatron")
    return tmp_path / "megatron"


def _repickled(path: Path, pickler: type[pickle.Pickler], change: Callable[[Any], None] = lambda _: None) -> bytes:
    """The metadata of a checkpoint of our own, pickled again."""
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    stream = io.BytesIO()
    pickler(stream, protocol=4).dump(metadata)
    return stream.getvalue()


@pytest.mark.parametrize("pickler", [_EnumsByName, _EnumsByValue])
def test_metadata_that_any_python_wrote_is_read(tmp_path: Path, qwen3_dir: Path, megatron_dir: Path, pickler):
    data = _repickled(megatron_dir / ".metadata", pickler)
    assert (b"getattr" in data) == (pickler is _EnumsByName)
    (megatron_dir / ".metadata").write_bytes(data)
    megatron_to_hf(megatron_dir, tmp_path / "back")
    found, wanted = load_file(tmp_path / "back/model.safetensors"), load_file(qwen3_dir / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert read_checkpoint_metadata(megatron_dir / ".metadata", only_known=True).tensors
    # torch reads it too, whichever Python this is.
    assert dcp.FileSystemReader(megatron_dir).read_metadata().state_dict_metadata


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _name(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


_METADATA = "torch.distributed.checkpoint.metadata"


def _programs(mark: Path) -> dict[str, bytes]:
    """Pickles that would create the file `mark`, by what they use."""
    command = _text(f"touch {mark}")
    module = _name(_METADATA, "os")
    class_itself = _name(_METADATA, "Metadata")
    getattr_ = _name("builtins", "getattr")
    return {
        "a dotted name": _call(_name(_METADATA, "os.system"), command),
        "a function": _call(_name("os", "system"), command),
        "getattr of a module": _call(_call(getattr_, module, _text("system")), command),
        "getattr of a class": _call(getattr_, class_itself, _text("__init__")),
        "getattr of an enum, no member": _call(getattr_, _name(_METADATA, "_MEM_FORMAT_ENCODING"), _text("__class__")),
        "getattr as the method of a class": class_itself + b"N}" + _text("__new__") + getattr_ + b"s\x86b",
        "a dotted dtype": _call(_name("torch", "serialization.os.system"), command),
        "eval": _call(_name("builtins", "eval"), _text(f"open({str(mark)!r}, 'w')")),
    }


@pytest.mark.parametrize("kind", _programs(Path("x")))
def test_a_foreign_checkpoint_that_would_run_a_command_is_refused(tmp_path: Path, kind: str):
    mark = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + _programs(mark)[kind] + b".")
    with pytest.raises(UserError, match=r"\.metadata.*(it calls for|_Record)"):
        TorchDistReader(tmp_path)
    with pytest.raises(CheckpointError, match="is not loaded"):
        check_only_data(tmp_path)
    assert not mark.exists()
    # Not even the class of torch's is another afterwards.
    assert read_checkpoint_metadata.__globals__["torch"].distributed.checkpoint.metadata.Metadata({}).version is None


def test_unknown_classes_are_passed_over_when_we_read_and_refused_when_torch_will(megatron_dir: Path):
    def add_a_plan(metadata: Any) -> None:
        metadata.planner_data = {"plan": _SomebodysPlan()}

    data = _repickled(megatron_dir / ".metadata", _EnumsByValue, add_a_plan)
    (megatron_dir / ".metadata").write_bytes(data)
    assert TorchDistReader(megatron_dir).tensors
    with pytest.raises(UserError, match=r"it calls for .*_SomebodysPlan, which no checkpoint of this kind needs"):
        read_checkpoint_metadata(megatron_dir / ".metadata", only_known=True)


class _SomebodysPlan:
    """A class that this package does not know."""


class _Command:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._mark),)


def _save(directory: Path, **objects: Any) -> Path:
    """A checkpoint with a tensor and these objects, as torch writes it."""
    dcp.save({"a": torch.ones(2), **objects}, checkpoint_id=directory, no_dist=True)
    torch.save({}, directory / "common.pt")
    return directory


def test_random_state_and_empty_extra_state_are_data(tmp_path: Path):
    check_only_data(_save(tmp_path / "good", rng=[{"host": torch.get_rng_state(), "device": None, "tracker": {}}]))
    check_only_data(_save(tmp_path / "layers", **{"linear._extra_state/shard_0_1": [None]}))


def test_resume_refuses_objects_that_would_run_a_command(tmp_path: Path):
    mark = tmp_path / "ran"
    with pytest.raises(CheckpointError, match=r"rng cannot be loaded as mere data.*"):
        check_only_data(_save(tmp_path / "rng", rng=[_Command(mark)]))
    pickled = torch.frombuffer(bytearray(pickle.dumps(_Command(mark))), dtype=torch.uint8)
    extra = {"linear._extra_state/shard_0_1": (pickled,)}
    with pytest.raises(CheckpointError, match="_extra_state/shard_0_1 is not empty"):
        check_only_data(_save(tmp_path / "extra", **extra))
    common = _save(tmp_path / "common")
    torch.save({"args": _Command(mark)}, common / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: its contents cannot be loaded"):
        check_only_data(common)
    assert not mark.exists()


def _set_version(metadata: Any) -> None:
    metadata.version = "2.0.0"


def _set_transforms(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.transform_descriptors = ["zstd"]


def _point_outside(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../../etc/passwd"


def _set_negative(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).offset = -8


def _forget_places(metadata: Any) -> None:
    metadata.storage_data = None


def _add_unknown_place(metadata: Any) -> None:
    metadata.storage_data[MetadataIndex("nothing", torch.Size([0]))] = _StorageInfo("__0_0.distcp", 0, 8)


def _make_object(metadata: Any) -> None:
    name = "decoder.final_layernorm.weight"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set_version, "format version 2.0.0 of torch.distributed.checkpoint is newer"),
        (_set_transforms, "its files are transformed by ['zstd']"),
        (_point_outside, "'../../etc/passwd' lies outside the checkpoint"),
        (_set_negative, "bytes -8 to -8 +"),
        (_forget_places, "it lists no tensors, or not where they lie"),
        (_add_unknown_place, "damaged: KeyError('nothing')"),
        (_make_object, "missing tensors (1):\n    - decoder.final_layernorm.weight"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_newer_and_foreign_metadata_is_one_clear_error(tmp_path: Path, megatron_dir: Path, change, words: str):
    (megatron_dir / ".metadata").write_bytes(_repickled(megatron_dir / ".metadata", _EnumsByValue, change))
    with pytest.raises(UserError) as error:
        megatron_to_hf(megatron_dir, tmp_path / "out")
    assert words in str(error.value)


def test_a_newer_format_of_megatron_core_is_named(tmp_path: Path, megatron_dir: Path):
    (megatron_dir / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 2}')
    with pytest.raises(UserError, match="torch_dist of version 2; this version of megatron_entropic reads 1"):
        megatron_to_hf(megatron_dir, tmp_path / "out")


def test_files_of_two_checkpoints_that_were_exchanged_are_damaged(tmp_path: Path, qwen3_dir: Path):
    """The same sizes of files, but other tensors at their places."""
    hf_to_megatron(qwen3_dir, tmp_path / "one")
    hf_to_megatron(qwen3_dir, tmp_path / "two", dtype=torch.bfloat16)
    shutil.copyfile(tmp_path / "one/__0_0.distcp", tmp_path / "two/__0_0.distcp")
    with pytest.raises(UserError, match=r"__0_0\.distcp: .* is damaged"):
        megatron_to_hf(tmp_path / "two", tmp_path / "out")
