"""Options that are handed to megatron-core: what they need of other keys, of the model and of the machine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from test_config import machine, problems_of, write

from megatron_entropic.config.load import load_config
from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.policy.model.transformer_config import _dispatcher
from megatron_entropic.training.machine import load_checked_config, machine_violations

__all__ = ["machine"]


def test_options_of_megatron_core_have_conditions(machine: Path) -> None:
    path = write(machine)
    options = ("optimizer.state_dtype=bfloat16", "policy.gradient_dtype=bfloat16", "policy.moe_dispatcher=deepep")
    rest = ("model.dtype=float32", "cluster.device=cpu", "policy.distributed_optimizer=false")
    assert problems_of(path, *options, *rest) == [
        "policy.gradient_dtype=bfloat16 needs model.dtype=bfloat16, it is float32",
        "optimizer.state_dtype=bfloat16 needs model.dtype=bfloat16, it is float32",
        "optimizer.state_dtype=bfloat16 needs a GPU, but cluster.device is cpu",
        "optimizer.state_dtype=bfloat16 needs policy.distributed_optimizer=true: only that one of megatron-core has it",
        "policy.moe_dispatcher=deepep needs GPUs, but cluster.device is cpu",
        "policy.moe_dispatcher=deepep needs policy.expert_parallel > 1: on one rank there is nobody to send tokens to",
        f"policy.moe_dispatcher=deepep needs a model with experts, and {machine / 'model'} has none",
    ]
    load_checked_config(path, ["policy.gradient_dtype=bfloat16", "model.dtype=bfloat16"])


def test_packages_that_options_need_are_looked_for_before_the_start(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "deep_ep", sys)  # so that what a test imports is forgotten after it
    monkeypatch.delitem(sys.modules, "deep_ep")
    layout = ["cluster.device=cuda", "model.dtype=bfloat16", "policy.data_parallel=2", "policy.expert_parallel=2"]

    def problem(option: str) -> str:
        config = load_config(write(machine), [*layout, option])
        return next(
            (violation.message for violation in machine_violations(config) if "needs deep_ep" in violation.message), ""
        )

    assert problem("policy.moe_dispatcher=deepep").startswith(
        "policy.moe_dispatcher=deepep needs deep_ep, which is not installed: it is built from https://github.com/"
    )
    (folder / "deep_ep.py").write_text("class Buffer: ...\n")
    importlib.invalidate_caches()
    assert problem("policy.moe_dispatcher=deepep") == ""
    assert "whose installed version has no HybridEPBuffer" in problem("policy.moe_dispatcher=hybridep")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(write(machine), [*layout, "optimizer.state_dtype=bfloat16"])
    (wanted,) = [one.message for one in machine_violations(config) if one.keys == ("optimizer.state_dtype",)]
    assert wanted == (
        "optimizer.state_dtype=bfloat16 needs transformer_engine, which is not installed: bash tools/environment.sh "
        "gpu installs it, or leave optimizer.state_dtype as it was"
    )


def test_dispatchers_are_settings_that_the_installed_megatron_core_takes() -> None:
    from megatron.core.transformer import TransformerConfig

    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_moe_experts": 4,
        "add_bias_linear": False,
    }
    for name in ("alltoall", "deepep", "hybridep"):
        settings = _dispatcher(PolicyConfig(moe_dispatcher=name))
        taken = TransformerConfig(**sizes, **settings, moe_router_dtype="fp32", variable_seq_lengths=True)
        assert taken.moe_token_dispatcher_type == ("alltoall" if name == "alltoall" else "flex")
        assert name in ("alltoall", taken.moe_flex_dispatcher_backend)
