"""Publishes models under several layouts to receivers in threads of rank 0; prints what arrived, as JSON."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.errors import RunError
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.megatron.parallel import ParallelState, destroy_model_parallel, initialise_model_parallel
from megatron_entropic.policy.megatron.platform import Platform, Rendezvous, select_platform
from megatron_entropic.policy.model.load import load_weights
from megatron_entropic.policy.publish.gather import RankWeights
from megatron_entropic.policy.publish.publisher import Publisher
from megatron_entropic.weight_sync.checksums import checksums
from megatron_entropic.weight_sync.gloo import FlatContents, GlooReceiver, GlooSender, SendingRanks
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan
from megatron_entropic.weight_sync.receiving import Arrivals

BUCKET_BYTES = 200_000
RECEIVERS = 2
CALLS = ("gather", "barrier", "all_gather", "send")


class Counted:
    """Counts this rank's calls of torch.distributed, which still happen."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(CALLS, 0)
        for name in CALLS:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **options)

        return call


class SenderOfEachRank(GlooSender):
    """As senders that reach only the engine on their own device do."""

    sending_ranks: ClassVar[SendingRanks] = "each"


def receive(
    senders: list[dict[str, Any]], plan: PublishPlan, rank: int, receivers_of_each: int = RECEIVERS
) -> list[dict[str, torch.Tensor]]:
    """What arrives in two publications."""
    receivers = [
        GlooReceiver(sender["master_address"], sender["master_port"], rank, receivers_of_each, sender["timeout_s"])
        for sender in senders
    ]
    contents = [
        [FlatContents.of_bucket(bucket) for bucket in plan.buckets if len(senders) == 1 or bucket.owner_stage == stage]
        for stage in range(len(senders))
    ]
    received: list[dict[str, torch.Tensor]] = [{}, {}]
    for tensors in received:
        # Views of buffers that belong to the policy are kept, as an engine keeps those of unfinished layers.
        Arrivals(receivers, contents).deliver(lambda bucket, flat, kept=tensors: kept.update(bucket.split(flat)))
    return received


def differences(hf_dir: Path, received: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing, unknown or not equal to the checkpoint bit for bit."""
    wanted = load_file(hf_dir / "model.safetensors")
    return sorted(
        name
        for name in wanted.keys() | received.keys()
        if name not in wanted or name not in received or not torch.equal(received[name], wanted[name])
    )


def exports(weights: RankWeights, hf_dir: Path) -> dict[str, Any]:
    """Three exports of which two are kept, and one that fails, as rank 0 sees them."""
    from megatron_entropic.policy.state.export import BackgroundExport, Exported

    output = hf_dir.with_name(f"{hf_dir.name}_exports")
    export = BackgroundExport(Exported(weights, hf_dir), keep_last=2)
    for step in (5, 10, 15):
        export.begin(output / f"step_{step:06d}")
    export.check(wait=True)
    found: dict[str, Any] = {}
    if weights.parallel.rank == 0:
        found["kept"] = sorted(path.name for path in output.iterdir())
        found["differences"] = differences(hf_dir, load_file(output / "step_000015" / "model.safetensors"))
    export.begin(hf_dir / "config.json" / "step_000020")
    try:
        export.check(wait=True)
    except RunError as error:
        found["failure"] = str(error)
    export.check(wait=True)
    return found


def collect_senders(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every sending rank told, in the order of stages."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted((sender for sender in everyone if sender), key=lambda sender: sender["stage"])


def publish_from_each_rank(publisher: Publisher, plan: PublishPlan, rank: int, hf_dir: Path) -> dict[str, Any]:
    """Worker i receives from rank i, twice; the last rank has none. Rank 0 has all receivers."""
    workers = dist.get_world_size() - 1
    with ThreadPoolExecutor(workers) as threads:
        senders = collect_senders(publisher.open(workers))
        pending = [threads.submit(receive, [sender], plan, 1, 1) for sender in senders if rank == 0]
        publisher.accept()
        sent = [publisher.publish(with_checksums=True) for _ in range(2)]
        found = [differences(hf_dir, received) for future in pending for received in future.result()]
    publisher.close()
    return {"differences": found, "elements": [part.elements for part in sent], "checksums": len(sent[0].checksums)}


def publish_layout(
    platform: Platform, policy: PolicyConfig, hf_dir: Path, counted: Counted
) -> tuple[ParallelState, dict[str, Any]]:
    from megatron_entropic.policy.model.build import build_model

    parallel = initialise_model_parallel(policy)
    platform.manual_seed(1)
    parameter_map = ParameterMap(read_dimensions(hf_dir))
    model = build_model(parameter_map.dimensions, policy, "float32", parallel, platform)
    load_weights(model, hf_dir, parallel)
    plan = publish_plan(parameter_map, policy, bucket_bytes=BUCKET_BYTES, dtype="float32")
    weights = RankWeights(model, plan, parameter_map, parallel)
    publisher = Publisher(weights, host="127.0.0.1", timeout_s=60)
    found: dict[str, Any] = {"tensors": len(parameter_map.hf_tensors), "buckets": len(plan.buckets)}
    with ThreadPoolExecutor(RECEIVERS) as threads:
        senders = collect_senders(publisher.open(RECEIVERS))
        assert len(senders) == policy.pipeline_parallel
        receiving = parallel.rank == 0
        pending = [threads.submit(receive, senders, plan, 1 + r) for r in range(RECEIVERS) if receiving]
        publisher.accept()
        before = dict(counted.calls)
        published = publisher.publish(with_checksums=True)
        found["calls"] = {name: counted.calls[name] - before[name] for name in CALLS}
        # As if the ranks were on several machines.
        publisher._workspace.shared.clear()
        before = dict(counted.calls)
        publisher.publish()
        found["calls between machines"] = {name: counted.calls[name] - before[name] for name in CALLS}
        found["elements"] = [published.elements, published.sent_elements]
        found["checksums"] = published.checksums == checksums(
            (name, tensor)
            for name, tensor in load_file(hf_dir / "model.safetensors").items()
            if name in published.checksums
        )
        found["differences"] = [differences(hf_dir, received) for future in pending for received in future.result()]
    publisher.close()
    each = Publisher(weights, host="127.0.0.1", timeout_s=60, sender_type=SenderOfEachRank)
    found["each"] = publish_from_each_rank(each, plan, parallel.rank, hf_dir)
    if policy.pipeline_parallel > 1 and policy.tensor_parallel > 1:
        found["exports"] = exports(weights, hf_dir)
    found["all elements"] = sum(bucket.elements for bucket in plan.buckets)
    owned = [bucket for bucket in plan.buckets if bucket.owner_stage == parallel.pipeline_rank]
    found["owned"] = [sum(bucket.of_experts is experts for bucket in owned) for experts in (False, True)]
    destroy_model_parallel()
    return parallel, found


def main(directory: Path) -> None:
    platform = select_platform("cpu")
    platform.init_process_group(Rendezvous.from_environment(), timeout_s=120)
    counted = Counted()
    report = {}
    for family, layouts in json.loads((directory / "cases.json").read_text()).items():
        for name, layout in layouts.items():
            parallel, found = publish_layout(platform, PolicyConfig(**layout), directory / family, counted)
            found["place"] = {
                "data": parallel.data_rank,
                "expert_data": parallel.expert_data_rank,
                "tensor": parallel.tensor_rank,
                "tensor_size": parallel.tensor_size,
                "stage": parallel.pipeline_rank,
            }
            report[f"{family} {name}"] = found
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
