"""Responses come as they are finished, each once, and the loss of an engine changes none of them."""

from __future__ import annotations

import json
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
    positions = [position for message in seen["arrivals"] for position in message]
    assert sorted(positions) == list(range(28))
    assert len(seen["arrivals"]) > 2
    assert len(seen["arrivals"][0]) < 20, "the first came before most others"
    assert seen["partly"] == [seen["whole"][position] for position in positions]
    assert seen["shared"], "the prompts are the caller's own"
    (loss,) = seen["losses"]
    assert "generate (step 1): the process of engine 0 died" in loss
