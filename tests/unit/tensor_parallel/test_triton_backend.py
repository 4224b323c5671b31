"""The Triton backend where there is no GPU: when it is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_entropic.tensor_parallel import logprob_and_entropy
from megatron_entropic.tensor_parallel.backends import select_backend
from megatron_entropic.tensor_parallel.eager import EagerBackend


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it needs a GPU and the package triton"):
        logprob_and_entropy(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), backend="triton")


def test_a_machine_without_triton_is_refused_or_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cuda = torch.device("cuda", 0)
    assert isinstance(select_backend("auto", cuda), EagerBackend)
    with pytest.raises(ValueError, match="cannot run on cuda:0"):
        select_backend("triton", cuda)


def test_auto_takes_triton_on_a_gpu_and_eager_elsewhere() -> None:
    assert type(select_backend("auto", torch.device("cuda", 0))).__name__ == "TritonBackend"
    assert isinstance(select_backend("auto", torch.device("cpu")), EagerBackend)
    assert isinstance(select_backend("eager", torch.device("cuda", 0)), EagerBackend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be auto, eager or triton, not 'Triton'"):
        logprob_and_entropy(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), backend="Triton")  # type: ignore[arg-type]


def test_triton_is_imported_only_when_it_is_chosen() -> None:
    """A CPU needs no triton, and importing it costs a second."""
    code = "import sys, megatron_entropic.tensor_parallel; sys.exit('triton.language' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
