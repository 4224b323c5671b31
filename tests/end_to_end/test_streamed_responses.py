"""Responses come as they are finished, each once, and the loss of an engine changes none of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from math_assets import write_model
from training_run import run_script

SCRIPT = Path(__file__).parent / "scripts" / "lost_engine_responses.py"


def test_an_engine_lost_while_it_answers_is_replaced_and_no_response_comes_twice(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    finished = run_script(SCRIPT, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [(prompt, sample) for prompt, sample, _, _ in seen["whole"]] == [(p, s) for p in range(7) for s in range(4)]
    assert len({len(tokens) for _, _, tokens, _ in seen["whole"]}) > 5, "they must not all end together"
    assert seen["again"] == seen["whole"], "tokens and log-probs, bit for bit"
    assert sorted(seen["positions"]) == list(range(28))
    # What comes in one message is taken within a millisecond, messages are at least a tenth of a second apart.
    times = seen["seen_at_s"]
    pauses = [number for number, (one, next_one) in enumerate(pairwise(times), start=1) if next_one - one > 0.05]
    assert len(pauses) > 1
    assert pauses[0] < 20, "the first came before most others"
    assert seen["partly"] == [seen["whole"][position] for position in seen["positions"]]
    (loss,) = seen["losses"]
    assert "generate (step 1): the process of engine 0 died" in loss
