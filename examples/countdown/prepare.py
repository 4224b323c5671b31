"""Everything the Countdown example needs, generated: problems, a character tokenizer and a small random Qwen3 model.

    python examples/countdown/prepare.py --output data/countdown

A problem gives three digits and a target from 1 to 99; the answer is an expression that uses each digit once and has
the target as its value. Prompt `3,7,5>26:`, a right answer `3*7+5$`, where `$` ends the sequence.

    OUTPUT/train.parquet        prompts in verl's column layout
    OUTPUT/heldout.parquet      the same; no problem in it occurs in the other two files, in whatever order of digits
    OUTPUT/warm_start.parquet   columns prompt and response: problems with one random right answer each
    OUTPUT/model/               Hugging Face directory: config, safetensors, tokenizer

The files are a function of the seed and of this script; a second call finds them complete and does nothing.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from character_task import END, UNKNOWN, command_line, prepare_task, verl_row, write_files

DIGITS_PER_PROBLEM = 3
OPERATORS = "+-*"
# 19 characters, so that every tensor-parallel size has to pad the vocabulary.
VOCABULARY = "0123456789+-*/,>:" + END + UNKNOWN
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Sizes:
    """Rows of each file."""

    train: int = 4096
    heldout: int = 256
    warm_start: int = 40_960


@dataclass(frozen=True)
class Problem:
    """Three digits, a target and one expression that reaches it."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def prompt(self) -> str:
        """As the model reads it."""
        return ",".join(map(str, self.numbers)) + f">{self.target:02d}:"

    @property
    def identity(self) -> tuple[tuple[int, ...], int]:
        """The same for problems that differ in the order of their digits only."""
        return tuple(sorted(self.numbers)), self.target


def value_of(operands: list[int], operators: list[str]) -> int:
    """Value of a flat expression; `*` binds tighter than `+` and `-`."""
    terms = [operands[0]]
    for operator, operand in zip(operators, operands[1:], strict=True):
        if operator == "*":
            terms[-1] *= operand
        else:
            terms.append(operand if operator == "+" else -operand)
    return sum(terms)


def problems(generator: random.Random) -> Iterator[Problem]:
    """Endless independent problems: a random expression decides the target, so each has an answer."""
    while True:
        numbers = [generator.randint(1, 9) for _ in range(DIGITS_PER_PROBLEM)]
        operands = generator.sample(numbers, k=len(numbers))
        operators = generator.choices(OPERATORS, k=len(numbers) - 1)
        target = value_of(operands, operators)
        if 1 <= target <= 99:
            solution = str(operands[0]) + "".join(o + str(n) for o, n in zip(operators, operands[1:], strict=True))
            yield Problem(tuple(numbers), target, solution)


def row(problem: Problem, split: str, index: int) -> dict[str, Any]:
    """One row of a prompt file."""
    truth = {"numbers": list(problem.numbers), "target": problem.target}
    return verl_row("countdown", problem.prompt, truth, split, index)


def write_data(output: Path, seed: int, sizes: Sizes) -> None:
    """The three parquet files."""
    stream = problems(random.Random(seed))
    heldout: dict[tuple[tuple[int, ...], int], Problem] = {}
    while len(heldout) < sizes.heldout:
        problem = next(stream)
        heldout.setdefault(problem.identity, problem)
    others = (problem for problem in stream if problem.identity not in heldout)
    train = [next(others) for _ in range(sizes.train)]
    pairs = [next(others) for _ in range(sizes.warm_start)]
    files = {
        "train": [row(problem, "train", index) for index, problem in enumerate(train)],
        "heldout": [row(problem, "heldout", index) for index, problem in enumerate(heldout.values())],
        "warm_start": [{"prompt": problem.prompt, "response": problem.solution} for problem in pairs],
    }
    write_files(output, files)


def prepare(output: Path, seed: int = 1, sizes: Sizes | None = None) -> bool:
    """Write everything below `output`; returns False if it was there already."""
    return prepare_task(output, seed, sizes or Sizes(), __file__, write_data, VOCABULARY, MODEL)


if __name__ == "__main__":
    command_line("countdown", prepare)
