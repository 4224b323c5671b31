"""Which megatron-core versions are accepted, and how an unknown one is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_entropic.policy.megatron.platform import check_megatron_version, installed_megatron_version


@pytest.mark.parametrize(
    ("version", "found"), [("0.16.1", (0, 16)), ("0.17.0", (0, 17)), ("0.19.2", (0, 19)), ("0.19.0rc3", (0, 19))]
)
def test_known_versions(version, found):
    assert check_megatron_version(version) == found


@pytest.mark.parametrize("version", ["0.15.4", "0.20.0", "1.0.0", "0.2", "core_r0.16", ""])
def test_other_versions_are_refused(version):
    with pytest.raises(ValueError, match="megatron-core"):
        check_megatron_version(version)


def test_the_installed_version_is_supported():
    check_megatron_version(installed_megatron_version())


def test_a_platform_refuses_an_unknown_megatron_before_touching_anything(tmp_path):
    """An installation that calls itself 0.20.0 stands before the real one on the path."""
    metadata = tmp_path / "megatron_core-0.20.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.20.0\n")
    code = (
        "import sys, torch; from megatron_entropic.policy.megatron.platform import select_platform\n"
        "before = torch.cuda.current_device\n"
        "try:\n    select_platform('cpu')\n"
        "except ValueError as error:\n    print(error)\n"
        "assert torch.cuda.current_device is before and 'megatron.core' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "megatron-core 0.20.0 is not supported" in result.stdout
    assert "megatron-core==0.16.1" in result.stdout
