"""`megatron-entropic export --quantize` with real modelopt: readable files, a measured KL, refusals in one error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modelopt_reader import read_with_modelopt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from megatron_entropic.cli import main
from megatron_entropic.commands.export import Calibration, quantize_export
from megatron_entropic.data.prompts import read_messages
from megatron_entropic.data.rows import RowProblems, read_rows
from megatron_entropic.data.tokenizer import load_tokenizer, render_prompts

Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Export:
    """`export(*arguments)` -> exit status, stdout, stderr of the command, run in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["export", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("quantization", "algorithm", "stored"),
    [
        ("fp8", "FP8", torch.float8_e4m3fn),
        ("int8", "W8A16", torch.int8),
        ("int8_activations", "W8A8_SQ_PER_CHANNEL", torch.int8),
    ],
)
def test_files_are_readable_and_the_kl_is_small(
    quantization: str, algorithm: str, stored: torch.dtype, export: Export, countdown_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "quantized"
    status, shown, told = export(
        countdown_dir / "model",
        *("--quantize", quantization, "--output-dir", output, "--max-prompts", 32),
        *("--calibration", countdown_dir / "train.parquet"),
    )
    assert status == 0, told
    found = re.search(r"mean (\S+), max (\S+) nats over (\d+) tokens", shown)
    assert found is not None, shown
    mean, largest, tokens = float(found[1]), float(found[2]), int(found[3])
    assert 0 < mean <= largest
    assert mean < 0.05
    assert tokens > 100
    written = json.loads((output / "hf_quant_config.json").read_text())
    assert written["quantization"]["quant_algo"] == algorithm
    original, tensors = (
        load_file(countdown_dir / "model" / "model.safetensors"),
        load_file(output / "model.safetensors"),
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert tensors[name].dtype == stored
    scale = tensors["model.layers.0.mlp.down_proj.weight_scale"]
    restored = tensors[name].float() * (scale.float().unsqueeze(1) if scale.dim() else scale.float())
    assert (restored - original[name].float()).abs().max() < 0.1 * original[name].abs().max()
    assert (output / "tokenizer.json").is_file()
    assert kl_of_the_files(countdown_dir, output, quantization, tokens) == pytest.approx([mean, largest], rel=0.02)


def kl_of_the_files(countdown_dir: Path, output: Path, quantization: str, tokens: int) -> list[float]:
    """Mean and maximum of KL(original || what modelopt reads from the files), over the prompts of the export."""
    original = AutoModelForCausalLM.from_pretrained(countdown_dir / "model", dtype=torch.float32).eval()
    quantized = read_with_modelopt(countdown_dir / "model", output, quantization)
    rows = read_rows([countdown_dir / "train.parquet"], RowProblems())[:32]
    prompts = [read_messages(row, "prompt") for row in rows]
    rendered = render_prompts(prompts, load_tokenizer(countdown_dir / "model"), apply_chat_template=False)
    encoded = [one.tokens for one in rendered]
    distances: list[torch.Tensor] = []
    for ids in encoded:
        if sum(map(len, distances)) == tokens:
            break
        with torch.no_grad():
            wanted, found = (
                model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for model in (original, quantized)
            )
        distances.append((wanted.exp() * (wanted - found)).sum(-1))
    divergence = torch.cat(distances)
    assert len(divergence) == tokens
    return [float(divergence.mean()), float(divergence.max())]


def test_models_with_experts_are_refused_before_anything_is_computed(countdown_dir: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, vocab_size=19, intermediate_size=24, num_local_experts=2, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match="the model has experts, which modelopt cannot export"):
        quantize_export(tmp_path / "experts", tmp_path / "out", "fp8", Calibration(countdown_dir / "train.parquet"))
    assert not (tmp_path / "out").exists()


def test_everything_wrong_comes_in_one_error_and_nothing_is_written(
    export: Export, countdown_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "full"
    output.mkdir()
    (output / "precious").write_text("")
    status, _, told = export(
        tmp_path, "--quantize", "nvfp4", "--output-dir", output, "--calibration", countdown_dir / "missing.parquet"
    )
    assert status == 2
    for part in (
        "nvfp4: modelopt's block",
        "exists and is not empty",
        "no such file",
        "neither a Hugging Face directory",
    ):
        assert part in told
    assert [path.name for path in output.iterdir()] == ["precious"]
