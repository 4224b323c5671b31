"""Parameters gathered during the next forward pass, as on CUDA: no head, reader or step may see those of before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "parameter_overlap.py"
LEARNING_RATE = 1e-3
CASES = [f"{layout}/{model}" for layout in ("pp1", "pp2") for model in ("untied", "tied")] + ["adapters/untied"]
HEADS = ["logits", "recompute", "fused_loss"]


@pytest.fixture(scope="module")
def ranks(run_ranks_once, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("overlap")
    write_tiny_model("qwen3", directory / "untied")
    write_tiny_model("qwen2", directory / "tied")
    return [json.loads(output) for output in run_ranks_once(SCRIPT, 4, directory, timeout_s=540)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_overlap_changes_no_metric_and_no_published_weight(ranks, case, head):
    for report in ranks:
        overlap, plain = (report[case][mode]["runs"][head] for mode in ("overlap", "same buckets"))
        assert overlap["metrics"] == plain["metrics"]
        assert overlap["published"] == plain["published"]
        assert all(stale > 0.1 * LEARNING_RATE for stale in overlap["stale"]), "nothing was stale: nothing overlapped"
        assert plain["stale"] == [0.0, 0.0, 0.0]


def test_the_first_stage_has_several_buckets(ranks):
    for case in CASES:
        assert ranks[0][case]["overlap"]["buckets"] > 5, "one bucket is gathered before the first layer"


@pytest.mark.parametrize("case", CASES[:2])
def test_buckets_change_rounding_only(ranks, case):
    """Gradients are summed in other pieces, as on CUDA; everything else is the same."""
    for report in ranks:
        for head in HEADS:
            overlap, plain = (report[case][mode]["runs"][head]["metrics"] for mode in ("overlap", "one bucket"))
            for step, expected in zip(overlap, plain, strict=True):
                for name, value in expected.items():
                    assert float.fromhex(step[name]) == pytest.approx(float.fromhex(value), rel=1e-3, abs=1e-6), name
