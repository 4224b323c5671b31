"""Log-probability and entropy from vocabulary shards on real ranks: TP = 1, 2, 4 against float64 and each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parent / "scripts" / "vocab_parallel_ranks.py"


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
