"""What is in the unprotected store of a weight transfer cannot run a command in the engines' workers."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch.distributed as dist
from vllm.distributed import utils
from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId
from vllm.distributed.utils import StatelessProcessGroup

from megatron_entropic.rollout.store_guard import guard_store


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    """A store as two ranks share it, with the guard in place."""
    monkeypatch.setattr(utils, "pickle", pickle)
    guard_store()
    return dist.HashStore()


class _Command:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._mark),)


def test_the_id_of_a_communicator_arrives(store: dist.HashStore):
    sent = ncclUniqueId()
    sent.internal[3] = 77
    StatelessProcessGroup(rank=0, world_size=2, store=store).broadcast_obj(sent, src=0)
    found = StatelessProcessGroup(rank=1, world_size=2, store=store).broadcast_obj(None, src=0)
    assert isinstance(found, ncclUniqueId)
    assert bytes(found) == bytes(sent)


def test_a_foreign_value_is_refused_and_not_run(store: dist.HashStore, tmp_path: Path):
    for value in (_Command(tmp_path / "ran"), ncclUniqueId, "text", (ncclUniqueId(), 1), b"short"):
        store.set("broadcast_from/0/0", pickle.dumps(value))
        with pytest.raises(pickle.UnpicklingError, match="something else than the id of a NCCL communicator"):
            StatelessProcessGroup(rank=1, world_size=2, store=store).broadcast_obj(None, src=0)
    store.set("send_to/1/0", pickle.dumps(_Command(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError, match="mkdir has no place in the id of a communicator"):
        StatelessProcessGroup(rank=1, world_size=2, store=store).recv_obj(0)
    assert not (tmp_path / "ran").exists()
