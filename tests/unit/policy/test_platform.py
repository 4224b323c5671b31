"""Whether Transformer Engine can be used is found out by importing it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_entropic.errors import UserError
from megatron_entropic.policy.platform import transformer_engine_is_usable


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of a `transformer_engine` that is found first; what it says on import is for the test to write."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    transformer_engine_is_usable.cache_clear()
    yield package
    transformer_engine_is_usable.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_one_that_imports_is_used(installed: Path) -> None:
    (installed / "pytorch.py").write_text("")
    assert transformer_engine_is_usable()


def test_one_built_for_another_torch_is_not_used_and_the_log_says_why(
    installed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was: `find_spec` said yes, megatron-core said no, and the layer specification was None."""
    (installed / "pytorch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert not transformer_engine_is_usable()
    assert "undefined symbol: _ZN3c10" in caplog.text


def test_one_without_its_extension_is_refused_with_what_to_do(installed: Path) -> None:
    (installed / "pytorch.py").write_text("raise FileNotFoundError('Could not find shared object file')")
    with pytest.raises(UserError, match=r"Could not find shared object file.*tools/environment.sh gpu"):
        transformer_engine_is_usable()
