"""Stands for Transformer Engine's compiled bindings: its own enumerations, and functions that refuse to be called.

Names and members are read from the sources that the bindings are compiled from (tests/gpu_stack.sh unpacks them), so
that Transformer Engine's Python imports, and builds modules, as it does beside the compiled ones.
"""

from __future__ import annotations

import enum
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - loads NCCL and cuDNN, by whose names Transformer Engine then finds them

FOLDER = Path(sys.prefix)
PYTHON = FOLDER / "transformer_engine_python"
SOURCE = FOLDER / "transformer_engine_source"


class Bindings(types.ModuleType):
    """A module in which every public name exists: a class, or a function that raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {}) if name[:1].isupper() else _refusing(name)
        setattr(self, name, made)
        return made


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"transformer_engine_torch.{name} was called, which only a GPU has")

    refuse.__name__ = name
    return refuse


def enumerations() -> dict[str, list[str]]:
    """Members of every enumeration that the sources declare, in order."""
    found = {}
    for path in [*SOURCE.rglob("*.h"), *SOURCE.rglob("*.cpp")]:
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\\\n", "\n")
        for match in re.finditer(r'py(?:bind11)?::enum_<[^>]*>\(\s*m\s*,\s*"(\w+)"(.*?);', text, re.S):
            if members := re.findall(r'\.value\(\s*"(\w+)"', match[2]):
                found[match[1]] = members
    return found


def function_names() -> set[str]:
    """Every function that the sources bind."""
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in SOURCE.rglob("*.cpp"))
    return {name for text in texts for name in re.findall(r'm\.def\(\s*"(\w+)"', text)}


def install(prepare: Callable[[Any], None] = lambda bindings: None) -> Any:
    """Makes `import transformer_engine.pytorch` work in this process; returns the bindings.

    Args:
        prepare: called with the bindings before Transformer Engine sees them.
    """
    sys.path.insert(0, str(PYTHON))
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None, f"{PYTHON} holds no transformer_engine: run bash tests/gpu_stack.sh"
    package: Any = types.ModuleType("transformer_engine")
    package.__path__, package.__spec__, package.__file__ = (
        list(spec.submodule_search_locations or ()),
        spec,
        spec.origin,
    )
    sys.modules["transformer_engine"] = package
    bindings: Any = Bindings("transformer_engine_torch")
    for name, members in enumerations().items():
        setattr(bindings, name, enum.IntEnum(name, {member: index for index, member in enumerate(members)}))
    for name in function_names():
        getattr(bindings, name)
    prepare(bindings)
    sys.modules["transformer_engine_torch"] = bindings
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    package.common = common
    package.__version__ = metadata.version("transformer_engine")
    package.pytorch = importlib.import_module("transformer_engine.pytorch")
    return bindings
