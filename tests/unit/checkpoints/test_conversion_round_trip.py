"""Hugging Face -> torch_dist -> Hugging Face gives back every bit, for every family and way of storing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, build_tiny
from transformers import AutoModelForCausalLM

from megatron_entropic.checkpoints import convert as conversion
from megatron_entropic.checkpoints.compare import compare_weights
from megatron_entropic.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_entropic.checkpoints.hf import HfReader


def tensors(hf_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, from all of its files."""
    return {name: value for path in hf_dir.glob("*.safetensors") for name, value in load_file(path).items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two directories hold the same tensors."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
        for name, value in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, dtype: torch.dtype
):
    # Parameters in several pieces each, one of them shorter than the others.
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1000)
    hf_dir, megatron_dir, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    # bfloat16 comes and goes in several files, float32 in one.
    largest = 10_000 if dtype == torch.bfloat16 else 10**9
    build_tiny(family, tied).to(dtype).save_pretrained(hf_dir, max_shard_size=largest)
    (hf_dir / "tokenizer.json").write_text("{}")
    hf_to_megatron(hf_dir, megatron_dir)
    megatron_to_hf(megatron_dir, back, max_shard_bytes=largest)
    for directory in (hf_dir, back):
        assert (len(list(directory.glob("*.safetensors"))) > 2) == (dtype == torch.bfloat16)
    reader = HfReader(hf_dir)
    assert same_bits({name: reader[name] for name in reader}, tensors(back))
    assert (back / "tokenizer.json").read_text() == "{}"
    differences = compare_weights(hf_dir, megatron_dir)
    assert {difference.name for difference in differences} == set(reader)
    assert all(difference.is_equal for difference in differences)


def test_sharded_and_single_files_convert_alike(tmp_path: Path, qwen3_dir: Path, qwen3_sharded_dir: Path):
    for source in (qwen3_dir, qwen3_sharded_dir):
        hf_to_megatron(source, tmp_path / f"{source.name}_megatron")
    megatron_to_hf(tmp_path / "sharded_megatron", tmp_path / "back", max_shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert same_bits(tensors(qwen3_dir), tensors(tmp_path / "back"))
    back, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "back", qwen3_dir))
    tokens = torch.arange(12).unsqueeze(0)
    assert torch.equal(back(tokens).logits, original(tokens).logits)
    names = [path.name for path in (tmp_path / "model_megatron").iterdir()]
    assert {".metadata", "metadata.json", "common.pt", "config.json"} < set(names)


def test_dtype_is_converted_when_asked(tmp_path: Path, qwen3_dir: Path):
    hf_to_megatron(qwen3_dir, tmp_path / "megatron", dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    wanted = {name: value.to(torch.bfloat16) for name, value in tensors(qwen3_dir).items()}
    assert same_bits(wanted, tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    differences = compare_weights(qwen3_dir, tmp_path / "megatron")
    assert all(one.is_equal and one.hf_dtype != one.megatron_dtype for one in differences), (
        "another dtype, with the values it should have"
    )


def test_comparison_finds_a_changed_value(tmp_path: Path, qwen3_dir: Path):
    hf_to_megatron(qwen3_dir, tmp_path / "megatron")
    name = "model.layers.1.mlp.up_proj.weight"
    changed = tensors(qwen3_dir)
    changed[name][3, 4] += 0.5
    save_file(changed, qwen3_dir / "model.safetensors")
    differences = compare_weights(qwen3_dir, tmp_path / "megatron")
    (found,) = [one for one in differences if not one.is_equal]
    assert (found.name, found.differing, found.hf_nan) == (name, 1, 0)
    assert found.largest == pytest.approx(0.5)
