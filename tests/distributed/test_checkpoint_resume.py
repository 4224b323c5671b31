"""Resuming is training on: the steps after a resume, in other processes, against those of the run that went on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import random_sequences, transformers_statistics, write_tiny_model

from megatron_entropic.checkpoints.convert import megatron_to_hf
from megatron_entropic.checkpoints.convert_adapter import megatron_to_peft
from megatron_entropic.errors import UserError

SCRIPT = Path(__file__).parent / "scripts" / "checkpoint_resume.py"
PLAIN = {"distributed_optimizer": False}
EXPERTS = {"family": "qwen3_moe"}
LORA = {"lora": {"rank": 3, "alpha": 6.0, "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]}}
LOCAL = {"feedback": "microbatch_local"}


def _run(name: str, checkpoint: str, layout: dict[str, Any] | None = None, dtype: str = "float32", **more: Any) -> dict:
    described = {"name": name, "checkpoint": checkpoint, "layout": layout or {}, "dtype": dtype, "family": "qwen3"}
    return described | more


SAVED = {
    "tp2": _run("tp2", "from_tp2", {"tensor_parallel": 2}),
    "dp2": _run("dp2", "from_dp2"),
    "dp2 plain": _run("dp2 plain", "from_dp2_plain", PLAIN),
    "dp2 whole": _run("dp2 whole", "from_dp2_whole", format="fully_reshardable"),
    "dp2 bfloat16": _run("dp2 bfloat16", "from_dp2_bfloat16", dtype="bfloat16"),
    "ep2": _run("ep2", "from_ep2", {"expert_parallel": 2}, **EXPERTS),
    "experts tp2 sp": _run(
        "experts tp2 sp", "from_experts_tp2", {"tensor_parallel": 2, "sequence_parallel": True}, **EXPERTS
    ),
    "adapters dp2": _run("adapters dp2", "from_adapters_dp2", LORA),
    "adapters tp2 sp": _run(
        "adapters tp2 sp",
        "from_adapters_tp2",
        {"tensor_parallel": 2, "sequence_parallel": True, **LORA},
        dtype="bfloat16",
    ),
    "dp2 local": _run("dp2 local", "from_dp2_local", control=LOCAL),
    "pp2 vpp2": _run("pp2 vpp2", "from_pp2_vpp2", {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2}),
    "pp2 of 3 and 1": _run("pp2 of 3 and 1", "from_pp2_uneven", {"pipeline_parallel": 2, "first_stage_layers": 3}),
}
RESHARDED = {
    2: {
        "tp2 to dp2": _run("tp2 to dp2", "from_tp2"),
        "tp2 to pp2": _run("tp2 to pp2", "from_tp2", {"pipeline_parallel": 2}),
        "dp2 to pp2 vpp2": _run(
            "dp2 to pp2 vpp2", "from_dp2", {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2}
        ),
        "pp2 of 3 and 1 to pp2": _run("pp2 of 3 and 1 to pp2", "from_pp2_uneven", {"pipeline_parallel": 2}),
        "pp2 vpp2 to cp2": _run("pp2 vpp2 to cp2", "from_pp2_vpp2", {"context_parallel": 2}),
        "dp2 to tp2 sp": _run("dp2 to tp2 sp", "from_dp2", {"tensor_parallel": 2, "sequence_parallel": True}),
        "ep2 to pp2": _run("ep2 to pp2", "from_ep2", {"pipeline_parallel": 2}, **EXPERTS),
        "experts tp2 sp to ep2": _run("experts tp2 sp to ep2", "from_experts_tp2", {"expert_parallel": 2}, **EXPERTS),
        "adapters dp2 to tp2": _run("adapters dp2 to tp2", "from_adapters_dp2", {"tensor_parallel": 2, **LORA}),
        "adapters dp2 to pp2": _run("adapters dp2 to pp2", "from_adapters_dp2", {"pipeline_parallel": 2, **LORA}),
        "dp2 whole to tp2": _run("dp2 whole to tp2", "from_dp2_whole", {"tensor_parallel": 2}),
        "dp2 plain to tp2": _run("dp2 plain to tp2", "from_dp2_plain", {"tensor_parallel": 2, **PLAIN}),
    },
    1: {
        "pp2 vpp2 to one rank": _run("pp2 vpp2 to one rank", "from_pp2_vpp2"),
        "ep2 to one rank": _run("ep2 to one rank", "from_ep2", **EXPERTS),
        "dp2 to one rank": _run("dp2 to one rank", "from_dp2"),
        "dp2 whole to one rank": _run("dp2 whole to one rank", "from_dp2_whole"),
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for family in ("qwen3", "qwen3_moe"):
        write_tiny_model(family, directory / family)
    generator = torch.Generator().manual_seed(29)
    fields = [
        {
            "tokens": tokens,
            "prompt_length": prompt,
            "advantages": torch.randn(len(tokens) - prompt, generator=generator),
            "old_logprobs": -5.0 + 0.3 * torch.randn(len(tokens) - prompt, generator=generator),
        }
        for tokens, prompt in random_sequences()
    ]
    torch.save(fields, directory / "sequences.pt")
    return directory


def _launch(run_ranks: Any, mode: str, world_size: int, work: Path, runs: dict[str, dict]) -> list[dict[str, Any]]:
    outputs = run_ranks(SCRIPT, world_size, mode, work, json.dumps(list(runs.values())), timeout_s=540)
    return [json.loads(output) for output in outputs]


@pytest.fixture(scope="module")
def trained(run_ranks_once, work) -> list[dict[str, Any]]:
    """What each rank of each uninterrupted run saw after its checkpoint."""
    return _launch(run_ranks_once, "train", 2, work, SAVED)


@pytest.fixture(scope="module")
def resumed(run_ranks_once, work, trained) -> list[dict[str, Any]]:
    """The same runs continued by other processes, and those with another layout."""
    return _launch(run_ranks_once, "resume", 2, work, {**SAVED, **RESHARDED[2]})


@pytest.mark.parametrize("name", SAVED)
def test_the_same_layout_goes_on_bit_for_bit(trained, resumed, work, name):
    for before, after in zip(trained, resumed, strict=True):
        assert after[name] == {key: before[name][key] for key in after[name]}
    went_on, came_back = (torch.load(work / f"{name}.{mode}.pt")["after"] for mode in ("train", "resume"))
    assert all(torch.equal(went_on[key], came_back[key]) for key in went_on)


def test_only_what_is_asked_for_whole_is_written_whole(trained, work):
    """Without the distributed optimizer there are no shards; checkpoints of older versions are whole, too."""
    in_shards = {name for name, run in SAVED.items() if list(work.glob(f"{run['checkpoint']}/step_*/*_shards.json"))}
    assert in_shards == set(SAVED) - {"dp2 whole", "dp2 plain"}


@pytest.mark.parametrize("name", SAVED)
def test_the_comparison_can_fail(trained, name):
    first, second = trained[0][name]["trace"]
    assert first["grad_norm"] != second["grad_norm"]
    assert first["learning_rate"] != second["learning_rate"], "the schedule stands still: its state is not tested"
    assert first["entropy/integral"] != second["entropy/integral"]
    assert trained[0][name]["adam steps"] == [[2.0], [4.0]]
    assert trained[0][name]["random"] != trained[1][name]["random"], "the generators of ranks are in the same state"


@pytest.mark.parametrize("name", RESHARDED[2])
def test_another_layout_goes_on_to_rounding(trained, resumed, work, name):
    _compare(trained[0], resumed[0], work, name)


def test_another_number_of_ranks_goes_on_to_rounding(run_ranks, trained, work):
    (report,) = _launch(run_ranks, "resume", 1, work, RESHARDED[1])
    for name in RESHARDED[1]:
        _compare(trained[0], report, work, name)


def _compare(trained: dict[str, Any], resumed: dict[str, Any], work: Path, name: str) -> None:
    source = name.split(" to ")[0]
    for expected, found in zip(trained[source]["trace"], resumed[name]["trace"], strict=True):
        for key in ("loss/policy", "grad_norm", "entropy/alpha", "entropy/mean", "learning_rate", "entropy/integral"):
            value = float.fromhex(expected[key])
            assert float.fromhex(found[key]) == pytest.approx(value, rel=5e-6), (name, key)
    assert resumed[name]["adam steps"] == trained[source]["adam steps"]
    expected, found = torch.load(work / f"{source}.train.pt"), torch.load(work / f"{name}.resume.pt")
    assert set(found["before"]) == set(expected["before"])
    for key, value in expected["before"].items():
        assert torch.equal(found["before"][key], value), f"{name}: {key} was restored to other values"
    for key, value in expected["after"].items():
        assert float((found["after"][key] - value).abs().max()) < 2e-6, f"{name}: {key}"


@pytest.mark.parametrize("name", SAVED)
def test_the_export_is_the_trained_model_to_transformers(trained, work, name):
    file = "adapter/adapter_model.safetensors" if "lora" in SAVED[name]["layout"] else "model.safetensors"
    exported = safetensors.torch.load_file(work / f"{name}.hf" / file)
    parameters = torch.load(work / f"{name}.train.pt")["after"]
    assert set(exported) == set(parameters)
    assert all(torch.equal(exported[key], parameters[key]) for key in parameters)
    if SAVED[name]["dtype"] != "float32":
        return
    statistics = transformers_statistics(work / f"{name}.hf", random_sequences(), temperature=1.0)
    entropies = torch.cat([entropy for _, entropy in statistics])
    for report in trained:
        assert report[name]["entropy of the exported"] == pytest.approx(float(entropies.mean()), rel=1e-6)


def test_adapters_of_a_checkpoint_become_peft_s(trained, work, tmp_path):
    (checkpoint,) = work.glob("from_adapters_dp2/step_*")
    megatron_to_peft(checkpoint, work / "qwen3", tmp_path / "adapter")
    converted = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = torch.load(work / "adapters dp2.train.pt")["before"]
    assert set(converted) == set(saved)
    assert all(torch.equal(converted[key], saved[key]) for key in saved)
    with pytest.raises(UserError, match=r"holds adapters and no weights.*megatron-to-peft"):
        megatron_to_hf(checkpoint, tmp_path / "hf", template_dir=work / "qwen3")


def test_a_save_that_fails_costs_nothing(run_ranks, work):
    layout = {"tensor_parallel": 2}
    runs = {
        "awaited": _run("awaited", "failing", layout, asynchronous=False),
        "in the background": _run("in the background", "failing_later", layout, asynchronous=True),
    }
    both = _launch(run_ranks, "fail", 2, work, runs)
    assert both[0] == both[1], "ranks must agree, messages included"
    for report in both[0].values():
        for case, cause in (
            ("rank 0 cannot write", "rank 0: [Errno 27] File too large"),
            ("rank 1 cannot write", "rank 1: "),
            ("disk too small", "MiB are free"),
        ):
            message, left, state = report[case]
            assert "step_00000002 could not be written" in message, case
            assert "earlier checkpoints are complete" in message, case
            assert cause in message, case
            assert left == ["step_00000001"], f"{case}: the partial checkpoint is still there"
            assert state["driver"] == {"step": 1}
        message, _, state = report["rank 0 cannot write or remove"]
        assert "step_00000002 could not be written: rank 0: [Errno 27] File too large" in message
        assert state["driver"] == {"step": 1}
        message, exists = report["export"]
        assert "export to" in message
        assert "File too large" in message
        assert not exists
        assert report["kept"] == ["step_00000003", "step_00000004"], "keep_last is 2"
