"""Every module of the package imports in the CUDA environment, without a GPU, with and without Transformer Engine.

But for those that work inside another program: without it they say so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[2])
if sys.argv[1] == "te":
    import te_bindings
    te_bindings.install()
    import megatron.core.extensions.transformer_engine as extension
    assert extension.HAVE_TE
import megatron_entropic
from megatron_entropic.errors import UserError
guests = ("megatron_entropic.plugins.", "megatron_entropic.environments.adapters.")
names = [module.name for module in pkgutil.walk_packages(megatron_entropic.__path__, "megatron_entropic.")]
names = [name for name in names if not name.endswith("__main__")]
failed, refused = [], []
for name in names:
    try:
        importlib.import_module(name)
    except UserError as error:
        assert name.startswith(guests), (name, error)
        refused.append(name)
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
assert not failed, failed
assert len(refused) <= 6, refused
assert len(names) - len(refused) > 250, names
"""


@pytest.mark.parametrize("layers", ["te", "local"])
def test_every_module_imports(layers: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, layers, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]
