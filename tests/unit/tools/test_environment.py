"""The environment script and the check after it, with uv and Python replaced by scripts that write down their calls."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from base64 import urlsafe_b64encode
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from check_environment import conflicts, import_problems, recorded_files  # noqa: E402

FAKE_UV = """#!/bin/bash
echo "uv $*" >>"$CALLS"
case "$*" in
  *--help*) echo --torch-backend ;;
  venv*) mkdir -p "${@: -1}/bin"; cp "$PYTHON" "${@: -1}/bin/python" ;;
  *transformer-engine-torch==*) env | grep ^NVTE_ >>"$CALLS"; echo "error: no such header"; exit "${TE_STATUS:-0}" ;;
esac
"""
FAKE_PYTHON = """#!/bin/bash
echo "python $*" >>"$CALLS"
case "$*" in
  *print*sys.executable*) echo "$0" ;;
  *check_environment*) exit "${CHECK_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script, the locks and, in `bin`, the stand-ins."""
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in (("uv", FAKE_UV), ("python3.12", FAKE_PYTHON)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def build(checkout: Path, **variables: str) -> tuple[int, str, str]:
    """Exit status, messages, and calls of uv and Python of one `environment.sh gpu`."""
    calls = checkout / "calls.txt"
    calls.write_text("")
    environment = {
        **os.environ,
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(checkout / "bin/python3.12"),
        "CALLS": str(calls),
        "CXX": "/bin/true",
        **variables,
    }
    result = subprocess.run(
        ["bash", "tools/environment.sh", "gpu"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return result.returncode, result.stderr, calls.read_text()


def locked(name: str) -> str:
    """Version of a package in the lock of the CUDA environment."""
    text = (ROOT / "requirements/gpu.txt").read_text(encoding="utf-8")
    return next(line.split("==")[1] for line in text.splitlines() if line.startswith(f"{name}=="))


def test_cuda_python_and_its_bindings_are_of_one_generation() -> None:
    """An older cuda-python ships the files of cuda-bindings; with both, megatron-core's import raises."""
    assert locked("cuda-python").split(".")[0] == locked("cuda-bindings").split(".")[0]


def test_transformer_engine_is_compiled_with_the_locked_torch(checkout: Path) -> None:
    status, messages, calls = build(checkout)
    assert status == 0, messages
    install = next(line for line in calls.splitlines() if "transformer-engine-torch==" in line)
    assert calls.index("pip sync") < calls.index(install), "torch must be installed before the extension is compiled"
    assert "--no-build-isolation-package transformer-engine-torch" in install
    assert "--build-constraints requirements/gpu.txt" in install
    assert f"built-for=torch=={locked('torch')}" in install, "a build from another torch would come out of uv's cache"
    assert {"NVTE_BUILD_USE_NVIDIA_WHEELS=1", "NVTE_PYTORCH_FORCE_BUILD=TRUE"} <= set(calls.splitlines())
    assert "check_environment.py" in calls
    assert (checkout / ".venv/.environment_stamp").is_file()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/nowhere/c++"}, "no C++ compiler ('/nowhere/c++')"),
        ({"TE_STATUS": "1"}, "error: no such header"),
        ({"ME_WITHOUT_TE": "1"}, "ME_WITHOUT_TE is set"),
    ],
)
def test_without_its_extension_transformer_engine_is_left_out_whole_and_the_reason_said(
    checkout: Path, variables: dict[str, str], reason: str
) -> None:
    """Beside a Transformer Engine that lacks its extension megatron-core cannot be imported."""
    status, messages, calls = build(checkout, **variables)
    assert status == 0, messages
    assert f"WITHOUT Transformer Engine: {reason}" in messages.replace("\n", " ") or reason in messages
    assert "pip uninstall" in calls
    assert re.search(r"uninstall .*transformer-engine transformer-engine-cu13 transformer-engine-torch$", calls, re.M)


def test_an_environment_that_does_not_import_is_not_called_ready(checkout: Path) -> None:
    status, messages, _ = build(checkout, CHECK_STATUS="1")
    assert status == 1
    assert "not fit for use" in messages
    assert not (checkout / ".venv/.environment_stamp").exists()


def test_another_folder_leaves_the_cpu_environment_alone(checkout: Path) -> None:
    status, messages, calls = build(checkout, ME_VENV=".venv-gpu")
    assert status == 0, messages
    assert (checkout / ".venv-gpu/.environment_stamp").is_file()
    assert not (checkout / ".venv").exists()
    assert not re.search(r"--python \.venv( |$)", calls, re.M)


def distribution(folder: Path, name: str, files: dict[str, str]) -> metadata.Distribution:
    """An installed distribution that owns these files."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")

    def line(path: str, text: str) -> str:
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        return f"{path},sha256={digest},{len(text)}\n"

    (info / "RECORD").write_text("".join(line(path, text) for path, text in files.items()))
    return metadata.Distribution.at(info)


def test_two_distributions_that_write_one_file_are_named(tmp_path: Path) -> None:
    whole = distribution(tmp_path, "cuda-python", {"cuda/bindings/runtime.so": "12.6", "cuda/__init__.py": ""})
    part = distribution(tmp_path, "cuda-bindings", {"cuda/bindings/runtime.so": "13.5", "cuda/__init__.py": ""})
    found = conflicts(recorded_files([whole, part]))
    assert found == {("cuda-bindings", "cuda-python"): [str(tmp_path / "cuda/bindings/runtime.so")]}


def test_every_module_that_cannot_be_imported_is_named() -> None:
    problems = import_problems(("json", "no_such_module", "html.no_such_part"))
    assert [problem.split(":")[0] for problem in problems] == ["no_such_module", "html.no_such_part"]
