"""One update and a short training under every layout against plain autograd over transformers in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import reference_update
import torch
from safetensors.torch import load_file
from tiny_models import random_sequences, write_tiny_adapter, write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "update_layouts.py"
TOLERANCE = 1e-5
"""Relative; both sides share the float32 weights, one computes in float32."""
BASE: dict[str, Any] = {
    "family": "qwen3",
    "temperature": 0.7,
    "max_response_tokens": 64,
    "aggregation": "token-mean",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "importance_cap": None,
    "kl": 0.0,
    "controller": "pi",
    "kp": 0.07,
    "ki": 0.05,
    "denominator": "all_tokens",
    "ratio_clip": "none",
    "feedback": "score_pass",
    "on_policy": False,
    "aux_loss": 0.0,
    "steps": 5,
    "lora": None,
    "adapter_dir": None,
}
EVERYTHING = {"importance_cap": 1.3, "kl": 0.07, "ratio_clip": "ppo"}
LATENT = "experts, latent attention"
UNSOLVED = "prompts have alphas of their own"
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTED: dict[str, dict[str, Any]] = {
    "all modules": {"lora": {"rank": 5, "alpha": 7.0, "target_modules": ALL_MODULES}},
    "some modules, tied": {
        "family": "qwen2",
        "lora": {"rank": 3, "alpha": 6.0, "target_modules": ["k_proj", "v_proj", "up_proj", "down_proj"]},
    },
    "attention beside experts": {
        "family": "qwen3_moe",
        "lora": {"rank": 4, "alpha": 4.0, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    },
}
"""Low-rank adapters, which peft writes and computes with on the other side."""
CASES: dict[str, dict[str, Any]] = {
    "token-mean": {},
    "token-mean high": {"denominator": "high_prob_tokens", **EVERYTHING},
    "token-mean high on-policy": {"denominator": "high_prob_tokens", "on_policy": True},
    UNSOLVED: {"controller": "unsolved", **EVERYTHING},
    "seq-mean-token-sum": {"aggregation": "seq-mean-token-sum", **EVERYTHING},
    "seq-mean-token-sum high": {"aggregation": "seq-mean-token-sum", "denominator": "high_prob_tokens"},
    "seq-mean-token-mean": {"aggregation": "seq-mean-token-mean", **EVERYTHING},
    "seq-mean-token-mean high": {"aggregation": "seq-mean-token-mean", "denominator": "high_prob_tokens"},
    "seq-mean-token-sum-norm": {"aggregation": "seq-mean-token-sum-norm", **EVERYTHING},
    "seq-mean-token-sum-norm high": {"aggregation": "seq-mean-token-sum-norm", "denominator": "high_prob_tokens"},
    "tied embeddings and biases": {"family": "qwen2", **EVERYTHING},
    "experts": {"family": "qwen3_moe"},
    "experts, balanced": {"family": "qwen3_moe", "aux_loss": 0.3},
    "experts, weights add up to 1": {"family": "mixtral", "denominator": "high_prob_tokens", **EVERYTHING},
    LATENT: {"family": "deepseek_v3", **EVERYTHING},
    **{f"adapters, {name}": {**case, **EVERYTHING} for name, case in ADAPTED.items()},
}
TRAIN_CASE, TRAIN_STEPS = "token-mean high", 5
OPTIMIZER = {
    "learning_rate": 2e-3,
    "min_learning_rate": 1e-4,
    "warmup_steps": 2,
    # Large, so that a decayed norm would show.
    "weight_decay": 0.3,
    "beta1": 0.9,
    "beta2": 0.99,
    # A gradient of rounding noise must not become a step of full size.
    "epsilon": 1e-4,
    "gradient_clip": 0.5,
    "total_steps": BASE["steps"],
}
FEWER = ("token-mean high", "seq-mean-token-mean", "tied embeddings and biases")
"""For layouts that combine others."""
EXPERTS = ("experts", "experts, weights add up to 1", LATENT)
DENSE = tuple(name for name in CASES if not name.startswith(("experts", "adapters")))
ADAPTERS = tuple(f"adapters, {name}" for name in ADAPTED)


def _layout(
    cases: Any = FEWER,
    train: tuple[str, ...] = ("distributed",),
    train_case: str = TRAIN_CASE,
    *,
    reverse: bool = False,
    **layout: Any,
) -> dict[str, Any]:
    policy = {"tokens_per_microbatch": 40, **layout}
    return {"layout": policy, "cases": list(cases), "train": train, "train_case": train_case, "reverse": reverse}


def _balanced(**layout: Any) -> dict[str, Any]:
    """All sequences in one micro-batch: the loss is one of its tokens, not a sum over sequences."""
    coefficient = CASES["experts, balanced"]["aux_loss"]
    return _layout(
        ["experts, balanced"], (), tokens_per_microbatch=16384, moe_aux_loss_coefficient=coefficient, **layout
    )


def _experts(train: tuple[str, ...] = (), **layout: Any) -> dict[str, Any]:
    return _layout(EXPERTS, train, EXPERTS[0], **layout)


def _adapters(train: tuple[str, ...] = ("distributed",), **layout: Any) -> dict[str, Any]:
    return _layout(ADAPTERS, train, ADAPTERS[0], **layout)


LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one rank": _layout(DENSE, ("plain", "distributed"), tokens_per_microbatch=16384),
        "one rank, small micro-batches": _layout(),
        "one rank, stored logits": _layout(train=(), output_head="logits"),
        "one rank, recomputed logits": _layout(train=(), output_head="recompute"),
        "one rank, experts": _experts(recompute="full"),
        "one rank, auxiliary loss": _balanced(recompute="full"),
        "one rank, sequences in reverse": _layout(train=(), reverse=True),
        "one rank, adapters": _adapters(("plain", "distributed")),
        "one rank, adapters, full recomputation": _adapters((), recompute="full"),
        "one rank, adapters, stored logits": _adapters((), output_head="logits"),
        "one rank, whole sequences": _layout(FEWER[:1], (), prefix_sharing="off"),
    },
    2: {
        "tp2": _layout(DENSE, tensor_parallel=2),
        "tp2 sp": _layout(tensor_parallel=2, sequence_parallel=True),
        "tp2 sp, stored logits": _layout(tensor_parallel=2, sequence_parallel=True, train=(), output_head="logits"),
        "tp2 sp, recomputed logits": _layout(
            tensor_parallel=2, sequence_parallel=True, train=(), output_head="recompute"
        ),
        "pp2": _layout((*FEWER, UNSOLVED), pipeline_parallel=2),
        "dp2": _layout(DENSE, ("plain", "distributed"), tokens_per_microbatch=60),
        "dp2, one sequence a micro-batch": _layout(tokens_per_microbatch=1),
        "cp2": _layout((*DENSE, *EXPERTS), context_parallel=2),
        "cp2, stored logits": _layout(context_parallel=2, train=(), output_head="logits"),
        "tp2 sp, auxiliary loss": _balanced(tensor_parallel=2, sequence_parallel=True),
        "ep2": _experts(("plain", "distributed"), expert_parallel=2),
        "ep2, latent attention": _layout((), train_case=LATENT, expert_parallel=2),
        "tp2 sp, full recomputation": _layout(
            FEWER[:1], (), tensor_parallel=2, sequence_parallel=True, recompute="full"
        ),
        "tp2, adapters": _layout(ADAPTERS[:2], train_case=ADAPTERS[0], tensor_parallel=2),
        "tp2 sp, adapters": _adapters(tensor_parallel=2, sequence_parallel=True),
        "pp2, adapters": _adapters(pipeline_parallel=2, recompute="full"),
        "dp2, adapters": _adapters(("plain", "distributed"), tokens_per_microbatch=60),
        "cp2, adapters": _adapters(context_parallel=2, recompute="selective"),
        "ep2, adapters": _layout(ADAPTERS[2:], train_case=ADAPTERS[2], expert_parallel=2),
        "cp2, selective recomputation": _layout(FEWER[:1], (), context_parallel=2, recompute="selective"),
    },
    4: {
        "tp2 pp2 sp": _layout((*FEWER, UNSOLVED), tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
        "pp2 dp2": _layout(pipeline_parallel=2),
        "pp2 of 3 and 1 layers, dp2": _layout(FEWER[:1], pipeline_parallel=2, last_stage_layers=1),
        "pp4": _layout(pipeline_parallel=4, train=()),
        "tp2 pp2 vpp2 sp": _layout(
            tensor_parallel=2, pipeline_parallel=2, virtual_pipeline_parallel=2, sequence_parallel=True
        ),
        "pp2 vpp2 dp2": _layout(
            ("token-mean high",), pipeline_parallel=2, virtual_pipeline_parallel=2, tokens_per_microbatch=60
        ),
        "cp2 tp2 sp": _layout(context_parallel=2, tensor_parallel=2, sequence_parallel=True),
        "cp2 dp2": _layout(("seq-mean-token-mean high",), context_parallel=2, tokens_per_microbatch=60),
        "cp2 pp2, recomputed logits": _layout(
            context_parallel=2, pipeline_parallel=2, train=(), output_head="recompute"
        ),
        "tp2 pp2 vpp2 sp, adapters": _adapters(
            tensor_parallel=2, pipeline_parallel=2, virtual_pipeline_parallel=2, sequence_parallel=True
        ),
        "tp2 ep2 sp": _experts(tensor_parallel=2, sequence_parallel=True, expert_parallel=2),
        "tp2 ep2 sp, experts whole": _experts(
            ("distributed",), tensor_parallel=2, sequence_parallel=True, expert_parallel=2, expert_tensor_parallel=1
        ),
        "pp2 ep2": _experts(pipeline_parallel=2, expert_parallel=2),
        "pp2 ep2 of 1 and 3 layers": _experts(pipeline_parallel=2, expert_parallel=2, first_stage_layers=1),
        "dp4 ep2": _experts(("distributed",), expert_parallel=2),
    },
}


def _conversation(count: int, generator: torch.Generator) -> torch.Tensor:
    """Which of `count` tokens the policy wrote of a conversation, [count] bool: turns of 1 to 6 tokens, it begins."""
    lengths = torch.randint(1, 7, (count,), generator=generator)
    origins = torch.arange(count) % 2 == 0
    return origins.repeat_interleave(lengths)[:count]


def _sequences(hf_dir: Path) -> tuple[list[dict], dict[str, float]]:
    """Sequences with fields of every kind, and what the model thinks of them: mean entropy, a tau in a wide gap."""
    generator = torch.Generator().manual_seed(17)
    sequences: list[dict] = []
    for number, (tokens, prompt) in enumerate(random_sequences()):
        mask = _conversation(len(tokens) - prompt, generator) if number % 2 else None
        written = len(tokens) - prompt if mask is None else int(mask.sum())
        advantages = torch.randn(written, generator=generator)
        advantages[torch.rand(advantages.shape, generator=generator) < 0.1] = 0.0
        own = {"tokens": tokens, "prompt_length": prompt, "advantages": advantages, "mask": mask}
        sequences.append({**own, "success": number % 5 / 4})
    model = reference_update.load_model(hf_dir)
    with torch.no_grad():
        stats = reference_update.statistics(model, sequences, BASE["temperature"])
    for sequence, (logprobs, _) in zip(sequences, stats, strict=True):
        sequence["current_logprobs"] = logprobs.float()
        for name, size in (("old", 0.5), ("rollout", 0.6), ("reference", 0.4)):
            noise = size * torch.randn(logprobs.shape, generator=generator)
            sequence[f"{name}_logprobs"] = (logprobs + noise).float()
    probabilities = torch.cat([logprobs for logprobs, _ in stats]).exp().sort().values
    middle = probabilities[len(probabilities) // 2 : -5]
    # In the upper half: some tokens on either side, none so near that rounding could move it across.
    widest = int((middle[1:] / middle[:-1]).argmax())
    tau = float((middle[widest] * middle[widest + 1]).sqrt())
    return sequences, {"entropy": reference_update.mean_entropy(stats), "tau": tau}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Models, sequences and the plan for the ranks; what plain autograd makes of every case."""
    # Beside other processes, a second thread for tensors this small costs eight times the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _prepare(tmp_path_factory.mktemp("update_parity"))
    finally:
        torch.set_num_threads(threads)


def _prepare(directory: Path) -> tuple[Path, dict[str, Any]]:
    fields: dict[str, list[dict]] = {}
    facts = {}
    for family in dict.fromkeys({**BASE, **case}["family"] for case in CASES.values()):
        write_tiny_model(family, directory / family)
        fields[family], facts[family] = _sequences(directory / family)
        torch.save(fields[family], directory / f"{family}.pt")
    cases = {}
    for name, changes in CASES.items():
        case = {**BASE, **changes}
        if case["lora"]:
            adapter_dir = directory / f"{case['family']}_adapter"
            write_tiny_adapter(directory / case["family"], adapter_dir, **case["lora"])
            case |= {"adapter_dir": str(adapter_dir), "lora": {**case["lora"], "adapter_dir": str(adapter_dir)}}
        fact = facts[case["family"]]
        cases[name] = {**case, "tau": fact["tau"], "target": fact["entropy"] - 4.0}
    plan = {"cases": cases, "train_steps": TRAIN_STEPS, "optimizer": OPTIMIZER}
    (directory / "plan.json").write_text(json.dumps(plan))
    expected: dict[str, Any] = {}
    for name, case in cases.items():
        sequences = fields[case["family"]]
        if case["on_policy"]:
            sequences = [{**sequence, "old_logprobs": sequence["current_logprobs"]} for sequence in sequences]
        expected[name] = reference_update.gradients(directory / case["family"], sequences, case)
    for name in (TRAIN_CASE, EXPERTS[0], LATENT, ADAPTERS[0], ADAPTERS[2]):
        family = cases[name]["family"]
        trained = reference_update.train(directory / family, fields[family], cases[name], OPTIMIZER, TRAIN_STEPS)
        stored = load_file(directory / family / "model.safetensors")
        buffers = {key: value for key, value in stored.items() if key not in trained["parameters"]}
        buffers = {} if cases[name]["lora"] else buffers
        expected[f"train {name}"] = {**trained, "buffers": buffers}
    return directory, expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_updates_do_not_depend_on_the_layout(run_ranks, prepared, tmp_path, world_size):
    directory, expected = prepared
    saved_path = tmp_path / "saved.pt"
    layouts = LAYOUTS[world_size]
    outputs = run_ranks(SCRIPT, world_size, directory, json.dumps(layouts), saved_path, timeout_s=540)
    reports = [json.loads(output) for output in outputs]
    saved = torch.load(saved_path)
    assert len(saved) == sum(len(layout["cases"]) + len(layout["train"]) for layout in layouts.values())
    for name, layout in layouts.items():
        for case in layout["cases"]:
            label = f"{name}/{case}"
            _check_metrics([report[label]["metrics"] for report in reports], expected[case], label)
            _check_tensors(saved[label], expected[case]["gradients"], label)
        for kind in layout["train"]:
            label = f"{name}/train/{kind}"
            _check_training(
                [report[label]["trace"] for report in reports],
                saved[label],
                expected[f"train {layout['train_case']}"],
                label,
            )
    if world_size == 2:
        counts = [report[f"dp2, one sequence a micro-batch/{FEWER[0]}"]["micro_batches"] for report in reports]
        assert counts[0][0] == counts[1][0], "replicas ran different numbers of micro-batches"
        assert sum(idle for _, idle in counts) > 0, "no replica had to wait for the other: nothing was tested"


def _check_metrics(by_rank: list[dict[str, str]], expected: dict[str, Any], name: str) -> None:
    assert all(metrics == by_rank[0] for metrics in by_rank), f"{name}: ranks report different metrics"
    metrics = {key: float.fromhex(value) for key, value in by_rank[0].items()}
    scale = max(abs(expected[term]) for term in ("policy", "entropic", "kl"))
    assert abs(expected["entropic"]) > 1e-3 * scale, f"{name}: the EntroPIC term is too small to be tested"
    for key, term in (("loss/policy", "policy"), ("loss/entropic", "entropic"), ("loss/kl", "kl")):
        assert metrics[key] == pytest.approx(expected[term], rel=TOLERANCE, abs=TOLERANCE * scale), (name, key)
    for key, term in (
        ("entropy/alpha", "alpha"),
        ("entropy/mean", "entropy"),
        ("grad_norm", "grad_norm"),
        ("entropy/high_prob_fraction", "high_prob_fraction"),
        ("ratio/clip_fraction", "clip_fraction"),
    ):
        assert metrics[key] == pytest.approx(expected[term], rel=TOLERANCE, abs=1e-12), (name, key)
    assert metrics["optimizer/skipped"] == 0.0
    if expected["busiest"]:
        mean = sum(expected["busiest"]) / len(expected["busiest"])
        # Padding, of which every rank may have a token or two, is counted too.
        assert metrics["moe/max_load"] == pytest.approx(mean, rel=0.05), name
        assert metrics["moe/max_load_worst_layer"] == pytest.approx(max(expected["busiest"]), rel=0.05), name
        assert metrics["moe/idle_experts"] == 0.0


def _check_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> None:
    assert set(found) == set(expected)
    for key, reference in expected.items():
        distance = float((found[key].double() - reference).norm() / reference.norm())
        assert distance < TOLERANCE, f"{name}: gradient of {key} is off by {distance:.1e} of its norm"
        assert distance > 0, f"{name}: {key} is bit-equal to float64, so nothing was compared"


def _check_training(traces: list[list[dict[str, str]]], parameters: Any, expected: dict[str, Any], name: str) -> None:
    assert all(trace == traces[0] for trace in traces), f"{name}: ranks report different metrics"
    assert min(expected["grad_norm"]) > OPTIMIZER["gradient_clip"], "clipping was never active"
    for step, metrics in enumerate(traces[0]):
        for key, term in (("entropy/alpha", "alpha"), ("grad_norm", "grad_norm"), ("learning_rate", "learning_rate")):
            # Rounding differences grow a little with every step.
            assert float.fromhex(metrics[key]) == pytest.approx(expected[term][step], rel=3 * TOLERANCE), (
                name,
                step,
                key,
            )
    for key, value in expected["buffers"].items():
        assert torch.equal(parameters[key], value), f"{name}: {key} is no parameter and moved"
    moved = sum(expected["learning_rate"])
    for key, reference in expected["parameters"].items():
        distance = float((parameters[key].double() - reference).abs().max())
        assert distance < 2e-4 * moved, f"{name}: {key} is off by {distance:.1e} after steps of {moved:.1e} in sum"
        assert math.isfinite(distance)
