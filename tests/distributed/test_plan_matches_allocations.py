"""The plan's bytes against real allocations on the CPU: parameters, gradients and optimizer state to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_model

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import ITEM_BYTES
from megatron_entropic.planning.activations import layer_bytes
from megatron_entropic.planning.memory import optimizer_bytes_per_element
from megatron_entropic.planning.parameters import ParameterTable, PlannedModel, find_model

SCRIPT = Path(__file__).parent / "scripts" / "allocations.py"
LENGTHS = [100, 100, 90, 110]


def _case(family: str = "qwen3", dtype: str = "float32", lengths: Any = None, **policy: Any) -> dict[str, Any]:
    return {"family": family, "dtype": dtype, "lengths": lengths, "policy": policy}


LORA = {"rank": 5, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
FEWER_ADAPTERS = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "tp1": _case(distributed_optimizer=False),
        "tp1 distributed bf16": _case(dtype="bfloat16"),
        "tied": _case("qwen2", "bfloat16", distributed_optimizer=False),
        "saved": _case(lengths=LENGTHS),
        "saved full": _case(lengths=LENGTHS, recompute="full"),
        "saved selective": _case(lengths=LENGTHS, recompute="selective"),
        "saved bf16": _case(dtype="bfloat16", lengths=LENGTHS),
        "saved without qk norm": _case("qwen2", lengths=LENGTHS),
        "saved latent": _case("deepseek_v3", lengths=LENGTHS),
        "saved adapters": _case(lengths=LENGTHS, lora=LORA),
        "saved adapters bf16": _case("llama", dtype="bfloat16", lengths=LENGTHS, lora=LORA),
        "saved few adapters tied": _case("qwen2", lengths=LENGTHS, lora=FEWER_ADAPTERS, distributed_optimizer=False),
        "saved adapters full": _case(lengths=LENGTHS, lora=LORA, recompute="full"),
    },
    2: {
        "tp2": _case(tensor_parallel=2),
        "tp2 bf16": _case(dtype="bfloat16", tensor_parallel=2, distributed_optimizer=False),
        "pp2": _case(pipeline_parallel=2),
        "pp2 of 3 and 1 layers": _case("mixtral", pipeline_parallel=2, last_stage_layers=1),
        "pp2 vpp2 tied": _case("qwen2", pipeline_parallel=2, virtual_pipeline_parallel=2),
        "cp2": _case(context_parallel=2),
        "pp2 tied": _case("qwen2", "bfloat16", pipeline_parallel=2),
        "dp2 distributed": _case(),
        "dp2 distributed bf16": _case(dtype="bfloat16"),
        "dp2 distributed llama": _case("llama"),
        "dp2 plain": _case(distributed_optimizer=False),
        "dp2 plain bf16": _case(dtype="bfloat16", distributed_optimizer=False),
        "dp2 gradients bf16": _case(dtype="bfloat16", gradient_dtype="bfloat16"),
        "experts ep2 gradients bf16": _case("mixtral", "bfloat16", expert_parallel=2, gradient_dtype="bfloat16"),
        "experts ep2": _case("mixtral", expert_parallel=2),
        "experts dp2": _case("mixtral"),
        "latent tp2 sp": _case("deepseek_v3", tensor_parallel=2, sequence_parallel=True),
        "saved tp2": _case(lengths=LENGTHS, tensor_parallel=2),
        "saved tp2 sp": _case(lengths=LENGTHS, tensor_parallel=2, sequence_parallel=True),
        "saved tp2 sp full": _case(lengths=LENGTHS, tensor_parallel=2, sequence_parallel=True, recompute="full"),
        "saved adapters tp2": _case(lengths=LENGTHS, tensor_parallel=2, lora=LORA),
        "saved adapters tp2 sp": _case(lengths=LENGTHS, tensor_parallel=2, sequence_parallel=True, lora=LORA),
        "adapters pp2 tied": _case("qwen2", "bfloat16", pipeline_parallel=2, lora=LORA),
        "adapters dp2": _case(lora=LORA),
        "saved experts ep2": _case("mixtral", "bfloat16", lengths=LENGTHS, expert_parallel=2),
        "saved experts tp2 ep2 etp1": _case(
            "mixtral",
            lengths=LENGTHS,
            tensor_parallel=2,
            sequence_parallel=True,
            expert_parallel=2,
            expert_tensor_parallel=1,
        ),
        "saved experts tp2": _case("mixtral", lengths=LENGTHS, tensor_parallel=2, sequence_parallel=True),
        "saved experts and dense layers ep2": _case("qwen3_moe", lengths=LENGTHS, expert_parallel=2),
    },
    4: {
        "tp2 pp2": _case(tensor_parallel=2, pipeline_parallel=2),
        "experts pp2 vpp2 ep2": _case("mixtral", pipeline_parallel=2, virtual_pipeline_parallel=2, expert_parallel=2),
        "experts dp4 ep2 bf16": _case("mixtral", "bfloat16", expert_parallel=2),
        "latent pp2 ep2 bf16": _case("deepseek_v3", "bfloat16", pipeline_parallel=2, expert_parallel=2),
        "pp2 vpp2 dp2": _case(pipeline_parallel=2, virtual_pipeline_parallel=2),
        "pp2 dp2 tied": _case("qwen2", pipeline_parallel=2, dtype="bfloat16"),
    },
}
ALL = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan")
    for family in ("qwen3", "qwen2", "llama", "mixtral", "qwen3_moe", "deepseek_v3"):
        write_tiny_model(family, directory / family)
    return directory


@pytest.fixture(scope="module")
def measured(models: Path, run_ranks_once: Any) -> dict[int, list[dict[str, Any]]]:
    """Per number of ranks: what each rank reported."""
    reports = {}
    for ranks, cases in CASES.items():
        named = {name: {**case, "hf_dir": str(models / case["family"])} for name, case in cases.items()}
        outputs = run_ranks_once(SCRIPT, ranks, json.dumps(named))
        reports[ranks] = [json.loads(output.splitlines()[-1]) for output in outputs]
    return reports


def _layout(case: dict[str, Any], ranks: int) -> PolicyConfig:
    layout = PolicyConfig(**case["policy"])
    return layout.model_copy(update={"data_parallel": ranks // layout.world_size})


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_static_bytes_are_exact(ranks: int, name: str, models: Path, measured: dict[int, list[dict[str, Any]]]) -> None:
    case = CASES[ranks][name]
    policy, item = _layout(case, ranks), ITEM_BYTES[case["dtype"]]
    table = ParameterTable(find_model(models / case["family"]))
    for report in (rank[name] for rank in measured[ranks]):
        parameters = table.stage(policy, report["stage"]).elements
        if policy.lora.enabled:
            parameters += table.trained(policy.lora).stage(policy, report["stage"]).elements
        buffers = table.buffers(policy, report["stage"], overlap=False)
        rank_of = {False: report["data_rank"], True: report["expert_data_rank"]}
        owned = sum(buffer.owned_elements(rank_of[buffer.expert]) for buffer in buffers)
        padded = sum(buffer.padded_elements for buffer in buffers)
        state = optimizer_bytes_per_element(case["dtype"])
        assert report["parameters"] == parameters * item
        assert report["parameter_buffer"] == (padded * item if policy.distributed_optimizer else 0)
        assert report["gradients"] == padded * ITEM_BYTES[policy.gradient_dtype]
        assert report["moments"] + report["main_parameters"] == owned * state
        assert report["moments"] == owned * 8


@pytest.mark.parametrize(("ranks", "name"), [pair for pair in ALL if pair[1].startswith("saved")])
def test_saved_activations(ranks: int, name: str, models: Path, measured: dict[int, list[dict[str, Any]]]) -> None:
    case = CASES[ranks][name]
    policy = _layout(case, ranks)
    model = find_model(models / case["family"])
    expected = _saved_bytes(model, policy, case)
    found = [rank[name]["activations"] for rank in measured[ranks]]
    if model.experts is not None:
        # What a rank's experts get is up to the router; together they get every copy of every token.
        found = [sum(found) / len(found)]
    for activations in found:
        assert activations == pytest.approx(expected, rel=0.05), activations / expected


def _saved_bytes(model: PlannedModel, policy: PolicyConfig, case: dict[str, Any]) -> float:
    """All layers, and what the last norm and the output head keep."""
    tokens = sum(case["lengths"])
    layers = [
        layer_bytes(
            model, policy, tokens, dtype=case["dtype"], attention="sdpa", experts=model.dimensions.has_experts(layer)
        )
        for layer in range(model.dimensions.num_layers)
    ]
    return sum(layer.saved for layer in layers) + layers[-1].final
