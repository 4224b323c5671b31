"""Two engines answer some prompts, and again while one of them is killed at the first response. What came is JSON.

python lost_engine_responses.py FOLDER   (with the model in FOLDER/model)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config.run import Config
from megatron_entropic.data import load_tokenizer
from megatron_entropic.types import Task, Trajectory


def plain(one: Trajectory) -> list[Any]:
    return [one.task.index, one.sample_index, one.continuation.tolist(), one.rollout_logprobs.tolist()]


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
    from megatron_entropic.cluster.sampling import DealtOut, Sampler

    tasks = [Task(index, np.arange(5 + index, 15 + index, dtype=np.int32), "", None) for index in range(7)]
    positions: list[int] = []
    seen_at_s: list[float] = []
    partly: list[list[Any]] = []
    with launch_engines(config) as cluster:
        sampler = Sampler(config, DealtOut(cluster), load_tokenizer(config.model.hf_dir))
        whole = sampler.generate(tasks, 1)

        def take(position: int, one: Trajectory) -> None:
            if not positions:
                os.kill(cluster.engines.processes()["engine 0"].pid, signal.SIGKILL)
            positions.append(position)
            seen_at_s.append(time.monotonic())
            partly.append(plain(one))

        again = sampler.generate(tasks, 1, take)
        losses = list(map(str, cluster.engines.new_losses()))
    seen = {"whole": list(map(plain, whole)), "again": list(map(plain, again)), "positions": positions}
    (folder / "seen.json").write_text(json.dumps(seen | {"losses": losses, "partly": partly, "seen_at_s": seen_at_s}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
