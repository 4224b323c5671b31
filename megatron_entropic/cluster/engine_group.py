"""All rollout engines as one object."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from megatron_entropic.cluster.actors import EngineWorker, engine_environment
from megatron_entropic.cluster.placement import Placement
from megatron_entropic.cluster.processes import ActorProcess, kill_processes, write_stacks
from megatron_entropic.cluster.waiting import answered, dead_peers, gather, receive_streams, require_raylet
from megatron_entropic.config.run import Config, Sampling
from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError
from megatron_entropic.types import GenerationRequest, Prompt, Sample

Arrived = Callable[[list[tuple[int, Sample]]], None]
"""Takes responses, each with its position, as they come; which come together depends on the clock."""


class EngineGroup:
    """One Ray actor for each engine; prompts are dealt out in whole groups.

    An engine that is lost is replaced in place, up to `cluster.max_engine_restarts` times in all: the new one gets the
    current weights from `renew_weights` and the prompts that the lost one had. It samples the same responses, because
    each has a seed of its own.
    """

    def __init__(self, config: Config, placement: Placement) -> None:
        """Create the actors; nothing heavy happens before `start`."""
        self._config = config
        self.before_rollout: Callable[[], None] = lambda: None
        """Called before engines sample; see `launch.DeviceTurns`."""
        self._placement = placement
        self._actors = [self._new_actor(engine) for engine in range(config.rollout.engines)]
        self._places = {self._name(engine): actor.place.remote() for engine, actor in enumerate(self._actors)}
        self._losses: list[RunError] = []
        self._losses_told = 0
        self.renew_weights: Callable[[], None] = lambda: None
        """Called after engines were replaced, to connect all of them to the policy and give them its weights."""

    @property
    def workers(self) -> int:
        """Number of vLLM workers that receive weights, over all engines."""
        return self._config.rollout.engines * self._config.rollout.tensor_parallel

    def processes(self) -> dict[str, ActorProcess]:
        """Where each engine runs, of those that came so far as to say so."""
        return answered(self._places)

    def new_losses(self) -> list[RunError]:
        """Why engines were replaced since the last call."""
        told, self._losses_told = self._losses_told, len(self._losses)
        return self._losses[told:]

    def begin_start(self) -> dict[str, ray.ObjectRef]:
        """Pending calls that end when every engine has loaded; they overlap with the policy's own start."""
        return {self._name(engine): actor.start.remote() for engine, actor in enumerate(self._actors)}

    def finish_start(self, pending: dict[str, ray.ObjectRef]) -> None:
        """Wait for `begin_start`."""
        gather(pending, phase="engine start", timeout_s=self._config.cluster.startup_timeout_s)

    def generate(
        self,
        prompts: list[Prompt],
        step: int,
        *,
        first_place: int = 0,
        arrived: Arrived = lambda _: None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> list[Sample]:
        """`samples_per_prompt` responses to each prompt, grouped by prompt, in the caller's order.

        Every response has a seed of its own, made from run, step, the prompt's place in the step, and sample: what is
        sampled depends neither on the number of engines nor on restarts, and a prompt that comes twice is sampled
        anew. `arrived` gets every response once, with its position in what is returned; `while_waiting` is called at
        least about once a second and may raise.

        Args:
            first_place: place of the first prompt among all that the step asks, replacements included.
        """
        seed = self._config.run.seed
        return self._sample(
            prompts,
            self._config.rollout.samples_per_prompt,
            lambda place, sample: sample_seed(seed, step, first_place + place, sample),
            self._config.rollout.sampling,
            arrived,
            phase=f"generate (step {step})",
            while_waiting=while_waiting,
        )

    def answer_benchmark(self, name: str, problems: list[Prompt], arrived: Arrived = lambda _: None) -> list[Sample]:
        """The responses of an evaluation, grouped by problem: `evaluation.samples(name)` to each.

        Their seeds are functions of evaluation.seed, benchmark, problem and sample, whatever was generated before.
        `arrived` as in `generate`.
        """
        evaluation = self._config.evaluation
        return self._sample(
            problems,
            evaluation.samples(name),
            lambda place, sample: sample_seed("evaluation", evaluation.seed, name, problems[place].index, sample),
            self._config.evaluation_sampling,
            arrived,
            phase=f"evaluate ({name})",
        )

    def _sample(
        self,
        prompts: list[Prompt],
        count: int,
        seed_of: Callable[[int, int], int],
        sampling: Sampling,
        arrived: Arrived,
        *,
        phase: str,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> list[Sample]:
        """`count` responses to each prompt; whole groups are dealt to the engines in turn.

        `seed_of` is a function of the position in `prompts` and the number of the sample.
        What a lost engine had is asked of its successor, all of it: in another batch the last bits of log-probs could
        differ. What had come from the lost one already is the same and comes no second time.
        """
        requests: dict[str, list[GenerationRequest]] = {}
        positions: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            name = self._name(i % len(self._actors))
            requests.setdefault(name, []).extend(
                GenerationRequest(prompt, sample, seed_of(i, sample)) for sample in range(count)
            )
            positions.setdefault(name, []).extend(range(i * count, (i + 1) * count))
        samples: dict[int, Sample] = {}

        def take(name: str, answers: list[tuple[int, Sample]]) -> None:
            placed = [(positions[name][number], sample) for number, sample in answers]
            new = [(position, sample) for position, sample in placed if position not in samples]
            for position, sample in new:
                # Not the copy that went to the engine and back.
                sample.prompt = prompts[position // count]
            samples.update(new)
            arrived(new)

        while requests:
            self.before_rollout()
            require_raylet(phase)
            calls = {self._name(engine): actor.generate for engine, actor in enumerate(self._actors)}
            lost = receive_streams(
                {name: calls[name].remote(asked, sampling) for name, asked in requests.items()},
                take,
                phase=phase,
                timeout_s=self._config.cluster.generate_timeout_s,
                while_waiting=while_waiting,
            )
            if lost:
                self.replace(lost)
                self.renew_weights()
            requests = {name: asked for name, asked in requests.items() if name in lost}
        return [samples[position] for position in range(len(prompts) * count)]

    def find_lost(self, error: RunError) -> dict[str, RunError]:
        """Engines whose process is gone, by name, each with `error`, in which their loss showed."""
        pings = {self._name(engine): actor.ping.remote() for engine, actor in enumerate(self._actors)}
        return dict.fromkeys(dead_peers(pings), error)

    def replace(self, lost: dict[str, RunError]) -> None:
        """Start new engines in the places of those named, with the weights of `model.hf_dir`.

        Raises:
            RunError: the first one's, if `cluster.max_engine_restarts` are used up.
        """
        limit = self._config.cluster.max_engine_restarts
        if len(self._losses) + len(lost) > limit:
            raise next(iter(lost.values()))
        if any(isinstance(error, PhaseTimeout) for error in lost.values()):
            stacks = write_stacks(self._config.run.output_dir, self.processes())
            lost = {name: type(error)(f"{error}\n{stacks}") for name, error in lost.items()}
        self._losses += lost.values()
        kill_processes({name: place for name, place in self.processes().items() if name in lost})
        starting = {}
        for engine, actor in enumerate(self._actors):
            if (name := self._name(engine)) in lost:
                ray.kill(actor)
                self._actors[engine] = self._new_actor(engine)
                self._places[name] = self._actors[engine].place.remote()
                starting[name] = self._actors[engine].start.remote()
        self.finish_start(starting)

    def sleep(self) -> None:
        """Let every engine give its device memory back; it keeps its weights in host memory.

        An engine that died holds none; whoever wakes it learns of its death.
        """
        for name, call in {self._name(i): actor.sleep.remote() for i, actor in enumerate(self._actors)}.items():
            with suppress(PeerDied):
                gather({name: call}, phase="engines fall asleep", timeout_s=self._config.cluster.publish_timeout_s)

    def wake(self, parts: list[str]) -> None:
        """Undo `sleep` for `parts`, vLLM's tags; with all of them an engine can generate again."""
        calls = {self._name(engine): actor.wake.remote(parts) for engine, actor in enumerate(self._actors)}
        gather(calls, phase="engines wake up", timeout_s=self._config.cluster.publish_timeout_s)

    def connect(self, senders: list[dict[str, Any]]) -> dict[str, ray.ObjectRef]:
        """Pending calls that join the weight-transfer groups, each engine with its own offset of receiver ranks."""
        width = self._config.rollout.tensor_parallel
        return {
            self._name(engine): actor.connect.remote(senders, 1 + engine * width)
            for engine, actor in enumerate(self._actors)
        }

    def receive(self, plan: Any, version: int) -> dict[str, ray.ObjectRef]:
        """Pending calls that take in the buckets of `plan` as weights `version`."""
        return {self._name(engine): actor.receive.remote(plan, version) for engine, actor in enumerate(self._actors)}

    def weight_pieces(self) -> dict[str, ray.ObjectRef]:
        """Pending calls for the checksums of the weights in every engine."""
        return {self._name(engine): actor.weight_pieces.remote() for engine, actor in enumerate(self._actors)}

    def _new_actor(self, engine: int) -> ray.actor.ActorHandle:
        environment = engine_environment(self._config, self._placement.device)
        options = self._placement.engine_options(engine)
        made: ray.actor.ActorHandle = EngineWorker.options(  # type: ignore[attr-defined]
            **options, runtime_env={"env_vars": environment}
        ).remote(self._config, self._placement.device)
        return made

    @staticmethod
    def _name(engine: int) -> str:
        return f"engine {engine}"


def sample_seed(*names: str | int) -> int:
    """Seed of one response, 31 bits, from what names it; neighbouring names give unrelated seeds."""
    key = "/".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1
