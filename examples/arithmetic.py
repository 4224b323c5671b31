"""Arithmetic for pretrained language models: two skills, five levels, four forms, with solutions; generated.

    python examples/arithmetic.py --output data/arithmetic [--seed 1] [--levels 1 2 3] [--shots 4]

| skill | asked                                                        | solution                      |
|-------|--------------------------------------------------------------|-------------------------------|
| sums  | 34 + 57 =                                                    | 91                            |
| words | Mia has 34 pears and buys 57 more. How many pears ... ?      | Mia has 34 + 57 = 91 pears.   |

A sum has one right answer in one writing; a word problem leaves the way to the answer open, and its solutions here are
worded in several ways. A policy for the first can be certain, one for the second need not.

    OUTPUT/completion/SKILL_FILE.parquet   for a base model: what it goes on from
    OUTPUT/few_shot/SKILL_FILE.parquet     the same behind solved examples of the same level, --shots of them
    OUTPUT/calculator/SKILL_FILE.parquet   behind as many examples of conversations with `environment: calculator`
    OUTPUT/chat/SKILL_FILE.parquet         messages, for data.apply_chat_template

FILE is train, search, heldout or solutions (columns prompt and response, for a warm start; FORM/solutions.parquet has
those of both skills). Which of them a problem
belongs to follows from its expression, whatever the seed, the skill and the order of what is added or multiplied: no
expression of the held-out files is asked, solved or shown as an example in any other, of this seed or another.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKILLS = ("sums", "words")
FORMS = ("completion", "few_shot", "calculator", "chat")
# Of a hundred expressions; the solved examples of a few-shot prompt come from those of the solutions.
SHARES = {"heldout": 10, "search": 10, "solutions": 20, "train": 60}
SHOTS = 4
NAMES = ("Ada", "Ben", "Carla", "Daniel", "Ella", "Finn", "Grace", "Hugo", "Iris", "Jonas", "Mia", "Noah")
THINGS = ("apples", "pears", "books", "coins", "cards", "pencils", "shells", "stamps", "marbles", "tickets")
STORIES = {
    "a + b": "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "a - b": "{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?",
    "a * b": "{name} has {a} boxes with {b} {things} in each. How many {things} does {name} have?",
    "a * b + c": "{name} has {a} boxes with {b} {things} in each, and {c} more {things} on the table. "
    "How many {things} does {name} have?",
    "a + b - c": "{name} has {a} {things}, buys {b} more and gives away {c}. How many {things} does {name} have left?",
}
WORDINGS = ("{work}", "{name} has {work} {things}.", "The answer is {work}.")
# Operands of each shape of an expression, smallest and largest.
Range = tuple[int, int]
LEVELS: Sequence[Mapping[str, Sequence[Range]]] = (
    {"a + b": [(1, 20), (1, 20)], "a - b": [(1, 20), (1, 20)]},
    {"a + b": [(10, 99), (1, 9)], "a - b": [(10, 99), (1, 9)], "a * b": [(2, 9), (2, 9)]},
    {"a + b": [(10, 99), (10, 99)], "a - b": [(10, 99), (10, 99)]},
    {"a * b + c": [(2, 9), (2, 9), (1, 50)], "a + b - c": [(10, 50), (10, 50), (2, 20)]},
    {"a + b": [(100, 999), (100, 999)], "a - b": [(100, 999), (100, 999)], "a * b": [(11, 99), (3, 9)]},
)
ALL_LEVELS = tuple(range(1, len(LEVELS) + 1))
_TRIES_PER_ROW = 5


@dataclass(frozen=True)
class Sizes:
    """Rows of a skill's files, as many of each level (fewer where one has no more expressions), and solved examples."""

    train: int = 2000
    search: int = 120
    heldout: int = 120
    solutions: int = 2000
    shots: int = SHOTS


@dataclass(frozen=True)
class Expression:
    """Numbers in one of the shapes of `STORIES`; its value is not negative."""

    level: int
    shape: str
    numbers: tuple[int, ...]

    @property
    def text(self) -> str:
        """As one writes it: 3 * 4 + 5."""
        return self._with(self.numbers)

    @property
    def value(self) -> int:
        """What it comes to."""
        if (step := self.step) is not None:
            return step.value
        first, second = self.numbers
        return {"+": first + second, "-": first - second, "*": first * second}[self.shape[2]]

    @property
    def work(self) -> str:
        """With every step on the way to its value: 3 * 4 + 5 = 12 + 5 = 17."""
        return f"{self.text} = {self.value if self.step is None else self.step.work}"

    @property
    def step(self) -> Expression | None:
        """What is left after the first operation; None if that is the last one."""
        if len(self.numbers) == 2:
            return None
        first = Expression(self.level, self.shape[:5], self.numbers[:2])
        return Expression(self.level, f"a {self.shape[6]} b", (first.value, self.numbers[2]))

    @property
    def identity(self) -> str:
        """The same for expressions that differ in the order of what is added or multiplied first."""
        first, second, *rest = self.numbers
        commutes = self.shape[2] != "-"
        return self._with((*(sorted((first, second)) if commutes else (first, second)), *rest))

    @property
    def file(self) -> str:
        """The one file of SHARES that it may occur in."""
        place = int.from_bytes(hashlib.sha256(self.identity.encode()).digest()[:8], "big") % sum(SHARES.values())
        for name, share in SHARES.items():
            place -= share
            if place < 0:
                return name
        raise AssertionError("the shares add up")

    def _with(self, numbers: tuple[int, ...]) -> str:
        return "".join(str(numbers["abc".index(c)]) if c in "abc" else c for c in self.shape)


@dataclass(frozen=True)
class Problem:
    """An expression as one of the skills asks for it."""

    skill: str
    expression: Expression
    question: str
    solution: str

    @property
    def answer(self) -> str:
        """What a calculator says to the whole expression, and what is then left to write."""
        return f"{self.expression.value}\nanswer: {self.expression.value}"

    def prompt(self, form: str, shots: Sequence[Problem]) -> str:
        """What stands before the solution, in one of FORMS."""
        if form == "chat":
            return f"What is {self.expression.text}?" if self.skill == "sums" else self.question
        if form == "calculator":
            solved = [f"{shot.prompt(form, ())}calc: {shot.expression.text}\n{shot.answer}\n" for shot in shots]
            return "\n".join([*solved, f"Question: {self.question}\n"])
        end = f"{self.question} =" if self.skill == "sums" else f"Question: {self.question}\nAnswer:"
        separator = "\n" if self.skill == "sums" else "\n\n"
        solved = [f"{shot.prompt('completion', ())} {shot.solution}" for shot in shots if form == "few_shot"]
        return separator.join([*solved, end])


def expressions(generator: random.Random, level: int, file: str) -> Iterator[Expression]:
    """Endless random expressions of a level that belong to a file."""
    shapes = LEVELS[level - 1]
    while True:
        shape = generator.choice(list(shapes))
        found = Expression(level, shape, tuple(generator.randint(*limits) for limits in shapes[shape]))
        # A step of a solution is an expression too.
        step_file = file if found.step is None else found.step.file
        if found.value >= 0 and found.file == file and step_file in (file, "train", "solutions"):
            yield found


def problem(generator: random.Random, skill: str, expression: Expression) -> Problem:
    """An expression with a story around it, where the skill tells one."""
    if skill == "sums":
        return Problem(skill, expression, expression.text, str(expression.value))
    words = {"name": generator.choice(NAMES), "things": generator.choice(THINGS)}
    question = STORIES[expression.shape].format(**words, **dict(zip("abc", expression.numbers, strict=False)))
    return Problem(skill, expression, question, generator.choice(WORDINGS).format(work=expression.work, **words))


def problems(generator: random.Random, skill: str, file: str, count: int, levels: Sequence[int]) -> list[Problem]:
    """Problems of some levels in random order, none of them twice."""
    found: dict[str, Problem] = {}
    for level in levels:
        stream, most = expressions(generator, level, file), len(found) + count // len(levels)
        for _ in range(_TRIES_PER_ROW * count):
            if len(found) == most:
                break
            expression = next(stream)
            if expression.identity not in found:
                found[expression.identity] = problem(generator, skill, expression)
    return generator.sample(list(found.values()), len(found))


def shots(generator: random.Random, one: Problem, count: int) -> list[Problem]:
    """Solved problems of the same skill and level."""
    stream = expressions(generator, one.expression.level, "solutions")
    return [problem(generator, one.skill, next(stream)) for _ in range(count)]


def prompt_row(one: Problem, prompt: Any, file: str, index: int) -> dict[str, Any]:
    """One row of a prompt file, in verl's column layout."""
    return {
        "data_source": f"arithmetic_{one.skill}",
        "prompt": prompt,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(one.expression.value)},
        "extra_info": {"split": file, "index": index, "level": one.expression.level, "solution": one.solution},
    }


def rows(found: Sequence[tuple[Problem, list[Problem]]], form: str, file: str) -> list[dict[str, Any]]:
    """The rows of a file in one of FORMS.

    Args:
        found: each with its solved examples.
    """
    made = []
    for index, (one, solved) in enumerate(found):
        text = one.prompt(form, solved)
        prompt = [{"role": "user", "content": text}] if form == "chat" else text
        if file == "solutions" and form == "calculator":
            continue  # what the tool says is no part of a response
        if file == "solutions":
            # What follows a completion is a word of its own; an assistant's message begins without a blank.
            response = one.expression.work if form == "chat" and one.skill == "sums" else one.solution
            made.append({"prompt": prompt, "response": response if form == "chat" else f" {response}"})
        else:
            made.append(prompt_row(one, prompt, file, index))
    return made


def prepare(output: Path, seed: int = 1, levels: Sequence[int] = ALL_LEVELS, sizes: Sizes | None = None) -> int:
    """Write every file, a function of the arguments and of this script; returns how many problems there are."""
    sizes, total = sizes or Sizes(), 0
    solutions: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for skill in SKILLS:
        for file in SHARES:
            # Each file has a stream of its own: another size of one leaves the others as they are.
            generator = random.Random(f"{seed} {skill} {file}")
            chosen = problems(generator, skill, file, getattr(sizes, file), levels)
            with_shots = [(one, shots(generator, one, sizes.shots)) for one in chosen]
            total += len(chosen)
            for form in FORMS:
                made = rows(with_shots, form, file)
                if not made:
                    continue
                write(output / form / f"{skill}_{file}.parquet", made)
                solutions[form] += made if file == "solutions" else []
    for form, made in solutions.items():
        if made:
            write(output / form / "solutions.parquet", made)
    return total


def write(path: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """One parquet file, which appears when it is complete."""
    import pyarrow

    from megatron_entropic.files.atomic import write_parquet

    write_parquet(path, [pyarrow.Table.from_pylist(list(made))])


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Generate arithmetic problems for pretrained language models.")
    parser.add_argument("--output", type=Path, default=Path("data/arithmetic"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--levels", type=int, nargs="+", choices=ALL_LEVELS, default=ALL_LEVELS, metavar="LEVEL")
    parser.add_argument("--shots", type=int, default=SHOTS, help="solved examples before a problem of few_shot/")
    options = parser.parse_args()
    count = prepare(options.output, options.seed, sorted(set(options.levels)), Sizes(shots=options.shots))
    sys.stdout.write(f"{count:,} problems, each in {len(FORMS)} forms, are written to {options.output}\n")


if __name__ == "__main__":
    main()
