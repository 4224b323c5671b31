"""Whether Transformer Engine can be used is found out by importing it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.errors import UserError
from megatron_entropic.policy.megatron.platform import transformer_engine_is_usable


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


@pytest.mark.parametrize(
    ("transformer_engine", "modules"), [(True, ["mlp", "moe"]), (False, ["core_attn"])], ids=["fused", "plain"]
)
def test_selective_recomputation_is_of_what_the_layers_keep(transformer_engine: bool, modules: list[str]) -> None:
    """Fused attention keeps no scores: with it `core_attn`, which was asked for everywhere, saved nothing."""
    from megatron.core.transformer import TransformerConfig

    from megatron_entropic.policy.model.transformer_config import _recompute

    platform: Any = SimpleNamespace(transformer_engine=transformer_engine)
    options = _recompute(PolicyConfig(recompute="selective"), platform)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **options)
    assert config.recompute_modules == modules


def test_importing_the_policy_does_not_import_megatron_core() -> None:
    """The platform sets environment and filters before it; and it says which versions are none of ours."""
    code = "import sys, megatron_entropic.policy.policy; sys.exit('megatron' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
