"""Two engines answer some prompts, and again while one of them is killed at the first response. What came is JSON.

python lost_engine_responses.py FOLDER   (with the model in FOLDER/model)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config.run import Config
from megatron_entropic.types import Prompt, Sample


def plain(sample: Sample) -> list[Any]:
    return [sample.prompt.index, sample.sample_index, sample.response_tokens, sample.rollout_logprobs]


def main(folder: Path) -> None:
    config = Config.model_validate(
        {
            "run": {"output_dir": folder / "run"},
            "model": {"hf_dir": folder / "model", "dtype": "float32"},
            "data": {"train_files": [folder / "none"], "max_prompt_tokens": 16},
            "rollout": {"engines": 2, "samples_per_prompt": 4, "max_response_tokens": 600, "kv_cache_gb": 0.1},
            "cluster": {"device": "cpu", "max_engine_restarts": 1},
        }
    )
    prepare_ray_environment(config.cluster)
    from megatron_entropic.cluster.launch import launch_engines

    prompts = [Prompt(index, list(range(5 + index, 15 + index)), "", None) for index in range(7)]
    arrivals: list[list[int]] = []
    partly: list[list[Any]] = []
    with launch_engines(config) as engines:
        whole = engines.generate(prompts, 1)

        def arrived(responses: list[tuple[int, Sample]]) -> None:
            if not arrivals:
                os.kill(engines.processes()["engine 0"].pid, signal.SIGKILL)
            arrivals.append([position for position, _ in responses])
            partly.extend(plain(sample) for _, sample in responses)

        again = engines.generate(prompts, 1, arrived=arrived)
        losses = list(map(str, engines.new_losses()))
    shared = all(sample.prompt is prompts[sample.prompt.index] for sample in again)
    seen = {"whole": list(map(plain, whole)), "again": list(map(plain, again)), "arrivals": arrivals}
    (folder / "seen.json").write_text(json.dumps(seen | {"losses": losses, "partly": partly, "shared": shared}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
