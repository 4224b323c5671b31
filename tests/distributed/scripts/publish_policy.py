"""Two policy ranks (TP=2) that publish twice to an engine in another process: weights `one`, then `two`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.megatron.parallel import initialise_model_parallel
from megatron_entropic.policy.megatron.platform import Rendezvous, select_platform
from megatron_entropic.policy.model.load import load_weights
from megatron_entropic.weight_sync.plan import publish_plan


def main(directory: Path) -> None:
    platform = select_platform("cpu")
    platform.init_process_group(Rendezvous.from_environment(), timeout_s=300)
    from megatron_entropic.policy.model.build import build_model
    from megatron_entropic.policy.publish.gather import RankWeights
    from megatron_entropic.policy.publish.publisher import Publisher

    policy = PolicyConfig(tensor_parallel=2)
    parallel = initialise_model_parallel(policy)
    platform.manual_seed(1)
    parameter_map = ParameterMap(read_dimensions(directory / "one"))
    model = build_model(parameter_map.dimensions, policy, "float32", parallel, platform)
    plan = publish_plan(parameter_map, policy, bucket_bytes=100_000, dtype="float32")
    publisher = Publisher(RankWeights(model, plan, parameter_map, parallel), host="127.0.0.1", timeout_s=240)
    sender = publisher.open(2)
    if sender:
        unfinished = directory / "rendezvous.unfinished"
        unfinished.write_text(json.dumps([sender]))
        unfinished.rename(directory / "rendezvous.json")
    publisher.accept()
    for weights in ("one", "two"):
        load_weights(model, directory / weights, parallel)
        publisher.publish()
    publisher.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
