"""Policies of random weights on ranks of this machine, and batches to update them with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_entropic.config.run import Config
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.megatron.platform import Rendezvous
from megatron_entropic.policy.policy import Policy
from megatron_entropic.types import Sequence


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a Qwen3."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int


def write_model(size: ModelSize, directory: Path) -> None:
    """A Hugging Face directory with weights of a normal distribution, which is all that speed and memory depend on."""
    entries = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_attention_heads": size.heads,
        "num_key_value_heads": max(1, size.heads // 2),
        "head_dim": size.hidden // size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    write_random_model(directory, entries)


def write_random_model(directory: Path, entries: dict[str, Any]) -> None:
    """A Hugging Face directory of a config.json's entries, with float32 weights as `random_weights` draws them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(entries))
    random_weights(directory, torch.float32, torch.device("cpu"))


def random_weights(directory: Path, dtype: torch.dtype, device: torch.device) -> None:
    """`model.safetensors` for the config.json of a directory, drawn on `device`: matrices normal, vectors one."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return (torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5).to("cpu", dtype)

    shapes = ParameterMap(read_dimensions(directory)).hf_tensors
    save_file({name: draw(shape) for name, shape in shapes.items()}, directory / "model.safetensors")


@contextmanager
def policy(rank: int, ranks: int, port: int, hf_dir: Path, **sections: dict[str, Any]) -> Iterator[Policy]:
    """This rank's part of a policy, of float32 unless told, while the block runs."""
    model = {"hf_dir": hf_dir, "dtype": "float32", **sections.pop("model", {})}
    config = Config(model=model, data={"train_files": ["unused"]}, **sections)
    made = Policy(config, Rendezvous(port, rank=rank, world_size=ranks), device="cpu")
    try:
        yield made
    finally:
        made.close()


def batch(sequences: int, tokens: int, vocab: int, *, seed: int = 1) -> list[Sequence]:
    """Sequences of so many tokens, all but the first of which are response, with every field a loss reads."""
    generator = torch.Generator().manual_seed(seed)
    response = tokens - 1
    return [
        Sequence(
            tokens=torch.randint(vocab, (tokens,), generator=generator),
            prompt_length=1,
            advantages=torch.randn(response, generator=generator),
            old_logprobs=torch.randn(response, generator=generator) - 5.0,
        )
        for _ in range(sequences)
    ]
