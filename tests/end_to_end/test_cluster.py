"""Ray as the runs use it: private, on loopback, and with waits that say whom they waited for."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from megatron_entropic.cluster.placement import reserve
from megatron_entropic.cluster.processes import ActorProcess, dump_stacks, kill_processes, this_process
from megatron_entropic.cluster.session import ray_session
from megatron_entropic.cluster.waiting import dead_peers, gather, receive_streams
from megatron_entropic.config.run import ClusterConfig, Config
from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError
from megatron_entropic.observability.stacks import offer_stacks


@ray.remote
class Peer:
    """Does what a failing process does."""

    def answer(self) -> str:
        return "here"

    def tell(self, words: list[str], seconds: float = 0, *, end: str = "") -> Iterator[str]:
        for word in words:
            yield word
            time.sleep(seconds)
        if end == "hang":
            time.sleep(3600)
        if end == "fail":
            raise FileNotFoundError("model.safetensors is gone")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os._exit(7)

    def fail(self) -> None:
        raise FileNotFoundError("model.safetensors is gone")

    def lose_a_rank(self) -> None:
        raise RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 120000ms for recv")

    def place(self) -> ActorProcess:
        offer_stacks()
        return this_process()


OF_OTHER_WORK = {"RAY_ADDRESS": "127.0.0.1:1", "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}
OF_OTHER_WORK |= dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "ALL_PROXY"], "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def session() -> Iterator[str]:
    """In a shell that speaks of a cluster that is gone and of proxies that do not answer."""
    with pytest.MonkeyPatch.context() as shell:
        for name, value in OF_OTHER_WORK.items():
            shell.setenv(name, value)
        yield from _session()


def _session() -> Iterator[str]:
    with ray_session(ClusterConfig(device="cpu"), local_cpus=3) as device:
        yield device


def _config(folder: Path, tensor_parallel: int) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_dir": folder},
            "data": {"train_files": [folder / "train.parquet"]},
            "policy": {"tensor_parallel": tensor_parallel},
            "cluster": {"startup_timeout_s": 5},
        }
    )


def _ray_processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_local_session_listens_on_loopback_only_and_asks_for_a_token(session: str) -> None:
    assert session == "cpu"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    peer = Peer.options(num_cpus=0).remote()
    ray.get(peer.answer.remote())
    listening = {
        connection.laddr.ip
        for process in [psutil.Process(), *_ray_processes()]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening, "Ray listens somewhere"
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_what_a_shell_says_of_other_clusters_and_proxies_keeps_no_session_from_starting(session: str) -> None:
    peer = Peer.options(num_cpus=0).remote()
    assert {os.environ[name] for name in OF_OTHER_WORK} == set(OF_OTHER_WORK.values())
    assert gather({"here": peer.answer.remote()}, phase="hello", timeout_s=60) == {"here": "here"}


def test_gather_returns_answers_by_peer_in_order(session: str) -> None:
    peers = {f"engine {i}": Peer.options(num_cpus=0).remote() for i in range(2)}
    answers = gather({name: p.answer.remote() for name, p in peers.items()}, phase="hello", timeout_s=60)
    assert answers == {"engine 0": "here", "engine 1": "here"}


def test_a_timeout_names_the_phase_and_only_the_missing_peers(session: str) -> None:
    quick, slow = (Peer.options(num_cpus=0).remote() for _ in range(2))
    gather({"quick": quick.answer.remote(), "slow": slow.answer.remote()}, phase="start", timeout_s=60)
    calls = {"engine 0": quick.answer.remote(), "policy rank 3": slow.sleep.remote(30)}
    with pytest.raises(PhaseTimeout, match=r"publish: no answer within 2 s from policy rank 3$"):
        gather(calls, phase="publish", timeout_s=2)


def test_a_dead_peer_is_named_without_waiting_for_the_others(session: str) -> None:
    dying, slow = (Peer.options(num_cpus=0).remote() for _ in range(2))
    gather({"dying": dying.answer.remote(), "slow": slow.answer.remote()}, phase="start", timeout_s=60)
    start = time.monotonic()
    with pytest.raises(PeerDied, match="generate: the process of engine 1 died"):
        gather({"engine 0": slow.sleep.remote(60), "engine 1": dying.die.remote()}, phase="generate", timeout_s=60)
    assert time.monotonic() - start < 30


def test_a_peers_exception_arrives_with_its_message_and_cause(session: str) -> None:
    peer = Peer.options(num_cpus=0).remote()
    with pytest.raises(RunError, match=r"policy start: policy rank 0: FileNotFoundError: model.safetensors is gone"):
        gather({"policy rank 0": peer.fail.remote()}, phase="policy start", timeout_s=60)


def test_a_peer_that_waits_for_another_in_vain_is_no_error_of_its_own(session: str) -> None:
    peer = Peer.options(num_cpus=0).remote()
    with pytest.raises(PhaseTimeout, match=r"update: policy rank 0: RuntimeError: .*Timed out waiting"):
        gather({"policy rank 0": peer.lose_a_rank.remote()}, phase="update", timeout_s=60)


def test_streams_of_survivors_are_taken_as_they_come_and_the_lost_are_named(session: str) -> None:
    quick, slow, dying = (Peer.options(num_cpus=0).remote() for _ in range(3))
    peers = {"quick": quick, "slow": slow, "dying": dying}
    places = gather({name: p.place.remote() for name, p in peers.items()}, phase="start", timeout_s=60)
    large = "x" * 1_000_000
    streams = {
        "engine 0": quick.tell.remote(["a", "b", large], 0.3),
        "engine 1": dying.tell.remote(["c", "d"], 0.3, end="hang"),
        "engine 2": slow.tell.remote(["e", "f"], 30),
        "engine 3": quick.tell.remote([]),
    }
    taken: list[tuple[str, str]] = []
    calls = []

    def take(peer: str, word: str) -> None:
        taken.append((peer, word))
        if word == "d":
            os.kill(places["dying"].pid, signal.SIGKILL)

    lost = receive_streams(
        streams, take, phase="generate", timeout_s=8, while_waiting=lambda: calls.append(time.monotonic())
    )
    for peer, words in {"engine 0": ["a", "b", large], "engine 1": ["c", "d"], "engine 2": ["e"]}.items():
        assert [word for name, word in taken if name == peer] == words
    assert len(taken) == 6
    assert isinstance(lost["engine 1"], PeerDied)
    assert str(lost["engine 2"]) == "generate: no answer within 8 s from engine 2"
    assert set(lost) == {"engine 1", "engine 2"}
    assert max(later - earlier for earlier, later in itertools.pairwise(calls)) < 3
    pings = {"engine 0": quick.answer.remote(), "engine 1": dying.answer.remote(), "engine 2": slow.answer.remote()}
    assert dead_peers(pings) == ["engine 1"]
    failing = {"engine 0": quick.tell.remote(["a"], end="fail")}
    with pytest.raises(RunError, match=r"engine 0: FileNotFoundError: model\.safetensors is gone"):
        receive_streams(failing, take, phase="generate", timeout_s=60)
    assert taken[-1] == ("engine 0", "a")

    def refuse() -> None:
        raise ValueError("asked to stop")

    with pytest.raises(ValueError, match="asked to stop"):
        receive_streams({"engine 0": quick.tell.remote(["a"], 30)}, take, phase="x", timeout_s=60, while_waiting=refuse)


def test_processes_that_hang_say_where_and_can_be_killed(session: str, tmp_path: Path) -> None:
    peers = {f"engine {index}": Peer.options(num_cpus=0).remote() for index in range(2)}
    places = answered_places(peers)
    hanging = {name: peer.tell.remote(["a"], 60) for name, peer in peers.items()}
    time.sleep(1)
    os.kill(places["engine 1"].pid, signal.SIGSTOP)
    files = dump_stacks(places, tmp_path / "stacks")
    assert [path.name for path in files] == ["engine_0.txt", "engine_1.txt"]
    assert "in tell" in files[0].read_text()
    assert "State:\tT (stopped)" in files[1].read_text()
    kill_processes(places)
    lost = receive_streams(hanging, lambda *_: None, phase="generate", timeout_s=30)
    assert all(isinstance(error, PeerDied) for error in lost.values())
    assert len(lost) == 2
    assert "is gone" in dump_stacks(places, tmp_path / "later")[0].read_text()


def answered_places(peers: dict[str, ray.actor.ActorHandle]) -> dict[str, ActorProcess]:
    return gather({name: peer.place.remote() for name, peer in peers.items()}, phase="start", timeout_s=60)


def test_too_few_resources_are_refused_with_what_is_needed_and_what_is_there(session: str, tmp_path: Path) -> None:
    config = _config(tmp_path, tensor_parallel=4)
    with pytest.raises(RunError, match="4 policy ranks and 1 engines need 5 CPU"):
        reserve(config, "cpu")


def test_a_second_session_in_one_process_is_refused(session: str) -> None:
    with pytest.raises(RunError, match="already initialised"), ray_session(ClusterConfig(), local_cpus=1):
        pass


def test_a_reservation_can_be_given_back(session: str, tmp_path: Path) -> None:
    config = _config(tmp_path, tensor_parallel=2)
    for _ in range(2):
        placement = reserve(config, "cpu")
        assert [slot.bundle for slot in placement.policy + placement.engines] == [0, 1, 2]
        placement.release()


def test_a_session_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "session.py"
    script.write_text(
        "import time\n"
        "from megatron_entropic.config.run import ClusterConfig\n"
        "from megatron_entropic.cluster.environment import prepare_ray_environment\n"
        "prepare_ray_environment(ClusterConfig())\n"
        "from megatron_entropic.cluster.session import ray_session\n"
        "with ray_session(ClusterConfig(device='cpu'), local_cpus=1):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(1)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) > 3, "Ray runs servers of its own"
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, f"left behind: {alive}"
