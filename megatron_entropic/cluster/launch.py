"""Bring a whole run up, and down again whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.cluster.placement import reserve
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.processes import kill_processes, write_stacks
from megatron_entropic.cluster.session import ray_session
from megatron_entropic.config.run import Config
from megatron_entropic.errors import PhaseTimeout

Announce = Callable[[str], None]
"""Is told what is being done, at its beginning."""


def _announce_nothing(name: str) -> None: ...


@contextmanager
def launch_engines(config: Config, announce: Announce = _announce_nothing) -> Iterator[EngineGroup]:
    """Ray and the engines alone, with the weights of `model.hf_dir`; for evaluation.

    Raises:
        RunError: something could not start; everything that did is gone again.
    """
    announce(_ray_phase(config))
    with ray_session(config.cluster, local_cpus=config.rollout.engines) as device:
        placement = reserve(config, device, policy_ranks=0)
        try:
            announce(_engines_phase(config))
            engines = EngineGroup(config, placement)
            engines.finish_start(engines.begin_start())
            yield engines
        finally:
            placement.release()


@contextmanager
def launch(config: Config, announce: Announce = _announce_nothing) -> Iterator[tuple[PolicyGroup, EngineGroup]]:
    """Ray, the reservation, policy ranks and engines, all ready to work.

    Raises:
        RunError: something could not start; everything that did is gone again.
    """
    ranks = config.policy.world_size
    actors = 2 * ranks if config.cluster.colocate else ranks + config.rollout.engines
    announce(_ray_phase(config))
    with ray_session(config.cluster, local_cpus=actors) as device:
        placement = reserve(config, device)
        try:
            policy, engines = PolicyGroup(config, placement), EngineGroup(config, placement)
            with stacks_on_timeout(config.run.output_dir, policy, engines):
                loading = engines.begin_start()
                if config.cluster.colocate:
                    # vLLM wants to find the GPU free.
                    announce(_engines_phase(config))
                    engines.finish_start(loading)
                    engines.sleep()
                    announce(_policy_phase(config))
                    policy.start()
                else:
                    announce(f"{_policy_phase(config)}, engines beside it")
                    policy.start()
                    announce(_engines_phase(config))
                    engines.finish_start(loading)
                DeviceTurns(policy, engines, colocated=config.cluster.colocate)
                yield policy, engines
        finally:
            placement.release()


def _ray_phase(config: Config) -> str:
    address = config.cluster.address
    return "starting Ray" if address == "local" else f"joining Ray at cluster.address={address}"


def _policy_phase(config: Config) -> str:
    return f"loading the policy (ranks: {config.policy.world_size})"


def _engines_phase(config: Config) -> str:
    return f"loading the engines ({config.rollout.engines})"


@contextmanager
def stacks_on_timeout(run_dir: Path, policy: PolicyGroup, engines: EngineGroup) -> Iterator[None]:
    """When the block ends because something did not answer in time: let every process say what it is doing, and end it.

    Raises:
        PhaseTimeout: the block's, with the names of the files below run_dir/stacks.
    """
    try:
        yield
    except PhaseTimeout as error:
        processes = policy.processes() | engines.processes()
        stacks = write_stacks(run_dir, processes)
        kill_processes(processes)  # one that hangs does not end because Ray asks it to
        raise PhaseTimeout(f"{error}\n{stacks}") from error


# Who has the devices: the policy or the engines.
#
#   |           policy                                   engines, where cluster.colocate puts both on the same devices
#   | rollout   what policy.offload names is offloaded   awake
#   | training  whole                                    asleep: weights in host memory, no KV cache
#   | publish   parameters only                          weights awake, still no KV cache
#
# Whoever starts to work takes the turn first, so the loop does not know of it. Each step is complete before the next
# one begins: what one side frees is there when the other asks for it.

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""What vLLM wakes apart from each other."""


class DeviceTurns:
    """Gives the turns. Begins with the policy's, engines that share its devices being asleep."""

    def __init__(self, policy: PolicyGroup, engines: EngineGroup, *, colocated: bool) -> None:
        self._policy = policy
        self._engines = engines
        self._colocated = colocated
        self._turn: Literal["rollout", "training", "publish"] = "training"
        policy.before_training = self.to_training
        policy.before_publishing = self.to_publish
        engines.before_rollout = self.to_rollout

    def to_rollout(self) -> None:
        """The engines generate next."""
        if self._turn == "rollout":
            return
        self._policy.offload()
        if self._colocated:
            self._engines.wake([KV_CACHE] if self._turn == "publish" else [WEIGHTS, KV_CACHE])
        self._turn = "rollout"

    def to_training(self) -> None:
        """The policy scores, updates, saves or exports next; it fetches what it needs by itself."""
        if self._turn == "training":
            return
        if self._colocated:
            # vLLM falls asleep from being awake, not from half of it.
            self.to_rollout()
            self._engines.sleep()
        self._turn = "training"

    def to_publish(self) -> None:
        """Both hold weights next."""
        if self._turn == "publish":
            return
        if self._colocated:
            self.to_training()
            self._policy.offload(keep_parameters=True)
            self._engines.wake([WEIGHTS])
        self._turn = "publish"
