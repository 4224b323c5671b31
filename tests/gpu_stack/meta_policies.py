"""Policies of any size, built of Transformer Engine's classes on the meta device under torch's fake process group.

For a process of its own: `install` comes before anything of megatron-core, and holds to the end of the process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import no_driver
import te_bindings
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
MODEL_CONFIGS = ROOT / "megatron_entropic/planning/model_configs"
META = torch.device("meta")


def install() -> None:
    """The bindings that refuse, no driver, fake process groups, models that stay on the meta device."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", CUDA_DEVICE_MAX_CONNECTIONS="1")
    te_bindings.install()
    no_driver.replace_driver(META).__enter__()
    real_new_group = dist.new_group

    def new_group(*arguments: Any, **options: Any) -> Any:
        return real_new_group(*arguments, **{**options, "backend": "fake"})

    dist.new_group = new_group

    from megatron_entropic.policy.model import build as model
    from megatron_entropic.policy.model import transformer_config

    def on_meta(*arguments: Any, **options: Any) -> Any:
        config = transformer_config.build_transformer_config(*arguments, **options)
        config.init_model_with_meta_device = True
        return config

    model.build_transformer_config = on_meta  # type: ignore[attr-defined]


def _platform() -> Any:
    from megatron_entropic.policy.megatron.platform import CudaPlatform

    class CudaOnMeta(CudaPlatform):
        @property
        def device(self) -> torch.device:
            return META

    chosen = CudaOnMeta()
    assert chosen.transformer_engine
    return chosen


def build(example: str, model: str, overrides: list[str], *, last: bool) -> dict[str, Any]:
    """Builds one rank's part of an example's policy and its optimizer; returns what was found, as plain values.

    Args:
        example: file in examples/, without its ending.
        model: file in planning/model_configs, without its ending.
        overrides: of the configuration.
        last: the last rank of all, instead of the first.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_entropic.config.load import load_config
    from megatron_entropic.policy.megatron import parallel

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(MODEL_CONFIGS / f"{model}.json", Path(folder) / "config.json")
        overrides = [f"model.hf_dir={folder}", *overrides]
        config = load_config(ROOT / f"examples/{example}.yaml", overrides)
        world = config.policy.world_size
        dist.init_process_group("fake", store=FakeStore(), rank=world - 1 if last else 0, world_size=world)
        try:
            state = parallel.initialise_model_parallel(config.policy)
            return {"world_size": world, **_build(config, state)}
        finally:
            parallel.destroy_model_parallel()
            dist.destroy_process_group()


def _build(config: Any, state: Any) -> dict[str, Any]:
    from megatron_entropic.models.dimensions import read_dimensions
    from megatron_entropic.policy.model.build import build_model
    from megatron_entropic.policy.model.transformer_config import DTYPES
    from megatron_entropic.policy.step.optimizer import PolicyOptimizer, wrap_data_parallel

    dimensions = read_dimensions(config.model.hf_dir)
    platform = _platform()
    platform.manual_seed(1)
    model = build_model(dimensions, config.policy, config.model.dtype, state, platform)
    found = _compare_with_map(model, dimensions, state)
    wrapped = wrap_data_parallel(
        model,
        distributed_optimizer=config.policy.distributed_optimizer,
        overlap=True,
        gradient_dtype=config.policy.gradient_dtype,
    )
    optimizer = PolicyOptimizer(wrapped, config.optimizer, total_steps=10, dtype=DTYPES[config.model.dtype])
    found["classes"] = {
        type(module).__name__ for module in model.modules() if next(module.parameters(recurse=False), None) is not None
    }
    found["dtypes"] = {str(parameter.dtype) for parameter in model.parameters()}
    found["buckets"] = [len(chunk.bucket_groups) for chunk in wrapped]
    parts = [part.optimizer for part in optimizer._parts()]
    found["optimizers"] = {f"{type(part).__module__}.{type(part).__name__}" for part in parts}
    found["state_bytes"] = sum(tensor.nbytes for tensor in optimizer.state_tensors())
    found["parameter_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    found["saved"] = len(model[0].sharded_state_dict())
    found["colocated"] = config.cluster.colocate
    found["published"] = _publication(model, dimensions, config, state)
    return found | _optimizer_shards(model, optimizer, config.policy)


def _publication(model: Any, dimensions: Any, config: Any, state: Any) -> dict[str, Any]:
    """What this rank sends of a publication, as the transport of GPUs wants it: without values, as everything here."""
    from megatron_entropic.models.parameter_map import ParameterMap
    from megatron_entropic.policy.publish.gather import RankWeights
    from megatron_entropic.policy.publish.publisher import BUCKET_BYTES, Publisher
    from megatron_entropic.weight_sync.plan import publish_plan

    sent: list[tuple[str, ...]] = []

    class Sender:
        """Notes what it is given."""

        sending_ranks = "each" if config.cluster.colocate else "first"
        address = ("10.0.0.1", 1)

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def accept(self) -> None: ...

        def send(self, contents: Any, flat: torch.Tensor) -> int:
            assert (flat.device, flat.dtype, flat.numel()) == (META, contents.torch_dtype, contents.elements)
            sent.append(contents.names)
            return contents.elements

    parameter_map = ParameterMap(dimensions)
    plan = publish_plan(parameter_map, config.policy, bucket_bytes=BUCKET_BYTES["cuda"], dtype=config.model.dtype)
    weights = RankWeights(model, plan, parameter_map, state)
    publisher = Publisher(weights, host="10.0.0.1", timeout_s=60, sender_type=Sender)
    publisher.open(receivers=config.policy.world_size)
    publisher.accept()
    published = publisher.publish()
    return {
        "all": [bucket.hf_names for bucket in plan.buckets] == sent,
        "elements": published.elements,
        "wanted": sum(bucket.elements for bucket in plan.buckets),
        "buffers kept": len(publisher._workspace._buffers),
    }


def _optimizer_shards(model: Any, optimizer: Any, policy: Any) -> dict[str, Any]:
    """What a checkpoint holds of the optimizer in the format that is the default: without values, as everything here.

    The format in which any layout reads it is left out: gathering takes host memory, of a real model more than this
    machine may have.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from megatron_entropic.policy.step.optimizer_shards import can_write_shards, own_shards

    if not policy.distributed_optimizer:
        return {"shards": None}
    parts = optimizer._parts()
    model_state = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(model)}
    state = optimizer.sharded_state_dict(model_state, loading=False, format="dp_reshardable")
    saved = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    buckets = own_shards(parts, model_state)
    pieces = sum(piece.numel for bucket in buckets for piece in bucket.pieces)
    return {
        "shards": {
            "can be written": can_write_shards(parts),
            "bytes": sum(tensor.data.nbytes for tensor in saved),
            "devices": {tensor.data.device.type for tensor in saved},
            "others": {
                type(v).__name__ for v in nested_values(state) if not isinstance(v, ShardedTensor | ShardedObject)
            },
            "elements of own buckets": sum(bucket.numel for bucket in buckets),
            "elements of their pieces": pieces,
            "elements of parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    }


def _compare_with_map(model: Any, dimensions: Any, state: Any) -> dict[str, Any]:
    """Names and shapes of the policy's parameters beside those of the parameter map."""
    from megatron_entropic.models.parameter_map import ParameterMap
    from megatron_entropic.policy.model.load import named_entries

    parameter_map = ParameterMap(dimensions)
    seen: Counter[str] = Counter()
    shapes = []
    for entry, parameter in named_entries(model, parameter_map, state):
        seen[entry.megatron_name] += 1
        wanted = parameter_map.shard_shape(entry, state.tensor_place(of_expert=entry.expert is not None)[1])
        if tuple(parameter.shape) != tuple(wanted):
            shapes.append((entry.megatron_name, tuple(parameter.shape), tuple(wanted)))
    expected = {
        entry.megatron_name
        for entry in parameter_map.entries_of_stage(
            state.pipeline_rank, state.stage_sizes.of_layers(parameter_map.dimensions.num_layers)
        )
        if entry.expert is None or parameter_map.expert_rank(entry, state.expert_size) == state.expert_rank
    }
    return {
        "parameters": sum(seen.values()),
        "missing": sorted(expected - set(seen))[:5],
        "surplus": sorted(set(seen) - expected)[:5],
        "twice": sorted(name for name, count in seen.items() if count > 1)[:5],
        "wrong shapes": shapes[:5],
    }
