"""Shipped configurations and their parameter tables, for the tests of planning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_entropic.config.load import read_config
from megatron_entropic.config.run import Config
from megatron_entropic.planning.hardware import Hardware
from megatron_entropic.planning.parameters import KNOWN_MODELS, ParameterTable, read_model
from megatron_entropic.planning.schedule import make_schedule
from megatron_entropic.planning.step import PlannedStep

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def example(name: str, *overrides: str) -> Config:
    """A shipped configuration, whether or not it can run here."""
    config, _ = read_config(EXAMPLES / f"{name}.yaml", overrides)
    return config


def known(name: str) -> ParameterTable:
    """Of a model whose dimensions are shipped."""
    return ParameterTable(read_model(KNOWN_MODELS / f"{name}.json", name))


def planned(config: Config, table: ParameterTable, tokens: float | None = None, **hardware: Any) -> PlannedStep:
    """The training step of a configuration on H100s; `tokens` of a micro-batch where they are given."""
    schedule = make_schedule(config)
    schedule = schedule if tokens is None else replace(schedule, tokens=tokens)
    return PlannedStep(config, table, schedule, Hardware(**hardware))


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A Qwen3 whose sizes can be counted by hand."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 8,
        "head_dim": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 10,
        "vocab_size": 13,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **changes,
    }
