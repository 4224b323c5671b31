"""The two Ray actors: a policy rank and a rollout engine. Thin: the work is in `policy/` and `rollout/`.

Their modules are imported inside the actors, so that a policy rank never loads vLLM, an engine never loads
megatron-core, and the driver loads neither.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import ray

from megatron_entropic.cluster.environment import use_interface_of
from megatron_entropic.cluster.processes import ActorProcess, this_process
from megatron_entropic.config.names import TRANSPORTS
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.config.run import ClusterConfig, Config, Device, Sampling
from megatron_entropic.observability.stacks import offer_stacks
from megatron_entropic.types import GenerationRequest, Response
from megatron_entropic.weight_sync.checksums import Piece
from megatron_entropic.weight_sync.plan import PublishPlan

P = ParamSpec("P")
R = TypeVar("R")

_MESSAGE_EVERY_S = 0.1
"""Least seconds between two messages of finished responses: one costs the engine about a millisecond."""

if TYPE_CHECKING:
    from megatron_entropic.policy.policy import Policy
    from megatron_entropic.rollout.engine import RolloutEngine
    from megatron_entropic.rollout.in_flight import InFlight, Report
    from megatron_entropic.rollout.schedule import Admission, Moment


def engine_environment(config: Config, device: Device) -> dict[str, str]:
    """Environment of an engine's actor; it must be there before the process imports torch or vLLM."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # Libraries open their own text files without naming an encoding, which fails where the locale is C.
    environment["PYTHONUTF8"] = "1"
    if device == "cpu":
        # Ranks and engines share the cores. Threads that spin while they wait made generation ten times slower.
        workers = config.rollout.engines * config.rollout.tensor_parallel
        environment |= {"OMP_NUM_THREADS": str(_threads(config, workers)), "OMP_WAIT_POLICY": "PASSIVE"}
    else:
        # Transformer Engine multiplies float32 in TF32, ten bits of mantissa, and so does PyTorch in NVIDIA's images. A
        # float32 policy and its engines then differ by 3e-4 in a log-probability. bfloat16 is not concerned.
        environment["NVIDIA_TF32_OVERRIDE"] = os.environ.get("NVIDIA_TF32_OVERRIDE", "0")
    if config.cluster.address == "local" and config.cluster.transport_on(device) == "gloo":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def policy_environment(config: Config, device: Device) -> dict[str, str]:
    """Environment of a policy rank's actor; it must be there before the process imports torch."""
    environment = engine_environment(config, device)
    if device == "cpu":
        return environment | {"OMP_NUM_THREADS": str(_threads(config, config.policy.world_size))}
    # Megatron-core's overlap of communication and computation relies on one hardware queue.
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # Every micro-batch has another length, which leaves holes between blocks of a fixed size. CUDA IPC hands out such
    # blocks, and takes no others.
    chosen_by_user = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if config.cluster.transport_on(device) != "ipc" and not chosen_by_user:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return environment


def _threads(config: Config, processes: int) -> int:
    """Threads of each of so many processes that work at the same time."""
    return config.cluster.cpu_threads or max(1, len(os.sched_getaffinity(0)) // processes)


def _join_network(cluster: ClusterConfig) -> None:
    if cluster.address != "local":
        use_interface_of(ray.util.get_node_ip_address())


@ray.remote(max_restarts=0)
class PolicyWorker:
    """Actor of one policy rank."""

    def __init__(self, config: Config, rank: int, device: Device) -> None:
        self._config = config
        self._rank = rank
        self._device = device
        self._policy: Policy
        self._listener: socket.socket | None = None
        offer_stacks()
        _join_network(config.cluster)

    def place(self) -> ActorProcess:
        """Node and id of this actor's process."""
        return this_process()

    def gpu(self) -> str:
        """This rank's GPU, as CUDA_VISIBLE_DEVICES names it on this node."""
        return os.environ["CUDA_VISIBLE_DEVICES"]

    def rendezvous(self) -> tuple[str, int]:
        """Listen for the process group's store; returns the address of this rank's node, and the port."""
        address = ray.util.get_node_ip_address()
        self._listener = socket.create_server((address, 0))
        return address, self._listener.getsockname()[1]

    def start(self, master_address: str, master_port: int) -> int:
        """Join the process group and build the model; returns the data-parallel replica this rank belongs to."""
        from megatron_entropic.policy.megatron.platform import Rendezvous
        from megatron_entropic.policy.policy import Policy

        sender = TRANSPORTS[self._config.cluster.transport_on(self._device)].sender
        self._policy = Policy(
            self._config,
            Rendezvous(master_port, master_address, self._rank, self._config.policy.world_size, self._listener),
            device=self._device,
            sender_type=find_attribute("cluster.transport", sender, arguments=3),
        )
        return self._policy.parallel.data_rank

    def call(self, method: Callable[Concatenate[Policy, P], R], *arguments: P.args, **options: P.kwargs) -> R:
        """Run a method of `Policy` on this rank; of arguments that are references it gets what they stand for."""
        return method(self._policy, *arguments, **options)


@ray.remote(max_restarts=0)
class EngineWorker:
    """Actor of one rollout engine."""

    def __init__(self, config: Config, device: Device, gpus: Sequence[str]) -> None:
        """Prepare the process, on GPUs as CUDA_VISIBLE_DEVICES names them; without any on those that Ray gives it."""
        self._config = config
        self._device = device
        self._engine: RolloutEngine
        if gpus:
            # Ray has hidden all of them. The driver reads this when the first call needs a GPU, which none has done.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self._in_flight: InFlight | None = None
        offer_stacks()
        _join_network(config.cluster)

    def place(self) -> ActorProcess:
        """Node and id of this actor's process."""
        return this_process()

    def ping(self) -> None:
        """Return at once, if there is a process to do so."""

    def start(self, *, load_weights: bool) -> None:
        """Load vLLM, and the weights of `model.hf_dir` unless some will be published before anything is sampled."""
        from megatron_entropic.rollout.engine import RolloutEngine

        self._engine = RolloutEngine(
            self._config.model.hf_dir,
            self._config.model.dtype,
            self._config.rollout,
            max_model_tokens=self._config.max_engine_tokens,
            seed=self._config.run.seed,
            device=self._device,
            transport=self._config.cluster.transport_on(self._device),
            sleeps=self._config.cluster.colocate,
            load_weights=load_weights,
        )

    def begin_in_flight(self, number: int, start: Moment, *, replaces: bool) -> None:
        """Work from now on on requests that stay while weights change; `number` is that of this engine.

        `replaces`: whether another process was in its place before.
        """
        from megatron_entropic.rollout.in_flight import InFlight
        from megatron_entropic.rollout.schedule import open_schedule

        run, replayed = self._config.run.output_dir, self._config.rollout.schedule_of
        schedule = open_schedule(run, number, replayed, start, replaces=replaces)
        self._in_flight = InFlight(self._engine, schedule, start)

    def advance(self, admissions: list[Admission], seconds: float) -> Report:
        """Take requests up and work on all unfinished ones for about so long; see `InFlight.advance`."""
        assert self._in_flight is not None, "begin_in_flight comes first"
        return self._in_flight.advance(admissions, seconds)

    def report(self) -> Report:
        """What there is to report, without doing anything; see `InFlight.report`."""
        assert self._in_flight is not None, "begin_in_flight comes first"
        return self._in_flight.report()

    def cut(self) -> None:
        """Cut everything that runs; the next report has what was sampled."""
        if self._in_flight is not None:
            self._in_flight.cut()

    def sleep(self) -> None:
        """Give the engine's device memory back; what runs is cut and goes on afterwards."""
        self.cut()
        self._engine.sleep()

    def wake(self, parts: list[str]) -> None:
        """Take the engine's device memory again, for `parts` of it."""
        self._engine.wake(parts)

    def connect(self, senders: list[dict[str, Any]], rank_offset: int) -> None:
        """Join the policy's weight-transfer groups, from `rank_offset` on in each."""
        self._engine.connect(senders, rank_offset)

    def receive(self, plan: PublishPlan, version: int) -> None:
        """Take in the weights that the policy publishes, as weights `version`; what runs is cut before."""
        if self._in_flight is None:
            self._engine.receive(plan, version)
            return
        self._in_flight.before_swap()
        self._engine.receive(plan, version)
        self._in_flight.swapped(version)

    def weight_pieces(self) -> list[Piece]:
        """Checksums of the weights in this engine."""
        return self._engine.weight_pieces()

    def generate(self, requests: list[GenerationRequest], sampling: Sampling) -> Iterator[list[tuple[int, Response]]]:
        """Yields responses with the positions of their requests, soon after they end, several in one message."""
        ready: list[tuple[int, Response]] = []
        sent = time.monotonic()
        for finished in self._engine.respond(requests, sampling):
            ready += finished
            if ready and time.monotonic() - sent >= _MESSAGE_EVERY_S:
                yield ready
                ready, sent = [], time.monotonic()
        if ready:
            yield ready
