"""Two starts of policy and engine; in each a process is killed in the middle of a publication. What was seen is JSON.

python broken_publications.py OUTPUT CONFIG.yaml OVERRIDE [OVERRIDE ...]

A process that is stopped keeps the others in the middle of the publication for as long as it takes to kill one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config.run import Config
from megatron_entropic.data import load_tokenizer
from megatron_entropic.errors import RunError
from megatron_entropic.training.machine import load_checked_config
from megatron_entropic.types import Task


def pid_of(actor: Any) -> int:
    import ray

    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60))


def broken_publication(cluster: Any, version: int, actor: Any, config: Config) -> dict[str, Any]:
    """Publishes while the process of `actor` is stopped and then killed."""
    seen: dict[str, Any] = {}
    pid = pid_of(actor)
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        publishing = threads.submit(cluster.publish, version=version)
        time.sleep(3)
        seen["ended early"] = publishing.done()
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        error = publishing.exception(timeout=config.cluster.publish_timeout_s + 60)
    seen["seconds"] = time.monotonic() - killed
    seen["error"] = f"{type(error).__name__}: {error}"
    return seen


def broken_start(config: Config, victim: str) -> dict[str, Any]:
    """Publishes and generates, then publishes while `victim` (policy or engine) is lost; one engine may be replaced."""
    from megatron_entropic.cluster.launch import launch
    from megatron_entropic.cluster.sampling import DealtOut, Sampler

    tasks = [Task(index, np.array([3, 4, 5], np.int32), "", None) for index in range(2)]
    with launch(config) as cluster:
        sampler = Sampler(config, DealtOut(cluster), load_tokenizer(config.model.hf_dir))
        seen: dict[str, Any] = {"unpublished": _refusal(lambda: sampler.generate(tasks, 1))}
        cluster.publish(version=1)
        seen |= {"versions": [one.weights_version for one in sampler.generate(tasks, 1)]}
        if victim == "engine":
            seen["replaced"] = broken_publication(cluster, 2, cluster.engines._actors["engine 0"], config)
            seen["replaced"]["versions"] = [one.weights_version for one in sampler.generate(tasks, 1)]
        # The second stage's rank: the buckets of the others arrive, its own do not.
        actor = cluster.policy._actors[1] if victim == "policy" else cluster.engines._actors["engine 0"]
        seen |= broken_publication(cluster, 3, actor, config)
        seen["refusal"] = _refusal(lambda: sampler.generate(tasks, 2))
    return seen


def _refusal(action: Callable[[], Any]) -> str:
    """Message with which the run's processes refuse."""
    try:
        action()
    except RunError as refusal:
        return str(refusal)
    return ""


def main(output: Path, config_file: str, *overrides: str) -> None:
    config = load_checked_config(Path(config_file), list(overrides))
    prepare_ray_environment(config.cluster)
    output.write_text(json.dumps({victim: broken_start(config, victim) for victim in ("policy", "engine")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
