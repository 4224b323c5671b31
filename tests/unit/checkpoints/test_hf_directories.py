"""Reading refuses damaged directories completely and at once; writing appears completely or not at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_entropic.checkpoints import hf as hf_io
from megatron_entropic.checkpoints.hf import HfReader, write_hf_directory
from megatron_entropic.errors import UserError


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_reads_what_transformers_wrote(tiny: tuple[PreTrainedModel, Path]):
    directory = tiny[1]
    # Not the model's state, in which transformers has fused the experts of a layer.
    reader, state = HfReader(directory), load_file(directory / "model.safetensors")
    assert set(reader.names) == set(reader.parameter_map.hf_tensors)
    assert all(torch.equal(reader[name], state[name]) for name in reader.names)
    with pytest.raises(KeyError):
        reader["model.layers.9.mlp.up_proj.weight"]


def test_sharded_and_single_files_read_alike(qwen3_dir: Path, qwen3_sharded_dir: Path):
    assert len(list(qwen3_sharded_dir.glob("model-*.safetensors"))) > 2
    single, sharded = HfReader(qwen3_dir), HfReader(qwen3_sharded_dir)
    assert single.names == sharded.names
    assert all(torch.equal(single[name], sharded[name]) for name in single.names)


def test_tensors_are_memory_mapped(qwen3_dir: Path):
    reader = HfReader(qwen3_dir)
    name = "model.embed_tokens.weight"
    assert reader[name].data_ptr() == reader[name].data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(qwen3_dir / "model.safetensors") in maps.read()


def test_one_error_lists_missing_unexpected_wrongly_shaped_and_quantised(qwen3_dir: Path):
    path = qwen3_dir / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.layers.0.mlp.gate.weight"] = torch.ones(3)
    tensors["lm_head.weight"] = torch.ones(5, 24)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(44, 24, dtype=torch.int8)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not fit its config") as error:
        HfReader(qwen3_dir)
    for words in (
        "missing tensors (2):",
        "- model.norm.weight",
        "- model.layers.1.self_attn.q_norm.weight",
        "unexpected tensors (1):",
        "- model.layers.0.mlp.gate.weight",
        "- lm_head.weight: [5, 24], expected [53, 24]",
        "- model.layers.0.mlp.up_proj.weight: I8",
    ):
        assert words in str(error.value)


def _tie(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("change", ["one value", "shape", "dtype"])
def test_a_tied_model_with_a_head_of_its_own_is_refused(qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    """The policy dropped such a head, transformers and vLLM used it: two models, and no word of it."""
    monkeypatch.setattr(hf_io, "_COMPARED_ROWS", 10)
    path = qwen3_dir / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    if change == "one value":
        head[52, 3] += 0.5
    tensors["lm_head.weight"] = {"shape": head[:50], "dtype": head.to(torch.int8)}.get(change, head)
    save_file(tensors, path)
    _tie(qwen3_dir)
    with pytest.raises(
        UserError, match=r"tie_word_embeddings=true, but model\.safetensors has a lm_head\.weight of its own"
    ):
        HfReader(qwen3_dir)


def test_weights_in_one_file_and_in_several_beside_an_index_are_refused(qwen3_sharded_dir: Path):
    """transformers reads the single file, vLLM what the index names."""
    tensors = load_file(next(qwen3_sharded_dir.glob("model-*")))
    save_file(tensors, qwen3_sharded_dir / "model.safetensors")
    with pytest.raises(
        UserError, match="two sets of weights, of which transformers reads the first and vLLM the second"
    ):
        HfReader(qwen3_sharded_dir)


def test_an_index_that_names_the_single_file_is_no_second_set(qwen3_dir: Path):
    names = load_file(qwen3_dir / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (qwen3_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert HfReader(qwen3_dir).names


def test_shards_of_an_earlier_save_without_their_index_are_refused(qwen3_dir: Path, qwen3_sharded_dir: Path):
    """vLLM reads every file where there is no index, the old values over the new."""
    shard = next(qwen3_sharded_dir.glob("model-*"))
    shutil.copy(shard, qwen3_dir)
    with pytest.raises(UserError, match=f"files beside model.safetensors.*\n.*{shard.name}"):
        HfReader(qwen3_dir)


def test_exchanged_files_are_named_with_their_tensors(qwen3_sharded_dir: Path):
    first, second = sorted(qwen3_sharded_dir.glob("model-*"))[:2]
    first.rename(qwen3_sharded_dir / "aside")
    second.rename(first)
    (qwen3_sharded_dir / "aside").rename(second)
    with pytest.raises(UserError, match=rf"does not name in their file[^*]*: in {first.name}[^*]*: in {second.name}"):
        HfReader(qwen3_sharded_dir)


def test_superfluous_head_of_a_tied_model_and_rotary_buffers_are_tolerated(qwen3_dir: Path):
    path = qwen3_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, path)
    _tie(qwen3_dir)
    reader = HfReader(qwen3_dir)
    assert "lm_head.weight" not in reader
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in reader


def test_layers_that_predict_further_tokens_are_passed_over(deepseek_v3_dir: Path):
    path, wanted = deepseek_v3_dir / "model.safetensors", HfReader(deepseek_v3_dir).names
    save_file(load_file(path) | {"model.layers.2.enorm.weight": torch.ones(24)}, path)
    with pytest.raises(ValueError, match=r"unexpected tensors \(1\):\n    - model\.layers\.2\.enorm\.weight"):
        HfReader(deepseek_v3_dir)
    config = json.loads((deepseek_v3_dir / "config.json").read_text())
    (deepseek_v3_dir / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert HfReader(deepseek_v3_dir).names == wanted


def test_truncated_file_is_found_without_reading_it(qwen3_dir: Path):
    path = qwen3_dir / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=rf"truncated: {size - 1} bytes, but its header calls for {size}"):
        HfReader(qwen3_dir)
    for kept in (100, 5, 0):
        os.truncate(path, kept)
        with pytest.raises(ValueError, match=rf"model\.safetensors: truncated inside its header.*\({kept} bytes\)"):
            HfReader(qwen3_dir)


def test_a_file_that_is_not_safetensors_is_named(qwen3_dir: Path):
    (qwen3_dir / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        HfReader(qwen3_dir)


def test_missing_shard_and_truncated_shard_are_one_error(qwen3_sharded_dir: Path):
    shards = sorted(qwen3_sharded_dir.glob("model-*.safetensors"))
    shards[0].unlink()
    os.truncate(shards[1], shards[1].stat().st_size - 4)
    with pytest.raises(ValueError, match=r"unusable files \(2\)") as error:
        HfReader(qwen3_sharded_dir)
    assert f"{shards[0].name}: missing" in str(error.value)
    assert f"{shards[1].name}: truncated" in str(error.value)
    assert "missing tensors" not in str(error.value), "the missing file explains its tensors"


def test_directories_without_usable_weights(qwen3_dir: Path):
    (qwen3_dir / "model.safetensors").rename(qwen3_dir / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither .* exists; found pytorch_model\.bin"):
        HfReader(qwen3_dir)
    (qwen3_dir / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="not a safetensors index"):
        HfReader(qwen3_dir)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_written_directory_loads_in_transformers(
    tiny: tuple[PreTrainedModel, Path], tmp_path: Path, max_shard_bytes: int
):
    model, directory = tiny
    template = tmp_path / "template"
    model.save_pretrained(template)
    (template / "tokenizer.json").write_text("{}")
    (template / "README.md").write_text("card of another model")
    reader, output = HfReader(directory), tmp_path / "runs" / "export"
    changed = {name: (reader[name] * 3).bfloat16() for name in reader.names}
    changed |= {name: reader[name] * 3 for name in reader.parameter_map.buffers}
    # In reverse, and each from one buffer that is used again: nothing may depend on order or keep a tensor.
    buffer = torch.empty(max(tensor.nbytes for tensor in changed.values()), dtype=torch.uint8)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name in reversed(reader.names):
            view = buffer[: changed[name].nbytes].view(changed[name].dtype).view(changed[name].shape)
            view.copy_(changed[name])
            yield name, view

    write_hf_directory(output, stream(), template, max_shard_bytes=max_shard_bytes)
    shards = list(output.glob("*.safetensors"))
    assert (len(shards) == 1) == (max_shard_bytes == 10**9)
    assert entries(output.parent) == ["export"]
    assert (output / "tokenizer.json").is_file()
    assert (output / "generation_config.json").is_file()
    assert not (output / "README.md").exists()
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    again = HfReader(output)
    assert all(torch.equal(again[name], changed[name]) for name in changed)
    loaded, info = AutoModelForCausalLM.from_pretrained(output, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "saved again")
    saved = HfReader(tmp_path / "saved again")
    assert all(torch.equal(saved[name], tensor) for name, tensor in changed.items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_dtype_is_noted_under_the_key_of_older_configs(qwen3_dir: Path, tmp_path: Path):
    config = json.loads((qwen3_dir / "config.json").read_text())
    del config["dtype"]
    (qwen3_dir / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    reader = HfReader(qwen3_dir)
    write_hf_directory(tmp_path / "out", ((name, reader[name].half()) for name in reader.names), qwen3_dir)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float16"
    assert "dtype" not in written


def test_incomplete_tensors_are_refused_in_one_error(qwen3_dir: Path, tmp_path: Path):
    reader = HfReader(qwen3_dir)

    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        for name in reader.names:
            if name == "model.norm.weight":
                continue
            yield name, reader[name].half() if name == "lm_head.weight" else reader[name]
        yield "model.embed_tokens.weight", reader["model.embed_tokens.weight"]
        yield "model.extra", torch.ones(1)

    with pytest.raises(ValueError, match="do not make up the model") as error:
        write_hf_directory(tmp_path / "out", wrong(), qwen3_dir)
    for words in (
        "missing tensors (1):\n    - model.norm.weight",
        "repeated tensors (1):\n    - model.embed_tokens.weight",
        "unexpected tensors (1):\n    - model.extra",
        "lm_head.weight: torch.float16 among torch.float32",
    ):
        assert words in str(error.value)
    assert entries(tmp_path) == ["model"]


def test_interrupted_write_leaves_nothing(qwen3_dir: Path, tmp_path: Path):
    reader = HfReader(qwen3_dir)

    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield reader.names[0], reader[reader.names[0]]
        assert (tmp_path / ".out.partial" / "model.safetensors").is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_directory(tmp_path / "out", interrupted(), qwen3_dir)
    assert entries(tmp_path) == ["model"]


_KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from megatron_entropic.errors import UserError
from megatron_entropic.checkpoints import hf as hf_io
from megatron_entropic.checkpoints.hf import HfReader, write_hf_directory
reader = HfReader(Path(sys.argv[1]))
def tensors():
    for name in reader.names[:5]:
        yield name, reader[name]
    os.kill(os.getpid(), signal.SIGKILL)
write_hf_directory(Path(sys.argv[2]), tensors(), Path(sys.argv[1]), overwrite=True)
"""


def test_killed_writer_leaves_the_old_model_and_the_next_write_cleans_up(qwen3_dir: Path, tmp_path: Path):
    output, reader = tmp_path / "out", HfReader(qwen3_dir)
    write_hf_directory(output, reader.items(), qwen3_dir)
    command = [sys.executable, "-c", _KILLED_WRITER, str(qwen3_dir), str(output)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -9
    assert torch.equal(HfReader(output)["lm_head.weight"], reader["lm_head.weight"])
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_hf_directory(output, reader.items(), qwen3_dir)
    write_hf_directory(output, ((name, -tensor) for name, tensor in reader.items()), qwen3_dir, overwrite=True)
    assert torch.equal(HfReader(output)["lm_head.weight"], -reader["lm_head.weight"])
    assert entries(tmp_path) == ["model", "out"]


def test_only_a_model_directory_is_ever_replaced(qwen3_dir: Path, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    reader = HfReader(qwen3_dir)
    write_hf_directory(home, reader.items(), qwen3_dir)
    (home / "config.json").rename(home / "thesis.tex")
    with pytest.raises(ValueError, match="is not a model directory"):
        write_hf_directory(home, reader.items(), qwen3_dir, overwrite=True)
    assert (home / "thesis.tex").is_file()


def test_full_disk_is_an_os_error_and_leaves_nothing(qwen3_dir: Path, tmp_path: Path):
    reader = HfReader(qwen3_dir)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_hf_directory(tmp_path / "out", reader.items(), qwen3_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == ["model"]
