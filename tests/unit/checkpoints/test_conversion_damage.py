"""Damaged input and unusable output: one clear error, the source untouched, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import build_tiny

from megatron_entropic.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_entropic.checkpoints.safetensors_files import read_header
from megatron_entropic.checkpoints.torch_dist import TorchDistReader

ROOT = Path(__file__).resolve().parents[3]
FLIPS = 120


def digest(directory: Path) -> dict[str, str]:
    """Hash of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def refused(source: Path, output: Path, convert=hf_to_megatron) -> str:
    """The error of a conversion that must fail without a trace."""
    before, beside = digest(source), sorted(output.parent.iterdir())
    with pytest.raises((ValueError, OSError)) as error:
        convert(source, output)
    assert digest(source) == before
    assert sorted(output.parent.iterdir()) == beside, "nothing may be left of the output"
    return str(error.value)


@pytest.fixture
def megatron_dir(tmp_path: Path, qwen3_dir: Path) -> Path:
    """A converted checkpoint that a test may damage."""
    hf_to_megatron(qwen3_dir, tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, of which the margin for metadata takes 16."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_truncated_shard(tmp_path: Path, qwen3_sharded_dir: Path):
    shard = sorted(qwen3_sharded_dir.glob("model-*"))[1]
    os.truncate(shard, shard.stat().st_size - 4)
    assert f"{shard.name}: truncated" in refused(qwen3_sharded_dir, tmp_path / "out")


def test_any_flipped_header_byte_is_refused_or_without_effect(tmp_path: Path, qwen3_dir: Path):
    path = qwen3_dir / "model.safetensors"
    good, wanted = path.read_bytes(), load_file(path)
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    generator = random.Random(4)
    refusals = 0
    for _ in range(FLIPS):
        place, bit = generator.randrange(header_bytes), generator.randrange(8)
        damaged = bytearray(good)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            hf_to_megatron(qwen3_dir, tmp_path / "out")
        except ValueError:
            assert not (tmp_path / "out").exists()
            refusals += 1
            continue
        # What does not matter: metadata and white space.
        shutil.rmtree(tmp_path / "out")
        assert all(torch.equal(value, wanted[name]) for name, value in load_file(path).items())
    assert refusals > FLIPS / 2


def test_missing_index_entry(tmp_path: Path, qwen3_sharded_dir: Path):
    path = qwen3_sharded_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    assert f"model.norm.weight: in {file}" in refused(qwen3_sharded_dir, tmp_path / "out")


def test_extra_missing_swapped_and_fp8_tensors_are_one_error(tmp_path: Path, qwen3_dir: Path):
    path = qwen3_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.gate.weight"] = torch.ones(3)
    del tensors["model.norm.weight"]
    gate = "model.layers.0.mlp.gate_proj.weight"
    tensors[gate] = tensors[gate].T.contiguous()
    up = "model.layers.0.mlp.up_proj.weight"
    tensors[up] = tensors[up].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    message = refused(qwen3_dir, tmp_path / "out")
    for words in (
        "unexpected tensors (1):\n    - model.layers.0.mlp.gate.weight",
        "missing tensors (1):\n    - model.norm.weight",
        f"{gate}: [24, 44], expected [44, 24]",
        f"FP8 tensors of a block-quantised checkpoint, which cannot be trained (1):\n    - {up}",
    ):
        assert words in message


def test_fp8_configuration_is_named(tmp_path: Path, qwen3_dir: Path):
    config = json.loads((qwen3_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (qwen3_dir / "config.json").write_text(json.dumps(config))
    assert "quantised (FP8 in blocks of 128 x 128)" in refused(qwen3_dir, tmp_path / "out")


def test_mixed_dtypes_are_listed(tmp_path: Path, qwen3_dir: Path):
    path = qwen3_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, path)
    message = refused(qwen3_dir, tmp_path / "out")
    assert "given one with --dtype; most are torch.float32" in message
    assert "- model.norm.weight: torch.bfloat16" in message


def test_tensors_that_are_not_finite_are_listed(tmp_path: Path, qwen3_dir: Path):
    path = qwen3_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    tensors["model.layers.1.self_attn.k_proj.weight"][2, 3] = float("-inf")
    save_file(tensors, path)
    message = refused(qwen3_dir, tmp_path / "out")
    assert "tensors with NaN or infinite values (2):" in message
    assert "model.layers.1.self_attn.k_proj.weight: 1 values" in message
    assert "model.norm.weight: 24 values" in message


def test_existing_output_is_left_alone(tmp_path: Path, qwen3_dir: Path, megatron_dir: Path):
    before = digest(megatron_dir)
    assert "exists and is not empty" in refused(qwen3_dir, megatron_dir)
    assert "exists and is not empty" in refused(megatron_dir, qwen3_dir, megatron_to_hf)
    assert digest(megatron_dir) == before


def test_full_disk_is_found_before_anything_is_written(small_disk: Path, qwen3_dir: Path, megatron_dir: Path):
    (small_disk / "ballast").write_bytes(bytes(10 * 2**20))
    assert "MiB are free on that disk" in refused(qwen3_dir, small_disk / "out")
    assert "MiB are free on that disk" in refused(megatron_dir, small_disk / "out", megatron_to_hf)


def test_read_only_output(small_disk: Path, qwen3_dir: Path, megatron_dir: Path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in refused(qwen3_dir, small_disk / "out")
    assert "Read-only file system" in refused(megatron_dir, small_disk / "out", megatron_to_hf)


def test_failed_writes_leave_nothing(tmp_path: Path, qwen3_dir: Path, megatron_dir: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for source, convert in ((qwen3_dir, hf_to_megatron), (megatron_dir, megatron_to_hf)):
            message = refused(source, tmp_path / "out", convert)
            assert "File too large" in message
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_killed_conversion_leaves_no_output_and_the_next_succeeds(tmp_path: Path, qwen3_dir: Path):
    script = (
        "import sys, time; from pathlib import Path; from megatron_entropic.checkpoints import convert\n"
        "class Slow:\n"
        "    def begin(self, total): pass\n"
        "    def advance(self, count): time.sleep(60)\n"
        "convert.hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), progress=Slow())"
    )
    output = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", script, qwen3_dir, output], cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".out.partial").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert (tmp_path / ".out.partial").is_dir()
    assert not output.exists()
    hf_to_megatron(qwen3_dir, output)
    assert not (tmp_path / ".out.partial").exists()
    megatron_to_hf(output, tmp_path / "back")


def test_damaged_checkpoints(tmp_path: Path, megatron_dir: Path):
    files = sorted(megatron_dir.glob("*.distcp"))
    saved = tmp_path / "saved"
    shutil.copytree(megatron_dir, saved)

    def after(damage) -> str:
        shutil.rmtree(megatron_dir)
        shutil.copytree(saved, megatron_dir)
        damage()
        return refused(megatron_dir, tmp_path / "out", megatron_to_hf)

    assert f"{files[0].name}: truncated" in after(lambda: os.truncate(files[0], 1000))
    assert f"{files[0].name}: missing" in after(files[0].unlink)
    assert "not a distributed checkpoint (no .metadata)" in after((megatron_dir / ".metadata").unlink)
    assert "damaged" in after(lambda: (megatron_dir / ".metadata").write_bytes(b"\x80\x04nonsense"))
    assert "format 'zarr'" in after(lambda: (megatron_dir / "metadata.json").write_text('{"sharded_backend": "zarr"}'))
    assert "name a Hugging Face directory" in after((megatron_dir / "config.json").unlink)

    def untie() -> None:
        config = json.loads((megatron_dir / "config.json").read_text())
        config |= {"tie_word_embeddings": True, "num_hidden_layers": 3}
        (megatron_dir / "config.json").write_text(json.dumps(config))

    message = after(untie)
    assert "unexpected tensors (1):\n    - output_layer.weight: [53, 24]" in message
    assert "decoder.layers.mlp.linear_fc2.weight: [2, 24, 44], expected [3, 24, 44]" in message


def test_a_parameter_that_is_stored_twice_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build_tiny("qwen3_moe", False).save_pretrained(tmp_path / "model")
    hf_to_megatron(tmp_path / "model", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    read = TorchDistReader.read

    def read_changed(self: TorchDistReader, name: str, offsets: tuple, sizes: tuple) -> torch.Tensor:
        return read(self, name, offsets, sizes) + (name == "decoder.layers.1.pre_mlp_layernorm.weight")

    monkeypatch.setattr(TorchDistReader, "read", read_changed)
    message = refused(tmp_path / "megatron", tmp_path / "out", megatron_to_hf)
    assert "parameters stored twice with different values (1)" in message
    assert "decoder.layers.1.pre_mlp_layernorm.weight (layer 1)" in message


def test_any_flipped_byte_of_the_metadata_is_refused_or_without_effect(tmp_path: Path, megatron_dir: Path):
    path = megatron_dir / ".metadata"
    good = path.read_bytes()
    megatron_to_hf(megatron_dir, tmp_path / "good")
    wanted = load_file(tmp_path / "good/model.safetensors")
    generator = random.Random(4)
    refusals = 0
    for _ in range(FLIPS):
        damaged = bytearray(good)
        damaged[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            megatron_to_hf(megatron_dir, tmp_path / "out")
        except ValueError:
            assert not (tmp_path / "out").exists()
            refusals += 1
            continue
        found = load_file(tmp_path / "out/model.safetensors")
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())
        shutil.rmtree(tmp_path / "out")
    assert refusals > FLIPS / 2


def test_what_is_not_a_tensor_in_a_checkpoint_is_named(tmp_path: Path, megatron_dir: Path):
    path = next(iter(sorted(megatron_dir.glob("*.distcp"))))
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x05\x06")] ^= 0xFF
    path.write_bytes(data)
    message = refused(megatron_dir, tmp_path / "out", megatron_to_hf)
    assert path.name in message
    assert "is damaged" in message


def test_headers_with_gaps_are_damaged(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"damaged header: .*offset for tensor `a`"):
        read_header(path)
