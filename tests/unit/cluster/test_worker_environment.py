"""Environment of ranks and engines, by device and transport."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_entropic.cluster.actors import engine_environment, policy_environment
from megatron_entropic.config.run import Config

ALLOCATOR = "PYTORCH_ALLOC_CONF"


def with_transport(transport: str) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_dir": "/model"},
            "data": {"train_files": [Path("/train.parquet")]},
            "cluster": {"transport": transport},
            "run": {"output_dir": "/run"},
        }
    )


def test_only_policy_ranks_on_gpus_have_one_hardware_queue() -> None:
    config = with_transport("nccl")
    assert policy_environment(config, "cuda")["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in engine_environment(config, "cuda")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in policy_environment(config, "cpu")


def test_memory_of_policy_ranks_grows_in_place_unless_cuda_ipc_hands_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert policy_environment(with_transport("nccl"), "cuda")[ALLOCATOR] == "expandable_segments:True"
    assert ALLOCATOR not in policy_environment(with_transport("ipc"), "cuda")
    assert ALLOCATOR not in engine_environment(with_transport("nccl"), "cuda")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert ALLOCATOR not in policy_environment(with_transport("nccl"), "cuda"), "the user's own is kept"


def test_a_float32_policy_on_a_gpu_multiplies_in_float32_and_not_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    config = with_transport("nccl")
    for environment in (policy_environment(config, "cuda"), engine_environment(config, "cuda")):
        assert environment["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "NVIDIA_TF32_OVERRIDE" not in policy_environment(config, "cpu")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert policy_environment(config, "cuda")["NVIDIA_TF32_OVERRIDE"] == "1", "the user's own is kept"


def test_libraries_read_their_files_where_the_locale_is_c() -> None:
    assert engine_environment(with_transport("gloo"), "cpu")["PYTHONUTF8"] == "1"


@pytest.mark.parametrize(
    ("threads", "of_rank", "of_worker"), [(1, "1", "1"), (3, "3", "3"), (None, "4", "2")], ids=["one", "three", "cores"]
)
def test_the_side_that_works_has_the_cores(
    threads: int | None, of_rank: str, of_worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(9)))
    config = with_transport("gloo").model_copy(deep=True)
    config.cluster.cpu_threads = threads
    config.policy.tensor_parallel, config.rollout.engines, config.rollout.tensor_parallel = 2, 2, 2
    assert policy_environment(config, "cpu")["OMP_NUM_THREADS"] == of_rank
    assert engine_environment(config, "cpu")["OMP_NUM_THREADS"] == of_worker
    assert policy_environment(config, "cpu")["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_NUM_THREADS" not in policy_environment(config, "cuda")
