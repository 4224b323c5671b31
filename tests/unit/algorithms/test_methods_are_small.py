"""Methods stay small and separate: a few dozen lines each, torch only, and nobody outside asks which one it is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_entropic
from megatron_entropic.algorithms import POLICY_LOSSES
from megatron_entropic.algorithms.entropy_control import CONTROLLERS

PACKAGE = Path(megatron_entropic.__file__).parent
ALGORITHMS = PACKAGE / "algorithms"
MAX_CODE_LINES = 60
"""Of a method, without blank lines, comments and docstrings."""
PLAIN = {f"megatron_entropic.{name}" for name in ("errors", "config", "config.names", "config.plugins")} | {
    "megatron_entropic"
}
"""What needs the standard library alone."""
SHARED = {"Controller"}
"""What controllers have in common; no method."""


def code_lines(node: ast.AST, source: str) -> int:
    """Lines of a definition that are neither blank nor comment nor a string by itself."""
    strings = {
        line
        for inner in ast.walk(node)
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str)
        for line in range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
    }
    lines = source.splitlines()
    numbers = range(node.lineno, node.end_lineno + 1)  # type: ignore[attr-defined]
    return sum(
        bool(lines[n - 1].strip()) and not lines[n - 1].strip().startswith("#") for n in numbers if n not in strings
    )


def imported_at_run_time(tree: ast.Module) -> Iterator[str]:
    """Modules that a file imports, those for type checkers aside."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                yield from (alias.name for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom):
                yield inner.module or ""


def test_every_method_is_short() -> None:
    counts = {}
    for path in ALGORITHMS.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        definitions = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        counts |= {node.name: code_lines(node, source) for node in definitions if node.name not in SHARED}
    long = {name: count for name, count in counts.items() if count > MAX_CODE_LINES}
    assert not long, f"more than {MAX_CODE_LINES} lines of code: {long}"


@pytest.mark.parametrize("path", sorted(ALGORITHMS.rglob("*.py")), ids=lambda p: str(p.relative_to(ALGORITHMS)))
def test_algorithms_import_torch_only(path: Path) -> None:
    for module in imported_at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
        top = module.split(".")[0]
        ours = module.startswith("megatron_entropic.algorithms") or module in PLAIN
        assert ours or top == "torch" or top in sys.stdlib_module_names, module


def test_the_loop_does_not_ask_which_method_it_is() -> None:
    names = {*POLICY_LOSSES, *CONTROLLERS}
    for file in ("training/trainer.py", "training/step.py"):
        constants = {
            node.value
            for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not constants & names, file
