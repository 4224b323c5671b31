"""Low-rank adapters as peft keeps them: adapter_config.json and adapter_model.safetensors, read and written.

Reading refuses what would be another function than W + alpha/rank B A, with one message that lists all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_entropic.checkpoints.hf import FLOAT_DTYPES
from megatron_entropic.checkpoints.safetensors_files import SafetensorsWriter, read_header
from megatron_entropic.config.policy import AdaptedModule, LoraConfig
from megatron_entropic.errors import Problems, UserError, reading
from megatron_entropic.files.atomic import sync
from megatron_entropic.files.jsonl import read_json_object
from megatron_entropic.models.adapters import adapter_map
from megatron_entropic.models.parameter_map import ParameterMap

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_WITHOUT_EFFECT: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": None,
    "target_parameters": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "fan_in_fan_out": False,
}
"""Values of keys that leave W + alpha/rank B A as it is; an adapter with others is refused."""


class PeftAdapter(Mapping[str, Tensor]):
    """The matrices of an adapter by peft's names, read through a memory map when asked for.

    Args:
        directory: where peft's `save_pretrained` or this project wrote it.
        parameter_map: parameters of the model that it is for.
        lora: section `policy.lora` that it must agree with.

    Raises:
        UserError: one error that lists everything that is wrong with it.
    """

    def __init__(self, directory: Path, parameter_map: ParameterMap, lora: LoraConfig) -> None:
        problems = Problems()
        found = _settings(directory, problems)
        for key, asked in (("rank", lora.rank), ("alpha", lora.alpha), ("target_modules", set(lora.target_modules))):
            if key in found and found[key] != asked:
                problems.add(f"policy.lora.{key} is {_shown(asked)}, the adapter's is {_shown(found[key])}")
        problems.raise_if_any(f"{directory}: this adapter cannot be used:")
        expected = adapter_map(parameter_map, lora).hf_tensors
        self._path = directory / WEIGHTS_FILE
        with reading(self._path):
            header = read_header(self._path)
        for name, shape in expected.items():
            if name not in header:
                problems.add("missing tensors", name)
            elif header[name][1] != shape:
                problems.add("wrong shapes", f"{name}: {list(header[name][1])}, expected {list(shape)}")
            elif header[name][0] not in FLOAT_DTYPES:
                problems.add("tensors that are not floating-point numbers", f"{name}: {header[name][0]}")
        for name in header:
            if name not in expected:
                problems.add("unexpected tensors", name)
        problems.raise_if_any(f"{self._path}: the adapter does not fit the model:")
        self._names = tuple(expected)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self._path}: {name} holds NaN or infinite values; nothing was started")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_lora_settings(directory: Path) -> LoraConfig:
    """The section `policy.lora` that an adapter was made with, its directory included.

    Raises:
        UserError: one error that lists everything that is wrong with it.
    """
    problems = Problems()
    found = _settings(directory, problems)
    problems.raise_if_any(f"{directory}: this adapter cannot be used:")
    modules = [module for module in get_args(AdaptedModule) if module in found["target_modules"]]
    return LoraConfig(
        rank=found["rank"], alpha=found["alpha"], target_modules=modules, adapter_dir=directory.absolute()
    )


def _settings(directory: Path, problems: Problems) -> dict[str, Any]:
    """Rank, alpha and target_modules (a set) of adapter_config.json, as far as they can be used."""
    path = directory / CONFIG_FILE
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not the configuration of a LoRA adapter (peft_type is not LORA)")
    found: dict[str, Any] = {}
    for key, plain in _WITHOUT_EFFECT.items():
        if config.get(key, plain) not in (plain, None, [], {}):
            problems.add(f"{CONFIG_FILE}: {key}={config[key]!r} is not supported, only {plain!r}")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        # Some of them change the weights beside the adapter.
        problems.add(f"{CONFIG_FILE}: init_lora_weights={config['init_lora_weights']!r} is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.add(f"{CONFIG_FILE}: r={rank!r} is not a positive whole number")
    elif isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        problems.add(f"{CONFIG_FILE}: lora_alpha={alpha!r} is not a positive number")
    else:
        # Rank-stabilised adapters are scaled by alpha / sqrt(rank).
        found = {"rank": rank, "alpha": float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)}
    modules = config.get("target_modules")
    known = set(get_args(AdaptedModule))
    if modules == "all-linear":
        modules = sorted(known)
    if not isinstance(modules, list) or not modules or not set(map(str, modules)) <= known:
        problems.add(f"{CONFIG_FILE}: target_modules={modules!r} is not a list of some of {', '.join(sorted(known))}")
    else:
        found["target_modules"] = set(modules)
    return found


def write_adapter(
    directory: Path, tensors: Mapping[str, Tensor], parameter_map: ParameterMap, lora: LoraConfig, base: str
) -> None:
    """Write an adapter that peft reads, into a new directory or an empty one.

    Args:
        tensors: all matrices by peft's names, of one dtype.
        parameter_map: parameters of the model that it is for.
        base: name or path of that model, as peft notes it.

    Raises:
        OSError: the disk refuses.
    """
    expected = adapter_map(parameter_map, lora).hf_tensors
    assert set(tensors) == set(expected), f"{len(tensors)} of {len(expected)} matrices were given"
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    directory.mkdir(exist_ok=True)
    writer = SafetensorsWriter(directory / WEIGHTS_FILE, expected, dtypes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": list(lora.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        sync(directory / name)


def _shown(value: Any) -> str:
    return ", ".join(sorted(value)) if isinstance(value, set) else f"{value:g}"
