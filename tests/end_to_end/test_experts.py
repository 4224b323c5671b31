"""A mixture of experts through the whole loop, with the routes of the score pass used again by its updates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_run import Run


@pytest.fixture(scope="module")
def mixture(countdown_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture with the tokenizer of the Countdown example; layer 1 is dense."""
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    dense = AutoConfig.from_pretrained(countdown_dir / "model")
    folder = tmp_path_factory.mktemp("mixture") / "model"
    shutil.copytree(countdown_dir / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        vocab_size=dense.vocab_size,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        hidden_size=64,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        num_hidden_layers=3,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rope_parameters=dense.rope_parameters,
        dtype="float32",
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def test_updates_use_the_routes_of_the_score_pass(mixture: Path, countdown_run: Callable[..., Run]) -> None:
    run = countdown_run(
        "experts",
        f"model.hf_dir={mixture}",
        "warm_start.steps=0",
        "policy.tensor_parallel=1",
        "policy.data_parallel=2",
        "policy.expert_parallel=2",
        "policy.moe_router_replay=score",
        "policy.tokens_per_microbatch=150",
        "algorithm.optimizer_steps_per_rollout=2",
        "optimizer.learning_rate=1e-2",
        "optimizer.warmup_steps=0",
        "train.steps=2",
    )
    run.finish()
    for row in run.metrics():
        assert row["mismatch/logprob_abs_max"] < 1e-3, "engine and policy disagree before the update"
        # Nothing differs in the first of the two updates; after its large step something does in the second.
        assert 0 < row["moe/replay_differs"] < 0.5
        assert row["moe/max_load"] >= 1
