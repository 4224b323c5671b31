"""Log-probability and entropy from vocabulary shards on real ranks: TP = 1, 2, 4 against float64 and each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "scripts" / "vocab_parallel_ranks.py"
FUSED_SCRIPT = SCRIPT.with_name("fused_head_ranks.py")
REVERSE_KL_SCRIPT = SCRIPT.with_name("reverse_kl_ranks.py")
DOCUMENTED_SCRIPT = SCRIPT.with_name("documented_gradient.py")


def test_parity_over_tensor_parallel_sizes(run_ranks: Callable[..., list[str]]) -> None:
    reports = [json.loads(output.splitlines()[-1]) for output in run_ranks(SCRIPT, 4, timeout_s=240)]
    for report in reports:
        for dtype, gradient_limit in (("float32", 2e-6), ("bfloat16", 2**-8)):
            worst = report[dtype]
            assert worst["logprob"] <= 1e-5
            assert worst["entropy"] <= 5e-6
            assert worst["gradient"] <= gradient_limit
            assert worst["bit_identical"], "every rank and every TP size must see the same bits"
            for ranks, forward, backward in worst["collectives"]:
                assert (forward, backward) == (0 if ranks == 1 else 1, 0)
        assert report["no_tokens"]


def test_fused_heads_over_tensor_parallel_sizes(run_ranks: Callable[..., list[str]]) -> None:
    """Values and gradients, and that no more is communicated than four numbers a token and dL/dhidden."""
    for output in run_ranks(FUSED_SCRIPT, 4, timeout_s=240):
        reports = json.loads(output.splitlines()[-1])
        assert len(reports) == 3 * 2 * 2 * 3 * 2
        for report in reports:
            logprob, entropy, dhidden, dweight = report["errors"]
            assert logprob <= 2e-5, report
            assert entropy <= 5e-6, report
            # bfloat16: dL/dhidden is rounded on each rank and in their sum, dL/dweight once.
            assert max(dhidden, dweight) <= (1e-5 if report["dtype"] == "float32" else 5e-3), report
            assert report["collectives"] == _expected_collectives(report), report


def test_reverse_kl_over_tensor_parallel_sizes(run_ranks: Callable[..., list[str]]) -> None:
    """Values and gradients at TP = 1, 2, 4 with padding and a temperature, and what is communicated."""
    for output in run_ranks(REVERSE_KL_SCRIPT, 4, timeout_s=240):
        reports = json.loads(output.splitlines()[-1])
        assert len(reports) == 3 * 2 * 3 * 3
        for report in reports:
            divergence, dhidden, dweight = report["errors"]
            exact = report["dtype"] == "float64"
            assert divergence <= (1e-12 if exact else 5e-6), report
            limit = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-3}[report["dtype"]]
            assert max(dhidden, dweight) <= limit, report
            gather = int(report["sequence_parallel"])
            assert report["collectives"] == ([0, 0] if report["ranks"] == 1 else [gather + 1, gather + 1]), report


def test_who_adds_up_the_gradient_of_hidden_states(run_ranks: Callable[..., list[str]]) -> None:
    """As docs/output_head.md says: the fused heads do, logits leave it to the caller."""
    for output in run_ranks(DOCUMENTED_SCRIPT, 2, timeout_s=120):
        errors = json.loads(output.splitlines()[-1])
        assert max(errors["stored"], errors["fused"], errors["at_once"]) < 1e-5
        assert errors["alone"] > 1e-2


def _expected_collectives(report: dict[str, Any]) -> list[int]:
    """[forward, backward]; under sequence parallelism hidden states are gathered in each pass that multiplies them."""
    if report["ranks"] == 1:
        return [0, 0]
    gather = int(report["sequence_parallel"])
    if report["gradient_in_forward"]:
        return [gather + report["chunks"] + 1, 0]
    return [gather + 1, gather + 1]
