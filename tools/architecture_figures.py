"""Figures about the structure of a checkout, for comparing one with another.

    python tools/architecture_figures.py [CHECKOUT ...]

Lines of the package by kind, files, rooms (folders and files of the package's top level, and the subfolders of
`policy/`), arrows between rooms (one imports the other, anywhere in its files), circles of arrows, and
parameters of a function.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "megatron_entropic"
SMALL_FILE_LINES = 60


def figures(checkout: Path) -> dict[str, float]:
    """All figures of one checkout."""
    package = checkout / PACKAGE
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    counts = [_lines(source, trees[path]) for path, source in sources.items()]
    arrows = {
        (room, other)
        for path, tree in trees.items()
        for other in _imported_rooms(tree, package)
        if (room := _room(path.relative_to(package).parts, package)) != other
    }
    parameters = sorted(_parameters(function) for tree in trees.values() for function in _functions(tree))
    files = [path for path in sources if path.name != "__init__.py"]
    return {
        **{f"lines, {kind}": sum(count[kind] for count in counts) for kind in counts[0]},
        "files": len(files),
        f"files of at most {SMALL_FILE_LINES} lines": sum(
            len(sources[path].splitlines()) <= SMALL_FILE_LINES for path in files
        ),
        "rooms": len({_room(path.relative_to(package).parts, package) for path in files}),
        "arrows between rooms": len(arrows),
        "circles of rooms": len(_circles(arrows)),
        "parameters a function, 95 of 100 have at most": parameters[int(0.95 * (len(parameters) - 1))],
        "parameters a function, largest": parameters[-1],
        "functions with more than 6": sum(count > 6 for count in parameters),
    }


def _lines(source: str, tree: ast.Module) -> dict[str, int]:
    documented: set[int] = set()
    for node in ast.walk(tree):
        for inner in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            text = inner.value if isinstance(inner, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                documented |= set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    kinds = {"all": 0, "code": 0, "docstring": 0, "comment": 0}
    for number, line in enumerate(source.splitlines(), start=1):
        kinds["all"] += 1
        if number in documented:
            kinds["docstring"] += 1
        elif line.strip().startswith("#"):
            kinds["comment"] += 1
        elif line.strip():
            kinds["code"] += 1
    return kinds


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters but for self and cls."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _room(parts: tuple[str, ...], package: Path) -> str:
    """The top-level folder or file of a module; within `policy/` its subfolder."""
    parts = (*parts[:-1], parts[-1].removesuffix(".py"))
    folders = 2 if parts[0] == "policy" and (package.joinpath(*parts[:2])).is_dir() else 1
    return "/".join(parts[:folders])


def _imported_rooms(tree: ast.Module, package: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *parts = name.split(".")
            if first == PACKAGE and parts and ((package / parts[0]).is_dir() or (package / f"{parts[0]}.py").is_file()):
                yield _room(tuple(parts), package)


def _circles(arrows: set[tuple[str, str]]) -> set[frozenset[str]]:
    """Sets of rooms from each of which every other can be reached."""
    reached: dict[str, set[str]] = {}
    for room, _ in arrows:
        found: set[str] = set()
        ahead = [room]
        while ahead:
            here = ahead.pop()
            news = {other for begin, other in arrows if begin == here} - found
            found |= news
            ahead += news
        reached[room] = found
    return {
        frozenset({room, *(other for other in reached[room] if room in reached.get(other, ()))})
        for room in reached
        if room in reached[room]
    }


if __name__ == "__main__":
    for folder in sys.argv[1:] or ["."]:
        print(folder, json.dumps(figures(Path(folder)), indent=1))
