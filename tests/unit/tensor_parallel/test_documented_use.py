"""The examples of docs/output_head.md and docs/algorithm.md run, one after the other.

The one that needs several ranks runs in tests/distributed/test_vocab_parallel.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs"


def run_blocks(page: str) -> tuple[int, dict[str, Any]]:
    """Number of examples of one process, and the names they leave."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    alone = [block for block in blocks if "torch.distributed" not in block]
    names: dict[str, Any] = {}
    for block in alone:
        exec(block, names)
    return len(alone), names


def test_examples_run() -> None:
    count, names = run_blocks("output_head.md")
    assert count == 4
    assert names["hidden"].grad.isfinite().all()


def test_an_optimizer_step_of_ones_own_has_the_gradient_that_the_page_gives() -> None:
    count, names = run_blocks("algorithm.md")
    assert count == 1
    assert names["steering"].alpha == pytest.approx(0.5)
    assert names["high_prob"].tolist() == [True, False, False, True, False, False]
    sixths = [value * 6 for value in names["logprobs"].grad.tolist()]
    assert sixths == pytest.approx([-1.5, -1.0, -1.0, 0.5, 1.0, 1.0])
    assert names["controller"].integral == pytest.approx(0.5)
