"""Start a whole run, and end it whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.cluster.engine_group import EngineGroup
from megatron_entropic.cluster.placement import reserve
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.processes import kill_processes, write_stacks
from megatron_entropic.cluster.session import ray_session
from megatron_entropic.config.run import Config
from megatron_entropic.errors import PhaseTimeout

Announce = Callable[[str], None]
"""Function that is told what is being done, at its beginning."""


def _announce_nothing(name: str) -> None: ...


@contextmanager
def launch_engines(config: Config, announce: Announce = _announce_nothing) -> Iterator[Cluster]:
    """Start Ray and the engines alone, with the weights of `model.hf_dir`, for evaluation; yields them.

    Raises:
        RunError: something could not start; everything that did is gone again.
    """
    announce(_ray_phase(config.cluster.address))
    with ray_session(config.cluster, local_cpus=config.rollout.engines) as device:
        placement = reserve(config, device, policy_ranks=0)
        try:
            announce(_engines_phase(config.rollout.engines))
            engines = EngineGroup(config, placement, load_weights=config.model.megatron_dir is None)
            engines.finish_start(engines.begin_start())
            yield Cluster(config.cluster, engines)
        finally:
            placement.release()


@contextmanager
def launch(config: Config, announce: Announce = _announce_nothing) -> Iterator[Cluster]:
    """Start Ray, reserve the resources, start policy ranks and engines; yields them, ready for a first publication.

    Engines have no weights before it, and have read none.

    Raises:
        RunError: something could not start; everything that did is gone again.
    """
    ranks, shared = config.policy.world_size, config.cluster.colocate
    actors = ranks + (ranks // config.rollout.tensor_parallel if shared else config.rollout.engines)
    announce(_ray_phase(config.cluster.address))
    with ray_session(config.cluster, local_cpus=actors) as device:
        placement = reserve(config, device)
        try:
            policy = PolicyGroup(config, placement)
            gpus = policy.gpus() if shared and device == "cuda" else ()
            engines = EngineGroup(config, placement, gpus, load_weights=False)
            with stacks_on_timeout(config.run.output_dir, policy, engines):
                loading = engines.begin_start()
                if shared:
                    # vLLM wants to find the GPU free.
                    announce(_engines_phase(config.rollout.engines))
                    engines.finish_start(loading)
                    engines.sleep()
                    announce(_policy_phase(ranks))
                    policy.start()
                else:
                    announce(f"{_policy_phase(ranks)}, engines beside it")
                    policy.start()
                    announce(_engines_phase(config.rollout.engines))
                    engines.finish_start(loading)
                yield Cluster(config.cluster, engines, policy)
        finally:
            placement.release()


def _ray_phase(address: str) -> str:
    return "starting Ray" if address == "local" else f"joining Ray at cluster.address={address}"


def _policy_phase(ranks: int) -> str:
    return f"loading the policy (ranks: {ranks})"


def _engines_phase(engines: int) -> str:
    return f"loading the engines ({engines})"


@contextmanager
def stacks_on_timeout(run_dir: Path, policy: PolicyGroup, engines: EngineGroup) -> Iterator[None]:
    """If a wait in the block passes its limit, write the stacks of every process and end all of them.

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
