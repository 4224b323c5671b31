"""The examples of conversations: their files, and configurations that can run with them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
from modules import load_module

from megatron_entropic.config.load import load_config

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
guess = load_module(EXAMPLES / "guess.py", "guess_games")


@pytest.mark.parametrize("name", ["calculator", "guess"])
def test_configurations_can_be_read(name: str) -> None:
    config = load_config(EXAMPLES / f"{name}_cpu.yaml")
    assert config.environment.name == name
    assert config.rollout.stop == ["\n"]
    turns = config.environment.max_turns * (config.environment.max_turn_tokens or 0)
    assert turns <= config.rollout.max_response_tokens, "no turn is cut short by the turns before"


def test_games_belong_to_one_file_and_examples_show_none_that_is_held_out(tmp_path: Path) -> None:
    guess.prepare(tmp_path)
    seen: dict[tuple[int, int], str] = {}
    for name in guess.SHARES:
        for row in pyarrow.parquet.read_table(tmp_path / f"{name}.parquet").to_pylist():
            example, question = row["prompt"].split("\n\n")
            game = (int(question.split()[-1].rstrip(".")), int(row["answer"]))
            assert game not in seen
            seen[game] = name
            first, *lines = example.splitlines()
            shown = (int(first.split()[-1].rstrip(".")), int(lines[-1]))
            assert guess.file_of(*shown) == "train"
            assert guess.solved(*shown) == example
    assert len(seen) == sum(guess.LARGEST)
    assert set(seen.values()) == set(guess.SHARES)
