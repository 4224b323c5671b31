"""Adapters in peft's files: merged as peft merges them, and refused where they would be another function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import build_tiny

from megatron_entropic.checkpoints.convert_adapter import peft_to_hf
from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.checkpoints.peft_adapter import PeftAdapter, read_lora_settings, write_adapter
from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.errors import UserError

MODULES = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A model, an adapter that peft wrote for it, and the weights that peft merges of both."""
    import peft

    folder = tmp_path_factory.mktemp("adapters")
    model = build_tiny("qwen2", tied=True)
    model.save_pretrained(folder / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=MODULES))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    return folder / "model", folder / "adapter", {name: value.clone() for name, value in merged.items()}


def test_a_merged_model_is_peft_s(written: Any, tmp_path: Path) -> None:
    model, adapter, merged = written
    peft_to_hf(model, adapter, tmp_path / "merged")
    found, before = HfReader(tmp_path / "merged"), HfReader(model)
    changed = [name for name in found.names if not torch.equal(found[name], before[name])]
    assert len(changed) == len(MODULES) * 2  # layers
    for name in found.names:
        torch.testing.assert_close(found[name], merged[name], rtol=1e-5, atol=1e-6)


def test_settings_come_from_peft_s_file(written: Any, tmp_path: Path) -> None:
    _, adapter, _ = written
    settings = read_lora_settings(adapter)
    assert (settings.rank, settings.alpha, settings.target_modules) == (3, 5.0, MODULES)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert read_lora_settings(tmp_path).scale == pytest.approx(5 / 3**0.5)


def test_what_is_written_is_read_and_what_peft_loads(written: Any, tmp_path: Path) -> None:
    import peft

    model, adapter, merged = written
    parameter_map, lora = HfReader(model).parameter_map, read_lora_settings(adapter)
    write_adapter(tmp_path / "copy", dict(PeftAdapter(adapter, parameter_map, lora)), parameter_map, lora, str(model))
    loaded = peft.PeftModel.from_pretrained(build_tiny("qwen2", tied=True), tmp_path / "copy")
    found = loaded.merge_and_unload().state_dict()
    assert all(torch.equal(found[name], merged[name]) for name in merged)
    first = load_file(adapter / "adapter_model.safetensors")
    second = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    assert first.keys() == second.keys()


def test_an_adapter_that_is_another_function_is_refused_with_all_reasons(written: Any, tmp_path: Path) -> None:
    _, adapter, _ = written
    config = json.loads((adapter / "adapter_config.json").read_text())
    strange = {"use_dora": True, "bias": "all", "r": 0, "target_modules": "q_.*", "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | strange))
    with pytest.raises(UserError) as refused:
        read_lora_settings(tmp_path)
    for key, value in strange.items():
        assert f"{key}={value!r}" in str(refused.value)


def test_an_adapter_of_another_model_is_refused_with_all_tensors(written: Any, tmp_path: Path) -> None:
    model, adapter, _ = written
    tensors = load_file(adapter / "adapter_model.safetensors")
    missing = next(iter(tensors))
    wrong = list(tensors)[1]
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(missing)
    tensors[wrong] = tensors[wrong][:-1].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(UserError) as refused:
        PeftAdapter(tmp_path, HfReader(model).parameter_map, read_lora_settings(tmp_path))
    for name in (missing, wrong, "base_model.model.lm_head.lora_A.weight"):
        assert name in str(refused.value)


def test_an_adapter_in_the_place_of_a_model_says_what_to_do(written: Any) -> None:
    _, adapter, _ = written
    with pytest.raises(UserError, match=r"an adapter without its model.*peft-to-hf"):
        HfReader(adapter)


def test_other_settings_than_the_adapter_s_are_refused_together(written: Any) -> None:
    model, adapter, _ = written
    asked = LoraConfig(rank=4, alpha=6.0, target_modules=["q_proj"])
    with pytest.raises(UserError) as refused:
        PeftAdapter(adapter, HfReader(model).parameter_map, asked)
    for text in ("rank is 4, the adapter's is 3", "alpha is 6, the adapter's is 5", "target_modules is q_proj"):
        assert text in str(refused.value)
