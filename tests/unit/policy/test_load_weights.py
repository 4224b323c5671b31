"""What a policy refuses to load."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_entropic.errors import UserError
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.model import load as module


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 13, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["vocab_size"] == 13
    return tmp_path / "model"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_stop_the_run_before_its_first_step(
    model_dir: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` took them without a word, where `convert` refused the same files."""
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.k_proj.weight"][2, 3] = value
    save_file(tensors, path)

    def entries(_model: Any, parameter_map: ParameterMap, _state: Any) -> Any:
        return [(entry, torch.empty(entry.shape)) for entry in parameter_map.entries]

    monkeypatch.setattr(module, "named_entries", entries)
    state: Any = SimpleNamespace(tensor_place=lambda of_expert: (0, 1))
    with pytest.raises(UserError, match="no model can work with these weights") as refused:
        module.load_weights(torch.nn.ModuleList(), model_dir, state)
    assert "model.layers.0.self_attn.k_proj.weight" in str(refused.value)
    assert "1 values" in str(refused.value)
