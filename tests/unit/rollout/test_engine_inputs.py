"""What the engine checks and decides before vLLM is asked; no engine is started."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import subprocess
import sys

import pytest

from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.data.tokenizer import stop_token_ids
from megatron_entropic.rollout.engine import RolloutEngine, check_complete
from megatron_entropic.rollout.score_backend import score_file
from megatron_entropic.rollout.vllm_setup import imported_for_good, prepare_environment
from megatron_entropic.weight_sync.gloo import FlatContents

MODEL = {"embed": (7, 4), "norm": (4,), "head": (7, 4)}


def contents(**shapes: tuple[int, ...]) -> FlatContents:
    return FlatContents(tuple(shapes), tuple(shapes.values()), "float32")


def test_a_complete_update_passes_in_any_order_and_division():
    check_complete([contents(head=(7, 4), norm=(4,)), contents(embed=(7, 4))], MODEL)


def test_every_misfit_of_an_update_is_listed():
    update = [contents(embed=(4, 7), norm=(4,)), contents(norm=(4,), lm_bias=(7,))]
    with pytest.raises(ValueError, match="does not fit the engine's model") as error:
        check_complete(update, MODEL)
    assert str(error.value).splitlines()[1:] == [
        "  norm: sent twice",
        "  head: missing",
        "  embed: shape (4, 7), the model has (7, 4)",
        "  lm_bias: the model has no such tensor",
    ]


def test_quantised_rollouts_are_refused_on_a_cpu(tmp_path):
    config = RolloutConfig(quantization="fp8")
    with pytest.raises(ValueError, match=r"rollout\.quantization=fp8 needs a GPU"):
        RolloutEngine(tmp_path, "bfloat16", config, max_model_tokens=64, seed=1, device="cpu")


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 3}, None, [3]),
        ({"eos_token_id": 3}, {"eos_token_id": [9, 3]}, [3, 9]),
        ({"eos_token_id": None}, {"eos_token_id": 0}, [0]),
        ({}, {}, []),
    ],
)
def test_stop_tokens_come_from_both_files(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_token_ids(tmp_path) == expected


def test_environment_keeps_what_the_user_set_and_drops_what_would_override_the_config(monkeypatch):
    for name in ("VLLM_HOST_IP", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    prepare_environment("cuda")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    prepare_environment("cpu")
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def test_noise_is_dropped_by_message_once(caplog):
    from megatron_entropic.rollout.vllm_setup import silence_known_noise

    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    before = len(logger.filters)
    silence_known_noise()
    silence_known_noise()
    assert len(logger.filters) == max(before, 1)
    logger.addHandler(caplog.handler)
    try:
        logger.warning("%s: Failed to load weights", "Llama3RotaryEmbedding")
        logger.warning("%s: Failed to load weights", "ParallelLMHead")
        logger.warning("%s: Failed to load weights", "QKVParallelLinear")
    finally:
        logger.removeHandler(caplog.handler)
    messages = {record.getMessage() for record in caplog.records}
    assert messages == {"QKVParallelLinear: Failed to load weights"}


def test_importing_the_room_does_not_import_vllm():
    modules = "engine, score_backend, plugin, vllm_setup, nccl_transport"
    code = f"import sys; from megatron_entropic.rollout import {modules}; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_score_refuses_other_temperatures_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"--temperature 0.7: vLLM reports .* at temperature 1 only"):
        score_file(tmp_path / "none", tmp_path / "none", tmp_path / "out", "float32", 0.7)


def test_the_installed_vllm_takes_our_nccl_options_and_loads_the_plugin():
    """The names of the CUDA path, on a machine without CUDA."""
    prepare_environment("cpu")
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
    from vllm.plugins import load_general_plugins

    from megatron_entropic.rollout.gloo_transport import GlooUpdateInfo
    from megatron_entropic.rollout.nccl_transport import _trainer_init, packing_options

    rendezvous = {"master_address": "127.0.0.1", "master_port": 1, "world_size": 2, "rank_offset": 1}
    connection, update = packing_options()
    info = NCCLWeightTransferEngine.init_info_cls(**rendezvous, **connection)
    tensors = contents(embed=(7, 4)).update_info()
    NCCLWeightTransferEngine.update_info_cls(**tensors, **update)
    gloo = GlooUpdateInfo(**tensors, bucket_tensors=[1], bucket_senders=[1])
    assert gloo.contents_by_sender(2) == [[], [contents(embed=(7, 4))]]
    assert (info if connection else NCCLWeightTransferEngine.update_info_cls(**tensors, **update)).packed
    assert callable(_trainer_init())
    assert callable(packed_nccl_broadcast_producer)
    load_general_plugins()
    assert "gloo" in WeightTransferEngineFactory._registry


def test_the_nccl_sender_keeps_its_port_from_choice_to_use_and_ends_its_communicator(monkeypatch):
    """With vLLM's real store on a CPU; only the communicator is replaced."""
    prepare_environment("cpu")
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.utils import StatelessProcessGroup

    from megatron_entropic.rollout.nccl_transport import NcclSender

    assert callable(pynccl.PyNcclCommunicator.destroy)
    ended = []
    monkeypatch.setattr(StatelessProcessGroup, "destroy", lambda group: ended.append(group), raising=False)
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", lambda store, device: store)
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    sender = NcclSender("127.0.0.1", 0, 5.0)
    with pytest.raises(OSError, match="in use"):
        socket.create_server(sender.address, reuse_port=False)
    sender.accept()
    assert sender._group.world_size == 1
    socket.create_connection(sender.address, timeout=5).close()
    group = sender._group
    sender.close()
    assert ended == [group], "the communicator is not left on the device for the next one to lie beside"
    sender.close()
    assert ended == [group]


def test_an_older_vllm_finds_the_port_that_the_nccl_sender_has_told_its_workers(monkeypatch):
    """It opens the port by its number: between that and its choice another program could take it."""
    prepare_environment("cpu")
    from vllm.distributed.utils import StatelessProcessGroup

    from megatron_entropic.rollout import nccl_transport

    def initialise(info):
        return StatelessProcessGroup.create(info["master_address"], info["master_port"], 0, info["world_size"])

    monkeypatch.setattr(StatelessProcessGroup, "destroy", lambda group: None, raising=False)
    monkeypatch.setattr(nccl_transport, "_takes_listener", lambda: False)
    monkeypatch.setattr(nccl_transport, "_trainer_init", lambda: initialise)
    sender = nccl_transport.NcclSender("127.0.0.1", 0, 5.0)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(sender.address)
    sender.accept()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(sender.address)
    socket.create_connection(sender.address, timeout=5).close()
    sender.close()


def test_what_is_imported_for_good_is_not_looked_at_again() -> None:
    before = gc.get_freeze_count()
    try:
        with imported_for_good():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
