"""`gguf-to-hf` on a tiny Llama that the gguf library writes here: weights, tokenizer, template, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_entropic import cli
from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.data import load_tokenizer

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghij 0123456789", "ab", "abc"]
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 2, 4, 2, 8, 32, 64
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def shape(name: str) -> tuple[int, ...]:
    """Of a layer's tensor."""
    return {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }.get(name, (HIDDEN,))


def interleaved(weight: numpy.ndarray[Any, Any], heads: int) -> numpy.ndarray[Any, Any]:
    """Queries and keys as GGUF has them: the two halves of a head that rotate together lie beside each other."""
    return weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """A random Llama, matrices in Q8_0; returns what its weights stand for, by Hugging Face's names."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["\u0120" if word == " " else word for word in WORDS])
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if "parts" in fields:
        writer.add_uint16("split.count", fields["parts"])
    expected = {}

    def add(name: str, hf_name: str, size: tuple[int, ...], heads: int = 0) -> None:
        values = random.standard_normal(size, dtype=numpy.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(size) > 1 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(values, kind)
        meant = gguf.quants.dequantize(stored, kind)
        if heads:
            stored = gguf.quants.quantize(interleaved(meant, heads), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        expected[hf_name] = torch.from_numpy(meant.copy())

    add("token_embd.weight", "model.embed_tokens.weight", (len(WORDS), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for layer in range(LAYERS):
        for name, hf_name in NAMES.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name, 0)
            add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{hf_name}.weight", shape(name), heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def convert(*arguments: object) -> int:
    return cli.main(["convert", "gguf-to-hf", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_gguf(file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_becomes_a_directory_with_tokenizer_and_template(
    model: tuple[Path, dict[str, torch.Tensor]], dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, expected = model
    output = tmp_path / "hf"
    assert convert("--gguf-file", file, "--output-dir", output, "--dtype", dtype, "--verify") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "0 differ; logits within 0.0e+00; tokens and chat template agree" in said
    reader = HfReader(output)
    assert set(reader.names) == set(expected)
    for name, meant in expected.items():
        assert reader.stored_dtype(name) == getattr(torch, dtype)
        assert torch.equal(reader[name], meant.to(getattr(torch, dtype))), name
    tokenizer = load_tokenizer(output)
    assert tokenizer.encode("abc 7") == [WORDS.index(word) for word in ("abc", " ", "7")]
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (2, TEMPLATE)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_verify_finds_a_weight_that_was_changed(
    model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_entropic.checkpoints.gguf import compare_with_gguf

    file, _ = model
    output = tmp_path / "hf"
    assert convert("--gguf-file", file, "--output-dir", output) == 0
    weights = load_file(output / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    difference = compare_with_gguf(file, output)
    assert difference.differing == ("model.norm.weight",)
    assert difference.logits > 0
    assert not difference.is_equal


def test_what_cannot_be_converted_is_said_and_nothing_is_written(
    model: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, _ = model
    folder = tmp_path / "in"
    folder.mkdir()
    cut, text, part, other = (folder / name for name in ("cut.gguf", "text.gguf", "part.gguf", "other.gguf"))
    cut.write_bytes(file.read_bytes()[:-2000])
    text.write_text("not a model")
    write_gguf(part, parts=3)
    write_gguf(other, architecture="nobody")
    full = folder / "full"
    full.mkdir()
    (full / "file").touch()
    for name, output, message in (
        (folder / "none.gguf", "out", "no such file"),
        (cut, "out", "cannot be read as GGUF"),
        (text, "out", "cannot be read as GGUF"),
        (part, "out", "is one of 3 parts of a model"),
        (other, "out", "architecture nobody is not supported"),
        (file, "in/full", "exists and is not empty"),
    ):
        assert convert("--gguf-file", name, "--output-dir", tmp_path / output) == 2
        assert message in capsys.readouterr().err, name
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    assert convert("--gguf-file", file, "--output-dir", tmp_path / "out") == 2
    assert "needs the package accelerate: install the extra, pip install 'megatron_entropic[gguf]'" in " ".join(
        capsys.readouterr().err.split()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
