"""Lists the statements that the CPU tests do not run, and which of them the tests of the GPU stack run.

    python tools/gpu_only_lines.py --cpu FOLDER ... --gpu-stack FOLDER ... [--source] [--packages PACKAGE ...]

The folders hold data files of `coverage`, one of each process; docs/gpu_status.md has the commands that make them.
Statements that raise or handle an error are left out, and imports for type checkers: no GPU has those of its own.
Needs the package coverage, which is in no environment of this project.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from coverage import CoverageData
from coverage.parser import PythonParser

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("policy", "rollout", "cluster", "tensor_parallel")
LEFT_OUT = r"^\s*(if TYPE_CHECKING:|raise\b|except\b)"


def lines_run(folders: list[Path]) -> dict[str, set[int]]:
    """Line numbers by file below megatron_entropic/, whatever checkout they were run in."""
    found: dict[str, set[int]] = defaultdict(set)
    for path in (path for folder in folders for path in folder.glob("data*")):
        data = CoverageData(basename=str(path))
        data.read()
        for file in data.measured_files():
            _, mark, below = file.rpartition("/megatron_entropic/")
            if mark:
                found[below] |= set(data.lines(file) or ())
    return found


def of_another_source(source: str, lines: set[int]) -> bool:
    """Whether lines were run that hold nothing that can run: the file has changed since."""
    parsed = PythonParser(text=source)
    parsed.parse_source()
    possible = {n for n in lines if parsed.first_line(n) in parsed.statements} | parsed.raw_docstrings | {1}
    return not lines <= possible


def functions(tree: ast.AST) -> dict[int, str]:
    """For each line the innermost function or class around it, by its dotted name."""
    names: dict[int, str] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}" if outer else child.name
                names.update(dict.fromkeys(range(child.lineno, (child.end_lineno or child.lineno) + 1), name))
            visit(child, name)

    visit(tree, "")
    return names


def ranges(numbers: Iterable[int]) -> str:
    """Such as "3, 5-7"."""
    runs = [
        [number for _, number in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def main(arguments: list[str] | None = None) -> int:
    """Writes a table to standard output; with --source the statements that nothing runs follow."""
    parser = argparse.ArgumentParser(description="Statements that no CPU test runs, and who runs them.")
    parser.add_argument("--cpu", type=Path, required=True, nargs="+", help="data of the CPU tests")
    parser.add_argument("--gpu-stack", type=Path, required=True, nargs="+", help="data of tests/gpu_stack.sh")
    parser.add_argument("--source", action="store_true", help="show the statements that neither runs")
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    options = parser.parse_args(arguments)
    on_cpu, in_stack = lines_run(options.cpu), lines_run(options.gpu_stack)
    sys.stdout.write(
        "| function | not on a CPU | of these in the GPU stack | lines of neither |\n| --- | --- | --- | --- |\n"
    )
    statements = nowhere = 0
    left: list[str] = []
    changed: list[str] = []
    for path in sorted(p for package in options.packages for p in (ROOT / "megatron_entropic" / package).rglob("*.py")):
        name = path.relative_to(ROOT / "megatron_entropic").as_posix()
        source = path.read_text(encoding="utf-8")
        if of_another_source(source, on_cpu[name] | in_stack[name]):
            changed.append(name)
        parsed = PythonParser(text=source, exclude=LEFT_OUT)
        parsed.parse_source()
        own = parsed.statements - parsed.excluded
        missing = own - parsed.first_lines(on_cpu[name])
        stack = parsed.first_lines(in_stack[name])
        statements += len(own)
        nowhere += len(missing - stack)
        where = functions(ast.parse(source))
        by_function: dict[str, set[int]] = defaultdict(set)
        for line in sorted(missing):
            by_function[where.get(line, "the module")].add(line)
        for function, here in by_function.items():
            neither = ranges(here - stack) or "-"
            sys.stdout.write(f"| `{name}`: {function} | {len(here)} | {len(here & stack)} | {neither} |\n")
        left += [f"{name}:{line}: {source.splitlines()[line - 1].strip()}" for line in sorted(missing - stack)]
    sys.stdout.write(f"\n{statements} statements, {nowhere} of them run by neither.\n")
    if options.source:
        sys.stdout.write("\n".join(left) + "\n")
    if changed:
        sys.stderr.write(f"changed since the data were taken, measure again: {', '.join(changed)}\n")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
