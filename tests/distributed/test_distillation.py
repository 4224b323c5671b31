"""A teacher of another shape in the loss, under several layouts, against autograd over transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_update
import torch
from tiny_models import random_sequences, write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "distillation_layouts.py"
TEMPERATURE, COEFFICIENT = 0.7, 0.6
TOLERANCE = 1e-5
"""Relative: float32 against float64."""
UNTIED, TIED = {"student": "qwen3", "teacher": "qwen2"}, {"student": "qwen2", "teacher": "qwen3"}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "fused loss": {**UNTIED, "layout": {}},
        "tied, stored logits": {**TIED, "layout": {"output_head": "logits"}},
    },
    2: {
        "tp2 sp": {**TIED, "layout": {"tensor_parallel": 2, "sequence_parallel": True}},
        "cp2": {**UNTIED, "layout": {"context_parallel": 2}},
        "dp2, recomputed logits": {**TIED, "layout": {"output_head": "recompute"}},
    },
    4: {
        "tp2 pp2 vpp2 sp": {
            **UNTIED,
            "layout": {
                "tensor_parallel": 2,
                "pipeline_parallel": 2,
                "virtual_pipeline_parallel": 2,
                "sequence_parallel": True,
            },
        },
        "cp2 pp2, recomputed logits": {
            **UNTIED,
            "layout": {"context_parallel": 2, "pipeline_parallel": 2, "output_head": "recompute"},
        },
    },
}
CASE: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "importance_cap": None,
    "kl": 0.0,
    "denominator": "all_tokens",
    "ratio_clip": "none",
    "aggregation": "token-mean",
    "tau": 0.3,
    "max_response_tokens": 64,
    "controller": "pi",  # one alpha for all sequences
}
ALPHA = 0.5


def _turns(length: int) -> torch.Tensor:
    """Turns of five tokens of the policy and three of an environment, [length] bool."""
    return torch.arange(length) % 8 < 5


def _teach(student: Path, teacher: Path, sequences: list[dict[str, Any]]) -> dict[str, Any]:
    """The loss's terms, gradients by Hugging Face name, and the teacher's log-probs; all in float64."""
    model, frozen = reference_update.load_model(student), reference_update.load_model(teacher)
    stats = reference_update.statistics(model, sequences, TEMPERATURE)
    terms = reference_update.loss_terms(stats, sequences, CASE, ALPHA)
    divergences, taught = [], []
    for sequence in sequences:
        tokens, prompt = torch.tensor([sequence["tokens"]]), sequence["prompt_length"]
        own = (model(tokens).logits[0, prompt - 1 : -1] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            wanted = (frozen(tokens).logits[0, prompt - 1 : -1] / TEMPERATURE).log_softmax(-1)
        written = slice(None) if sequence["mask"] is None else sequence["mask"]
        divergences.append((own.exp() * (own - wanted)).sum(-1)[written])
        taught.append(wanted.gather(-1, tokens[0, prompt:, None]).squeeze(-1)[written])
    divergence = torch.cat(divergences).mean()
    (terms["policy"] + terms["entropic"] + COEFFICIENT * divergence).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {
        "policy": float(terms["policy"].detach()),
        "divergence": float(divergence.detach()),
        "gradients": reference_update.checkpoint_names(model, gradients),
        "taught": taught,
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("distillation")
    generator = torch.Generator().manual_seed(29)
    fields: dict[str, list[dict[str, Any]]] = {}
    for family in ("qwen3", "qwen2"):
        write_tiny_model(family, directory / family)
        plain = [
            {"tokens": tokens, "prompt_length": prompt, "mask": _turns(len(tokens) - prompt) if number % 2 else None}
            for number, (tokens, prompt) in enumerate(random_sequences())
        ]
        with torch.no_grad():
            stats = reference_update.statistics(reference_update.load_model(directory / family), plain, TEMPERATURE)
        for sequence, (logprobs, _) in zip(plain, stats, strict=True):
            noise = [torch.randn(logprobs.shape, generator=generator) for _ in range(2)]
            sequence |= {"advantages": noise[0], "old_logprobs": (logprobs + 0.4 * noise[1]).float()}
        fields[family] = [{**sequence, "reference_logprobs": sequence["old_logprobs"]} for sequence in plain]
        saved = [{**sequence, "tokens": torch.tensor(sequence["tokens"])} for sequence in plain]
        torch.save(saved, directory / f"{family}.pt")
    algorithm = {name: CASE[name] for name in ("aggregation", "clip_low", "clip_high", "dual_clip")}
    control = {"controller": "constant", "rivals": {"alpha": ALPHA}, "tau": CASE["tau"]}
    sections = {
        "rollout": {"temperature": TEMPERATURE, "max_response_tokens": 64},
        "algorithm": algorithm,
        "entropy_control": control,
        "optimizer": {"gradient_clip": 0.0, "learning_rate": 1e-4},
    }
    (directory / "sections.json").write_text(json.dumps(sections))
    expected = {
        "qwen3": _teach(directory / "qwen3", directory / "qwen2", fields["qwen3"]),
        "qwen2": _teach(directory / "qwen2", directory / "qwen3", fields["qwen2"]),
    }
    return directory, expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_distillation_does_not_depend_on_the_layout(
    run_ranks: Callable[..., list[str]], prepared: tuple[Path, dict[str, Any]], tmp_path: Path, world_size: int
) -> None:
    directory, expected = prepared
    layouts, saved_path = LAYOUTS[world_size], tmp_path / "saved.pt"
    outputs = run_ranks(SCRIPT, world_size, directory, json.dumps(layouts), saved_path, timeout_s=300)
    reports = [json.loads(output) for output in outputs]
    saved = torch.load(saved_path)
    for name, entry in layouts.items():
        wanted = expected[entry["student"]]
        assert all(report[name] == reports[0][name] for report in reports), f"{name}: ranks report different metrics"
        metrics = {key: float.fromhex(value) for key, value in reports[0][name].items()}
        assert metrics["distillation/kl"] == pytest.approx(wanted["divergence"], rel=TOLERANCE), name
        assert metrics["loss/distillation"] == pytest.approx(COEFFICIENT * wanted["divergence"], rel=TOLERANCE), name
        assert metrics["loss/policy"] == pytest.approx(wanted["policy"], rel=TOLERANCE, abs=TOLERANCE), name
        gradients = saved[name]["gradients"]
        assert set(gradients) == set(wanted["gradients"])
        for key, reference in wanted["gradients"].items():
            distance = float((gradients[key].double() - reference).norm() / reference.norm())
            assert 0 < distance < TOLERANCE, f"{name}: gradient of {key} is off by {distance:.1e} of its norm"
        taught = {int(i): v for report in reports for i, v in report.get(f"{name}/teacher", {}).items()}
        assert len(taught) == len(wanted["taught"])
        for index, logprobs in enumerate(wanted["taught"]):
            found = torch.tensor([float.fromhex(value) for value in taught[index]], dtype=torch.float64)
            torch.testing.assert_close(found, logprobs, rtol=1e-5, atol=2e-5)
