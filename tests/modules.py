"""Scripts that belong to no package, such as examples and tools, as modules of a test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_module(path: Path, name: str) -> ModuleType:
    """The file at `path` as the module `name`, run anew at each call."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Its dataclasses look their module up by name.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module
