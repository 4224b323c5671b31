"""All rollout engines as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray

from megatron_entropic.cluster.actors import EngineWorker, engine_environment
from megatron_entropic.cluster.nodes import node_table
from megatron_entropic.cluster.placement import Placement
from megatron_entropic.cluster.processes import ActorProcess, kill_processes, write_stacks
from megatron_entropic.cluster.waiting import (
    answered,
    dead_peers,
    gather,
    head_refusal,
    receive_streams,
    require_raylet,
)
from megatron_entropic.config.run import Config, Sampling
from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError
from megatron_entropic.rollout.schedule import Admission, Moment
from megatron_entropic.types import GenerationRequest, Response
from megatron_entropic.weight_sync.plan import PublishPlan


class EngineGroup:
    """All rollout engines, one Ray actor each; a lost one can be replaced. `sampling` decides who samples what."""

    def __init__(
        self, config: Config, placement: Placement, shared_gpus: Sequence[str] = (), *, load_weights: bool
    ) -> None:
        """Create the actors; nothing heavy happens before `start`.

        Args:
            config: the run's configuration.
            placement: room for each engine.
            shared_gpus: GPU of each policy rank, where engines take turns with these; empty: Ray gives them their own.
            load_weights: whether engines read the weights of `model.hf_dir`. Where a policy publishes its own before
                the first rollout, each would read the whole model for nothing.
        """
        self._config = config
        self._placement = placement
        self._shared_gpus = shared_gpus
        self._load_weights = load_weights
        self._actors = {f"engine {number}": self._new_actor(number) for number in range(config.rollout.engines)}
        self._places = {name: actor.place.remote() for name, actor in self._actors.items()}
        self._losses: list[RunError] = []
        self._losses_told = 0
        self._losses_of_nodes = 0

    @property
    def names(self) -> list[str]:
        """Names of the engines, such as "engine 0", by which errors and `stream` call them."""
        return list(self._actors)

    @property
    def workers(self) -> int:
        """Number of vLLM workers that receive weights, over all engines."""
        return self._config.rollout.engines * self._config.rollout.tensor_parallel

    def processes(self) -> dict[str, ActorProcess]:
        """Processes of the engines that have told theirs, by name."""
        return answered(self._places)

    def new_losses(self) -> list[RunError]:
        """Errors for which engines were replaced since the last call."""
        told, self._losses_told = self._losses_told, len(self._losses)
        return self._losses[told:]

    def begin_start(self) -> dict[str, ray.ObjectRef]:
        """Start all engines; the pending calls end when each has loaded. They overlap with the policy's own start."""
        return {name: actor.start.remote(load_weights=self._load_weights) for name, actor in self._actors.items()}

    def finish_start(self, pending: dict[str, ray.ObjectRef]) -> None:
        """Wait for the pending calls of `begin_start`."""
        gather(pending, phase="engine start", timeout_s=self._config.cluster.startup_timeout_s)

    def stream(
        self,
        requests: dict[str, list[GenerationRequest]],
        sampling: Sampling,
        take: Callable[[str, list[tuple[int, Response]]], None],
        *,
        phase: str,
        while_waiting: Callable[[], None],
    ) -> dict[str, RunError]:
        """Let engines answer; returns the error of each that was lost before it had answered everything, by name.

        Args:
            requests: requests to each engine, by name.
            sampling: temperature, limits.
            take: gets the name of an engine and what it has finished, with the positions of its requests.
            phase: name of what is going on, for errors.
            while_waiting: called at least about once a second; may raise.
        """
        require_raylet(phase)
        return receive_streams(
            {name: self._actors[name].generate.remote(asked, sampling) for name, asked in requests.items()},
            take,
            phase=phase,
            timeout_s=self._config.cluster.generate_timeout_s,
            while_waiting=while_waiting,
        )

    def actor(self, name: str) -> ray.actor.ActorHandle:
        """The process in the place of an engine; another one after it was replaced."""
        return self._actors[name]

    def begin_in_flight(self, starts: dict[str, tuple[Moment, bool]]) -> None:
        """Let the named engines keep requests while weights change, each counting from its moment.

        The other value says whether another process was in its place before.
        """
        calls = {
            name: actor.begin_in_flight.remote(number, starts[name][0], replaces=starts[name][1])
            for number, (name, actor) in enumerate(self._actors.items())
            if name in starts
        }
        gather(calls, phase="engines begin", timeout_s=self._config.cluster.startup_timeout_s)

    def advance(self, actor: ray.actor.ActorHandle, admissions: list[Admission], seconds: float) -> ray.ObjectRef:
        """Pending call in which an engine works for about so long; its result is a `Report`."""
        reference: ray.ObjectRef = actor.advance.remote(admissions, seconds)
        return reference

    def report(self, actor: ray.actor.ActorHandle) -> ray.ObjectRef:
        """Pending call for what an engine has to report, without more work."""
        reference: ray.ObjectRef = actor.report.remote()
        return reference

    def cut(self) -> None:
        """Cut everything that runs in any engine."""
        calls = {name: actor.cut.remote() for name, actor in self._actors.items()}
        gather(calls, phase="engines cut", timeout_s=self._config.cluster.generate_timeout_s)

    def find_lost(self, error: RunError) -> dict[str, RunError]:
        """Find engines whose process or node is gone; each name with `error`, in which the loss showed."""
        pings = {name: actor.ping.remote() for name, actor in self._actors.items()}
        return dict.fromkeys(sorted({*dead_peers(pings), *self._on_lost_nodes()}), error)

    def replace(self, lost: dict[str, RunError]) -> None:
        """Start new engines in the places of the named ones, with the weights that all had at their start.

        Raises:
            RunError: the first one's, if `cluster.max_engine_restarts` are used up.
        """
        limit = self._config.cluster.max_engine_restarts
        homeless = sorted(self._on_lost_nodes() & lost.keys(), key=self.names.index)
        here = {name: error for name, error in lost.items() if name not in homeless}
        if len(self._losses) - self._losses_of_nodes + len(here) > limit:
            raise next(iter(here.values()))
        lost = here | self._move({name: lost[name] for name in homeless})
        if any(isinstance(error, PhaseTimeout) for error in lost.values()):
            stacks = write_stacks(self._config.run.output_dir, self.processes())
            lost = {name: type(error)(f"{error}\n{stacks}") for name, error in lost.items()}
        self._losses += lost.values()
        kill_processes({name: place for name, place in self.processes().items() if name in here})
        starting = {}
        for number, (name, actor) in enumerate(self._actors.items()):
            if name in lost:
                ray.kill(actor)
                replacement = self._new_actor(number)
                self._actors[name] = replacement
                self._places[name] = replacement.place.remote()
                starting[name] = replacement.start.remote(load_weights=self._load_weights)
        self.finish_start(starting)

    def _on_lost_nodes(self) -> set[str]:
        """Names of the engines whose node is gone; none where Ray's head is, which alone knows the nodes."""
        if head_refusal() is not None:
            return set()
        gone = {node.id for node in node_table().gone}
        return {name for name, place in self.processes().items() if place.node_id in gone}

    def _move(self, lost: dict[str, RunError]) -> dict[str, RunError]:
        """Find other nodes for engines whose own is gone; returns their errors with the name of the new one added.

        Raises:
            RunError: the first one's, if there is no room.
        """
        if not lost:
            return {}
        try:
            ids = self._placement.move_engines([self.names.index(name) for name in lost], self._config)
        except RunError as refusal:
            error = next(iter(lost.values()))
            raise type(error)(f"{error}\nno other node has room for {', '.join(lost)}: {refusal}") from refusal
        self._losses_of_nodes += len(lost)
        name_of = {node.id: node.names[0] for node in node_table().up}
        return {
            name: type(error)(f"{error}\nits node is gone; {name} goes on on {name_of.get(node, node)}")
            for (name, error), node in zip(lost.items(), ids, strict=True)
        }

    def sleep(self) -> None:
        """Let every engine give its device memory back; it keeps its weights in host memory.

        An engine that died holds none; whoever wakes it learns of its death.
        """
        for name, call in {name: actor.sleep.remote() for name, actor in self._actors.items()}.items():
            with suppress(PeerDied):
                gather({name: call}, phase="engines fall asleep", timeout_s=self._config.cluster.publish_timeout_s)

    def wake(self, parts: list[str]) -> None:
        """Undo `sleep` for `parts`, vLLM's tags; with all of them an engine can generate again."""
        calls = {name: actor.wake.remote(parts) for name, actor in self._actors.items()}
        gather(calls, phase="engines wake up", timeout_s=self._config.cluster.publish_timeout_s)

    def connect(self, senders: list[dict[str, Any]]) -> dict[str, ray.ObjectRef]:
        """Pending calls that join the weight-transfer groups, each engine with its own offset of receiver ranks."""
        width = self._config.rollout.tensor_parallel
        return {
            name: actor.connect.remote(senders, 1 + number * width)
            for number, (name, actor) in enumerate(self._actors.items())
        }

    def receive(self, plan: PublishPlan, version: int) -> dict[str, ray.ObjectRef]:
        """Pending calls that take in the buckets of `plan` as weights `version`."""
        return {name: actor.receive.remote(plan, version) for name, actor in self._actors.items()}

    def weight_pieces(self) -> dict[str, ray.ObjectRef]:
        """Pending calls for the checksums of the weights in every engine."""
        return {name: actor.weight_pieces.remote() for name, actor in self._actors.items()}

    def _new_actor(self, engine: int) -> ray.actor.ActorHandle:
        environment = engine_environment(self._config, self._placement.device)
        options = self._placement.engine_options(engine)
        width = self._config.rollout.tensor_parallel
        gpus = self._shared_gpus[engine * width : (engine + 1) * width]
        made: ray.actor.ActorHandle = EngineWorker.options(  # type: ignore[attr-defined]
            **options, runtime_env={"env_vars": environment}
        ).remote(self._config, self._placement.device, gpus)
        return made
