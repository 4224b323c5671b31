"""Rules of the whole repository that no single file can see: who may import whom, sizes, and what must not be there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_entropic"
MAX_LINES = 500

# docs/architecture.md: a room may import itself and rooms of lower rows, nothing beside or above it.
ROWS = [
    {"config", "files", "types", "errors"},
    {"tensor_parallel", "algorithms", "rewards", "data", "models", "observability"},
    {"checkpoints", "weight_sync", "reports", "environments", "plugins"},
    {"policy", "rollout", "planning", "evaluation"},
    {"cluster"},
    {"training"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
# The large neighbours, and the only rooms that know them.
OWNERS = {
    "megatron": {"policy"},
    "vllm": {"rollout"},
    "ray": {"cluster"},
    "wandb": {"observability"},
    **{host: {"plugins"} for host in ("verl", "slime", "transfer_queue", "omegaconf")},
    **{host: {"environments"} for host in ("verifiers", "openenv")},
    "trl": {"plugins", "environments"},  # a trainer, and classes of environments
}


def row_of(room: str) -> int:
    """Row number of a room."""
    return next(number for number, rooms in enumerate(ROWS) if room in rooms)


def room_of(dotted: str) -> str:
    """Room of a module name below the package, such as `policy.loss` or `cli`."""
    return dotted.split(".")[0]


def module_name(path: Path, package: Path) -> str:
    """Dotted name of a file below the package, without the package; empty for the package itself."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, those inside functions and by name included."""
    here = ["megatron_entropic", *(part for part in module.split(".") if part)]
    container = here if is_package else here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = container[: len(container) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def broken_rules(package: Path) -> list[str]:
    """Every import that the architecture forbids, as `file:line: reason`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = module_name(path, package)
        if not module:
            continue
        room = room_of(module)
        if not any(room in rooms for rooms in ROWS):
            found.append(f"{path.relative_to(package)}: {room} is in no row of docs/architecture.md")
            continue
        for line, name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            where = f"{path.relative_to(package)}:{line}"
            top, _, below = name.partition(".")
            if room not in OWNERS.get(top, {room}):
                found.append(f"{where}: only {' and '.join(sorted(OWNERS[top]))} may import {top}")
            if top != "megatron_entropic" or not below:
                continue
            other = room_of(below)
            known = any(other in rooms for rooms in ROWS)
            # The files of row 0 may use each other.
            if known and other != room and row_of(other) >= max(row_of(room), 1):
                found.append(f"{where}: {room} (row {row_of(room)}) imports {other} (row {row_of(other)})")
    return found


def tracked_files() -> list[Path]:
    """Files of the checkout that git knows or would take."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    )
    names = listing.stdout.decode().split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str | None:
    """Contents of a text file, None for a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_imports_follow_the_architecture() -> None:
    assert broken_rules(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("algorithms/loss.py", "import ray", "only cluster may import ray"),
        ("weight_sync/plan.py", "def f():\n    from megatron.core import mpu", "only policy may import megatron"),
        ("policy/x.py", "import importlib\nimportlib.import_module('vllm.config')", "only rollout may import vllm"),
        ("policy/x.py", "from megatron_entropic.rollout import engine", "policy (row 3) imports rollout (row 3)"),
        ("data/x.py", "from ..cluster.launch import launch", "data (row 1) imports cluster (row 4)"),
        ("algorithms/x.py", "from megatron_entropic import rewards", "algorithms (row 1) imports rewards (row 1)"),
        ("types.py", "from megatron_entropic.observability import metrics", "types (row 0) imports observability"),
        ("cluster/x.py", "from megatron_entropic.training import trainer", "cluster (row 4) imports training"),
        ("kitchen/x.py", "", "kitchen is in no row"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    problems = broken_rules(tmp_path)
    assert len(problems) == 1
    assert expected in problems[0]


def test_every_row_is_in_the_architecture_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    missing = [name for name in rooms if f"`{name}/`" not in page] + [n for n in files if f"`{n}`" not in page]
    assert not missing, f"docs/architecture.md does not mention {sorted(missing)}"


def test_files_have_one_subject() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked_files()
        if path.suffix in (".py", ".sh") and (count := len(path.read_text(encoding="utf-8").splitlines())) >= MAX_LINES
    }
    assert not long, f"files of {MAX_LINES} lines or more: {long}"


def test_no_two_test_files_share_a_name() -> None:
    """Pytest imports them by it; run one by one they would pass, together they are not collected."""
    names = Counter(path.name for path in tracked_files() if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_nothing_prints() -> None:
    quiet = [
        path for path in tracked_files() if path.suffix == ".py" and path.parent.name not in ("tools", "benchmarks")
    ]
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in quiet
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, f"print() in {calls}"


def test_no_file_knows_a_machine() -> None:
    """Absolute paths of somebody's disk and host names of package indexes belong into no file."""
    folders = "|".join(("work", "root", "home", "opt", "mnt", "Users"))
    hosts = "|".join((r"py" + r"pi\.org", r"python" + r"hosted\.org", r"download\.py" + r"torch", r"npm" + r"js\.org"))
    forbidden = re.compile(rf"(?<![\w.$}}~*/-])/(?:{folders})/|{hosts}|\.\./shared")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        if path != Path(__file__).resolve() and path.name != "LICENSE" and (text := text_of(path)) is not None
        for number, line in enumerate(text.splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert not found, "\n".join(found)


def test_python_files_are_ascii() -> None:
    odd = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix in (".py", ".sh", ".yaml") and not path.read_bytes().isascii()
    ]
    assert not odd, f"non-ASCII source: {odd}"


def test_shell_scripts_parse() -> None:
    scripts = [path for path in tracked_files() if path.suffix == ".sh" or path == ROOT / ".ci/run"]
    assert scripts
    for path in scripts:
        result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False, timeout=30)
        assert result.returncode == 0, f"{path.name}: {result.stderr}"
        assert "set -euo pipefail" in path.read_text() or path.name == "run"


# Import names that are not the names of their packages.
PACKAGE_NAMES = {
    "yaml": "pyyaml",
    "megatron": "megatron-core",
    "modelopt": "nvidia-modelopt",
    "transfer_queue": "transferqueue",
}
BROUGHT_BY_OTHERS = {"triton", "slime", "omegaconf", "tensordict"}
"""triton comes with torch, slime is no package of an index, and verl brings the last two."""


def test_every_package_that_is_imported_is_in_setup_py() -> None:
    """sympy was there only because math-verify needs it as well."""
    required = {name.lower() for name in re.findall(r'"([A-Za-z][\w-]*)[\[=<>;]', (ROOT / "setup.py").read_text())}
    imported = {
        name.split(".")[0]
        for path in PACKAGE.rglob("*.py")
        for _, name in imports(path.read_text(encoding="utf-8"), module_name(path, PACKAGE), path.name == "__init__.py")
    }
    third_party = imported - set(sys.stdlib_module_names) - {"megatron_entropic"} - BROUGHT_BY_OTHERS
    assert {PACKAGE_NAMES.get(name, name.replace("_", "-")) for name in third_party} <= required
