"""Guessing games for `environment: guess`: a number in a range, behind a solved game; generated.

python examples/guess.py --output data/guess [--seed 1]

OUTPUT/train.parquet, search.parquet, heldout.parquet    no two of them have a game (range and number) in common
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from pathlib import Path

SHARES = {"heldout": 15, "search": 15, "train": 70}
"""Of a hundred games."""
LARGEST = range(8, 33)


def file_of(largest: int, number: int) -> str:
    """The one file of SHARES that a game may occur in."""
    digest = hashlib.sha256(f"{largest} {number}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") % sum(SHARES.values())
    for name, share in SHARES.items():
        place -= share
        if place < 0:
            return name
    raise AssertionError("the shares add up")


def solved(largest: int, number: int) -> str:
    """A game in which every guess halves what is left."""
    lines, low, high = [question(largest)], 1, largest
    while True:
        guess = (low + high) // 2
        lines.append(str(guess))
        if guess == number:
            return "\n".join(lines)
        lines.append("higher" if number > guess else "lower")
        low, high = (guess + 1, high) if number > guess else (low, guess - 1)


def question(largest: int) -> str:
    """First line of a game."""
    return f"Guess a number from 1 to {largest}."


def prompt(largest: int, generator: random.Random) -> str:
    """A game behind a solved one of the training games."""
    while True:
        other = generator.choice(LARGEST)
        shown = generator.randint(1, other)
        if file_of(other, shown) == "train":
            return f"{solved(other, shown)}\n\n{question(largest)}\n"


def prepare(output: Path, seed: int = 1) -> int:
    """Write the files, a function of the arguments and of this script; returns how many games there are."""
    import pyarrow

    from megatron_entropic.files.atomic import write_parquet

    games: dict[str, list[tuple[int, int]]] = {name: [] for name in SHARES}
    for largest in LARGEST:
        for number in range(1, largest + 1):
            games[file_of(largest, number)].append((largest, number))
    for name, found in games.items():
        generator = random.Random(f"{seed} {name}")
        generator.shuffle(found)
        rows = [{"prompt": prompt(largest, generator), "answer": str(number)} for largest, number in found]
        write_parquet(output / f"{name}.parquet", [pyarrow.Table.from_pylist(rows)])
    return sum(map(len, games.values()))


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Generate guessing games for environment: guess.")
    parser.add_argument("--output", type=Path, default=Path("data/guess"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.stdout.write(f"{prepare(options.output, options.seed):,} games are written to {options.output}\n")


if __name__ == "__main__":
    main()
