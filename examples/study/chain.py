"""The chain task, generated: a shortcut that pays first, and a rare step-by-step mode that alone solves the hard part.

    python examples/study/chain.py --output data/chain

A problem gives one of five states and one to five operations, each a fixed permutation of the states; the answer is the
state after the last of them. It may be given in two forms, and only the final state is judged:

    awx___>   a prompt: state a, operations w and x, three blanks
    De$       direct: the final state is e
    Sde$      step by step: one state after each operation, of which only the last is looked at

A state is written in any of three letters. Prompts use the first; responses may use all.

The two supervised files make the shortcut look better. The first, clean, teaches both forms. In the second nine of ten
answers are direct and right, which works for one or two operations only, and the steps of the others are mostly wrong.
After both, the step-by-step form is rare and unreliable, though only it can solve three operations and more.

    OUTPUT/train.parquet        prompts in verl's column layout
    OUTPUT/search.parquet       the same, to choose settings by; no problem in it occurs in any other file
    OUTPUT/heldout.parquet      the same, to report; no problem in it occurs in any other file
    OUTPUT/clean.parquet        columns prompt and response
    OUTPUT/corrupted.parquet    the same
    OUTPUT/short.parquet        prompts of one and two operations alone
    OUTPUT/long.parquet         prompts of three to five
    OUTPUT/model/               Hugging Face directory: config, safetensors, tokenizer

The operations are the same for every seed; problems, responses and weights are a function of it.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from character_task import END, UNKNOWN, command_line, prepare_task, verl_row, write_files

STATES = 5
SPELLINGS = "abcde", "fghij", "klmno"
"""State i is written as character i of any of these."""
OPERATIONS = {"w": (3, 0, 4, 1, 2), "x": (1, 2, 0, 4, 3), "y": (4, 3, 1, 2, 0), "z": (2, 4, 3, 0, 1)}
"""Where each operation takes states 0 to 4."""
LENGTH_SHARES = {1: 0.25, 2: 0.25, 3: 0.17, 4: 0.17, 5: 0.16}
"""How often a problem has so many operations."""
MOST_OPERATIONS = max(LENGTH_SHARES)
HELD_OUT = {2: 8, 3: 48, 4: 100, 5: 100}
"""Problems of each held-out file by number of operations. The 20 of one operation tell what the operations do."""
BLANK, SEPARATOR, DIRECT, STEPWISE = "_", ">", "D", "S"
# 25 characters, so that every tensor-parallel size has to pad the vocabulary.
VOCABULARY = "".join(SPELLINGS) + "".join(OPERATIONS) + BLANK + SEPARATOR + DIRECT + STEPWISE + END + UNKNOWN
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
}
DATA_SEED = 1
"""Of the choice of held-out problems, which is the same whatever the seed of the rest."""


@dataclass(frozen=True)
class Sizes:
    """Rows of the generated files."""

    train: int = 8192
    clean: int = 115_200
    corrupted: int = 76_800


@dataclass(frozen=True)
class Supervision:
    """What a supervised file shows."""

    stepwise: float
    """Share of responses that go step by step; the others are direct and right."""
    corrupted: float
    """Share of steps whose state is replaced by a random one, from which the next step goes on."""


CLEAN = Supervision(stepwise=0.6, corrupted=0.0)
CORRUPTED = Supervision(stepwise=0.1, corrupted=0.7)


@dataclass(frozen=True)
class Problem:
    """A state and what is done to it; equal problems have equal fields."""

    start: int
    operations: str

    @property
    def prompt(self) -> str:
        """As the model reads it, of equal length for all problems."""
        return SPELLINGS[0][self.start] + self.operations.ljust(MOST_OPERATIONS, BLANK) + SEPARATOR

    @property
    def states(self) -> list[int]:
        """The state after each operation."""
        state, found = self.start, []
        for operation in self.operations:
            state = OPERATIONS[operation][state]
            found.append(state)
        return found


def problems(generator: random.Random) -> Iterator[Problem]:
    """Endless independent problems."""
    lengths, shares = list(LENGTH_SHARES), list(LENGTH_SHARES.values())
    while True:
        length = generator.choices(lengths, shares)[0]
        yield Problem(generator.randrange(STATES), "".join(generator.choices(list(OPERATIONS), k=length)))


def held_out() -> dict[str, list[Problem]]:
    """The problems of the two held-out files, the same for every seed."""
    generator = random.Random(DATA_SEED)
    found: dict[str, list[Problem]] = {"search": [], "heldout": []}
    for length, count in HELD_OUT.items():
        every = [Problem(s, "".join(o)) for s, o in product(range(STATES), product(OPERATIONS, repeat=length))]
        chosen = generator.sample(every, 2 * count)
        found["search"] += chosen[:count]
        found["heldout"] += chosen[count:]
    return found


def response(problem: Problem, supervision: Supervision, generator: random.Random) -> str:
    """One supervised response, without the end."""

    def spelled(state: int) -> str:
        return generator.choice(SPELLINGS)[state]

    if generator.random() >= supervision.stepwise:
        return DIRECT + spelled(problem.states[-1])
    state, text = problem.start, STEPWISE
    for operation in problem.operations:
        wrong = generator.random() < supervision.corrupted
        state = generator.randrange(STATES) if wrong else OPERATIONS[operation][state]
        text += spelled(state)
    return text


def verify(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the response has one of the two forms and ends in the right state, in whatever spelling, else 0.0.

    Args:
        ground_truth: {"state": n, "operations": k}, or the same as a JSON string.

    Raises:
        ValueError: a ground truth that is not of this form.
    """
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    try:
        wanted, length = int(truth["state"]), int(truth["operations"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected a ground truth with state and operations, found {ground_truth!r}") from error
    form, states = response[:1], response[1:]
    expected = {DIRECT: 1, STEPWISE: length}.get(form)
    if len(states) != expected or not set(states) <= set("".join(SPELLINGS)):
        return 0.0
    return float("".join(SPELLINGS).index(states[-1]) % STATES == wanted)


def read_answer(response: str) -> str | None:
    """The final state, in its first spelling; None where there is none."""
    place = "".join(SPELLINGS).find(response[-1:]) if len(response) > 1 else -1
    return None if place < 0 else SPELLINGS[0][place % STATES]


verify.read_answer = read_answer  # type: ignore[attr-defined]


def row(problem: Problem, split: str, index: int) -> dict[str, Any]:
    """One row of a prompt file."""
    truth = {"state": problem.states[-1], "operations": len(problem.operations)}
    return verl_row("chain", problem.prompt, truth, split, index)


def write_data(output: Path, seed: int, sizes: Sizes) -> None:
    """The parquet files."""
    generator = random.Random(seed)
    unseen = held_out()
    kept_out = {problem for chosen in unseen.values() for problem in chosen}
    others = (problem for problem in problems(generator) if problem not in kept_out)

    def pairs(count: int, supervision: Supervision) -> list[dict[str, str]]:
        chosen = (next(others) for _ in range(count))
        return [{"prompt": p.prompt, "response": response(p, supervision, generator)} for p in chosen]

    files = {
        "train": [row(next(others), "train", index) for index in range(sizes.train)],
        "clean": pairs(sizes.clean, CLEAN),
        "corrupted": pairs(sizes.corrupted, CORRUPTED),
    }
    # Last, so that what comes before is what it was without them.
    for name, lengths in (("short", (1, 2)), ("long", (3, 4, 5))):
        chosen = (problem for problem in others if len(problem.operations) in lengths)
        files[name] = [row(next(chosen), name, index) for index in range(sizes.train // 2)]
    tests = {name: [row(p, name, index) for index, p in enumerate(chosen)] for name, chosen in unseen.items()}
    write_files(output, files | tests)


def prepare(output: Path, seed: int = 1, sizes: Sizes | None = None) -> bool:
    """Write everything below `output`; returns False if it was there already."""
    return prepare_task(output, seed, sizes or Sizes(), __file__, write_data, VOCABULARY, MODEL)


if __name__ == "__main__":
    command_line("chain", prepare)
