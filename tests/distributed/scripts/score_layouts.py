"""Scores the same sequences under several layouts and prints their distance from the reference, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.policy.batch.prefix_sharing import shares_prefixes
from megatron_entropic.policy.megatron.parallel import destroy_model_parallel, initialise_model_parallel
from megatron_entropic.policy.megatron.platform import Platform, Rendezvous, select_platform
from megatron_entropic.policy.model.load import load_weights
from megatron_entropic.types import Scores, Sequence


def score_layout(platform: Platform, policy: PolicyConfig, hf_dir: Path, case: dict) -> Scores | None:
    from megatron_entropic.policy.model.build import build_model
    from megatron_entropic.policy.step.score import score_sequences

    dimensions = read_dimensions(hf_dir)
    shared = shares_prefixes(policy, dimensions, on_cpu=platform.takes_prefixes)
    state = initialise_model_parallel(policy, share_prefixes=shared)
    platform.manual_seed(1)
    model = build_model(dimensions, policy, "float32", state, platform)
    load_weights(model, hf_dir, state)
    sequences = [Sequence(torch.tensor(tokens), prompt) for tokens, prompt in case["sequences"]]
    scores = score_sequences(
        model,
        sequences,
        state,
        temperature=case["temperature"],
        tokens_per_microbatch=policy.tokens_per_microbatch,
    )
    assert (scores is not None) == state.is_last_stage
    destroy_model_parallel()
    return scores


def main(directory: Path) -> None:
    platform = select_platform("cpu")
    platform.init_process_group(Rendezvous.from_environment(), timeout_s=120)
    distances = {}
    for family, layouts in json.loads((directory / "cases.json").read_text()).items():
        case = torch.load(directory / f"{family}.pt")
        for name, layout in layouts.items():
            scores = score_layout(platform, PolicyConfig(**layout), directory / family, case)
            if scores is not None:
                found = [torch.cat(scores.logprobs), torch.cat(scores.entropies)]
                wanted = [torch.cat([pair[i] for pair in case["reference"]]) for i in range(2)]
                distances[f"{family} {name}"] = [
                    (float((f - w).abs().max()), int((f != w.float()).sum()), f.numel())
                    for f, w in zip(found, wanted, strict=True)
                ]
    sys.stdout.write(json.dumps(distances))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
