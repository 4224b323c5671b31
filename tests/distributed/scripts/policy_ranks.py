"""What rank scripts share: policies of several layouts, one after the other, in the same processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.config.run import Config
from megatron_entropic.policy.batch.balance import data_parallel_shards
from megatron_entropic.policy.local_ranks import held_port
from megatron_entropic.policy.megatron.platform import Rendezvous
from megatron_entropic.policy.model.adapters import fill_adapters
from megatron_entropic.policy.model.load import load_weights, named_entries
from megatron_entropic.policy.model.outputs import OutputOptions
from megatron_entropic.policy.policy import Policy
from megatron_entropic.policy.publish.gather import gather_hf_tensors, sends_weights
from megatron_entropic.policy.step.control import build_control
from megatron_entropic.policy.step.loss_fields import LossSettings
from megatron_entropic.policy.step.update import PolicyUpdate
from megatron_entropic.types import Sequence

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def configuration(hf_dir: Path, **sections: dict[str, Any]) -> Config:
    """A configuration, of float32 unless told; data parallelism fills up the ranks that the layout leaves over."""
    layout = {"distributed_timeout_s": 120, **sections.pop("policy", {})}
    model_ranks = prod(layout.get(f"{kind}_parallel", 1) for kind in ("tensor", "pipeline", "context"))
    layout["data_parallel"] = WORLD_SIZE // model_ranks
    model = {"hf_dir": hf_dir, "dtype": "float32", **sections.pop("model", {})}
    return Config(model=model, data={"train_files": ["unused"]}, policy=layout, **sections)


def start_over(policy: Policy, config: Config) -> None:
    """What `Policy(config)` would be, without building groups and model again; the layout stays as it is."""
    policy.config = config
    load_weights(policy.model, config.model.hf_dir, policy.parallel)
    if config.policy.lora.enabled:
        fill_adapters(policy.model, policy.parameter_map, config.policy.lora, policy.parallel, config.run.seed)
    policy._control = build_control(config, policy.parallel, policy.platform.device)
    settings = LossSettings.from_config(config)
    options = OutputOptions(config.rollout.temperature, head=config.output_head)
    policy._update = PolicyUpdate(policy._machinery, settings, options, policy._control)
    policy.optimizer = policy._build_optimizer()


class ProcessGroups:
    """Ports for one process group after the other: the next is agreed on within the one before."""

    def __init__(self) -> None:
        self._port = int(os.environ["MASTER_PORT"])
        self._held = ExitStack()  # to the end of the process

    @contextmanager
    def policy(self, hf_dir: Path, **sections: dict[str, Any]) -> Iterator[Policy]:
        """A policy of `configuration`, in a process group of its own."""
        policy = Policy(
            configuration(hf_dir, **sections),
            Rendezvous(self._port, os.environ["MASTER_ADDR"], RANK, WORLD_SIZE),
            device="cpu",
        )
        try:
            yield policy
        finally:
            port = [self._held.enter_context(held_port()) if RANK == 0 else 0]
            dist.broadcast_object_list(port, src=0)
            self._port = port[0]
            policy.close()


def sequences_with_advantages(lines: list[tuple[list[int], int]]) -> list[Sequence]:
    """Sequences of (tokens, prompt length) with random advantages."""
    generator = torch.Generator().manual_seed(3)
    return [
        Sequence(torch.tensor(tokens), prompt, advantages=torch.randn(len(tokens) - prompt, generator=generator))
        for tokens, prompt in lines
    ]


def replica_part(policy: Policy, sequences: list[Sequence]) -> list[Sequence]:
    """What this rank's replica gets of a batch."""
    lengths = [sequence.tokens.numel() for sequence in sequences]
    shard = data_parallel_shards(lengths, policy.parallel.data_size)[policy.parallel.data_rank]
    return [sequences[index] for index in shard]


def hf_parameters(policy: Policy) -> dict[str, torch.Tensor]:
    """All parameters under their Hugging Face names on rank 0; empty elsewhere."""
    policy.synchronize_parameters()
    return _gather(policy, {entry.megatron_name: value.detach() for entry, value in _entries(policy)})


def adapter_parameters(policy: Policy) -> dict[str, torch.Tensor]:
    """All matrices of adapters under peft's names on rank 0; empty elsewhere."""
    policy.synchronize_parameters()
    return _gather_adapters(policy, lambda parameter: parameter.detach())


def adapter_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """All main gradients of adapters, likewise."""
    return _gather_adapters(policy, lambda parameter: parameter.main_grad)


def _gather_adapters(policy: Policy, value_of: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = policy._exported.adapters
    assert weights is not None
    if not sends_weights(policy.parallel):
        return {}
    values = {name: value_of(parameter) for name, parameter in weights.values().items()}
    gathered = gather_hf_tensors(weights.plan, values, weights.parameter_map, policy.parallel, "test")
    return {name: tensor.clone() for name, tensor in gathered}


def hf_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """All main gradients, likewise; only without the distributed optimizer does every replica hold them whole."""
    values = {e.megatron_name: torch.zeros_like(v) if e.buffer else v.main_grad for e, v in _entries(policy)}
    gathered = _gather(policy, values)
    return {name: gradient for name, gradient in gathered.items() if name not in policy.parameter_map.buffers}


def _entries(policy: Policy) -> Iterator[Any]:
    return named_entries(policy.model, policy.parameter_map, policy.parallel)


def _gather(policy: Policy, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not sends_weights(policy.parallel):
        return {}
    gathered = gather_hf_tensors(policy.plan, values, policy.parameter_map, policy.parallel, "test")
    return {name: tensor.clone() for name, tensor in gathered}
