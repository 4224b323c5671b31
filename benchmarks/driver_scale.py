"""What a step costs the driver: its memory, and the seconds of its own work, by part, as the rollout grows.

    python benchmarks/driver_scale.py [--responses 1024 2048 4096] [--tokens N] [--engines N] [--ranks N]
    python benchmarks/driver_scale.py --control 128 1024

The product's own loop, groups, sampler, scorer and journal, and real Ray. Only the actors compute nothing: engines
answer with random tokens, sleeping between two messages, and ranks with random log-probs. Several of them may share a
process (`--processes`), since this is about the other side. Per response and per token figures can be extrapolated to
a size that this machine does not hold where they stay the same from size to size; the table says whether they do.

The driver's seconds are CPU time of its main thread, which is what a step waits for; waits for actors cost none.
Those of `generate` are hidden behind the engines' work, the others are not. Metrics of tokens are computed by threads,
one for each core: "all threads" has them, and Ray's own. Ray's objects are those of all processes of this machine;
in a cluster each node has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console

from benchmarks.machine import cpu_model
from benchmarks.markdown import markdown_table
from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config.load import load_config
from megatron_entropic.config.run import Config
from megatron_entropic.types import Response, Segment, Task

ROOT = Path(__file__).resolve().parents[1]
WORDS = 8192
"""Size of the vocabulary; every word has four characters, about as many as a token of English has."""
PROMPT_TOKENS = 256
GROUP = 16
STEPS = 2
HIDDEN = "generate"
ALL_THREADS = "all threads"
POLL_S = 0.02
LAYER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MODEL = LAYER | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": WORDS,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1 << 20,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def configuration(directory: Path, options: argparse.Namespace, responses: int) -> Config:
    """A run of `responses` responses a step; a file of the model's sizes is written for it."""
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    values = {
        "run.output_dir": directory / "run",
        "model.hf_dir": directory / "model",
        "data.max_prompt_tokens": PROMPT_TOKENS,
        "reward.verifier": "exact",
        "rollout.engines": options.engines,
        "rollout.prompts_per_step": max(1, responses // GROUP),
        "rollout.samples_per_prompt": GROUP,
        "rollout.max_response_tokens": 2 * options.tokens,
        "rollout.max_concurrent_sequences": 256,
        "rollout.kv_cache_gb": 1024,
        "algorithm.optimizer_steps_per_rollout": options.optimizer_steps,
        "policy.tensor_parallel": 1,
        "policy.sequence_parallel": False,
        "policy.data_parallel": options.ranks,
        "policy.tokens_per_microbatch": PROMPT_TOKENS + 2 * options.tokens,
        "warm_start.steps": 0,
        "train.steps": STEPS,
        "checkpoint.every_steps": 0,
        "checkpoint.export_hf": False,
        "logging.wandb": "off",
        "logging.rollouts_every_steps": STEPS if options.record else 0,
        "cluster.generate_timeout_s": 3600,
        "cluster.score_timeout_s": 3600,
        "cluster.update_timeout_s": 3600,
        "cluster.startup_timeout_s": 1200,
    }
    return load_config(ROOT / "examples/countdown_cpu.yaml", [f"{key}={value}" for key, value in values.items()])


# What stands in for engines and ranks: real processes of Ray's, of which one may play several parts.


class Actor:
    """Process that answers for engines and ranks without computing anything."""

    def __init__(self, tokens: int, message: int, pause_s: float) -> None:
        self._tokens, self._message, self._pause_s = tokens, message, pause_s

    def place(self) -> Any:
        """Node and id of this process."""
        from megatron_entropic.cluster.processes import this_process

        return this_process()

    def generate(self, requests: list[Any], _sampling: Any) -> Iterator[list[tuple[int, Response]]]:
        """Yields responses of random tokens, half to twice the mean length, a few in each message."""
        for first in range(0, len(requests), self._message):
            found = []
            for position, request in enumerate(requests[first : first + self._message], first):
                rng = np.random.default_rng(request.seed)
                size = int(self._tokens * rng.uniform(0.5, 1.5))
                tokens = rng.integers(0, WORDS, size, dtype=np.int32)
                found.append((position, Response(Segment(tokens, -rng.random(size, np.float32), 0), "stop")))
            time.sleep(self._pause_s)
            yield found

    def score(self, sequences: list[Any], **_: Any) -> Any:
        """Log-probs and entropies of random values."""
        import torch

        from megatron_entropic.types import Scores

        lengths = [sequence.response_length for sequence in sequences]
        return Scores([-torch.rand(size) for size in lengths], [torch.rand(size) for size in lengths])

    def update(self, sequences: list[Any]) -> dict[str, float]:
        """Metrics of an optimizer step; reads what a loss reads."""
        mean = float(sum(sequence.advantages.sum() for sequence in sequences))
        return {"optimizer/skipped": 0.0, "loss/policy": mean, "entropy/mean": 1.0, "entropy/alpha": 0.0}

    def say(self, answer: Any, *_: Any, **__: Any) -> Any:
        """`answer`, whatever else is said."""
        return answer


class Part:
    """One engine or rank as the groups see it: what `ActorClass.remote` returns."""

    def __init__(self, process: Any, rank: int) -> None:
        from megatron_entropic.policy.publish.publisher import Published

        ping, address = process.say, ("127.0.0.1", 1)
        answers: dict[str, Any] = {
            "rendezvous": address,
            "offload": {},
            "peak_memory_mb": 1.0,
            "publish": Published(1, 1),
            "open_transport": {"stage": 0} if rank == 0 else None,
        }
        self.place, self.generate = process.place, process.generate
        self.start = SimpleNamespace(remote=lambda *_, **__: ping.remote(rank))
        self.rendezvous = SimpleNamespace(remote=lambda: ping.remote(address))
        self.connect = self.receive = self.ping = SimpleNamespace(remote=lambda *_, **__: ping.remote(None))

        def call(method: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
            # By its name: a process that unpickles the function would import megatron-core.
            name = method.__name__
            if name in ("score", "update"):
                return getattr(process, name).remote(*arguments, **settings)
            return ping.remote(answers.get(name), *arguments, **settings)

        self.call = SimpleNamespace(remote=call)


def stand_in(processes: list[Any]) -> Any:
    """Class in the place of `PolicyWorker` or `EngineWorker`, whose instances take the processes in turn."""
    made: list[Part] = []

    def remote(*_: Any) -> Part:
        made.append(Part(processes[len(made) % len(processes)], len(made)))
        return made[-1]

    return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))


class Tasks:
    """Tasks of random prompts, with a tokenizer of four-letter words."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer, decoders, models
        from transformers import PreTrainedTokenizerFast

        words = {f"{number:04x}": number for number in range(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="0000"))
        tokenizer.decoder = decoders.Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)

    def at_step(self, step: int, count: int) -> list[Task]:
        """Tasks of a step."""
        rng = np.random.default_rng(step)
        prompts = rng.integers(0, WORDS, (count, PROMPT_TOKENS), dtype=np.int32)
        return [Task(index, tokens, "x" * 4 * PROMPT_TOKENS, "0000") for index, tokens in enumerate(prompts)]


# Instruments.


class Watch:
    """Highest memory of this process and of Ray's object store, looked at all the time; a context manager."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peak = {"own": 0, "mapped": 0, "store": 0}
        self.before = self._now()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(POLL_S):
            for name, size in self._now().items():
                self.peak[name] = max(self.peak[name], size)

    @staticmethod
    def _now() -> dict[str, int]:
        """Bytes: of the process alone, of shared memory that it has touched, of everything in /dev/shm."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}
        return {"own": sizes["RssAnon"], "mapped": sizes["RssShmem"], "store": shutil.disk_usage("/dev/shm").used}


def measured(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the last of STEPS steps; the first one warms caches and pages."""
    import ray

    from megatron_entropic.cluster import engine_group, launch, policy_group
    from megatron_entropic.rewards import RewardScorer
    from megatron_entropic.training.lifecycle import StopRequest
    from megatron_entropic.training.preconditions import Inputs
    from megatron_entropic.training.run_directory import RunDirectory
    from megatron_entropic.training.trainer import loop

    tasks: Any = Tasks()
    never: Any = SimpleNamespace(due=lambda step: False)
    steps: list[dict[str, float]] = []
    with (
        StopRequest() as stop,
        RunDirectory(config) as run,
        launch.ray_session(config.cluster, local_cpus=options.engines + options.ranks) as device,
    ):
        kind = ray.remote(num_cpus=0, max_concurrency=64)(Actor)
        processes = [kind.remote(options.tokens, options.message, options.pause_s) for _ in range(options.processes)]
        ray.get([process.place.remote() for process in processes])
        engine_group.EngineWorker, policy_group.PolicyWorker = stand_in(processes), stand_in(processes)  # type: ignore[misc]
        began = time.perf_counter()
        placement = launch.reserve(config, device)
        policy = policy_group.PolicyGroup(config, placement)
        engines = engine_group.EngineGroup(config, placement, load_weights=False)
        engines.finish_start(engines.begin_start())
        policy.start()
        started_s = time.perf_counter() - began
        spent = by_phase(run.journal)
        plain = run.journal.record

        def record(step: int, metrics: dict[str, Any]) -> None:
            steps.append(dict(spent, tokens=metrics["response/length_mean"]))
            spent.clear()
            plain(step, metrics)

        run.journal.record = record  # type: ignore[method-assign]
        with (
            RewardScorer(config.reward, max_response_tokens=config.rollout.max_response_tokens) as scorer,
            Watch() as watch,
        ):
            cluster = launch.Cluster(config.cluster, engines, policy)
            loop(0, config, cluster, Inputs(scorer, never, tasks, [], None), run, stop)
    taken = {name: watch.peak[name] - watch.before[name] for name in watch.peak}
    return {"parts": steps[-1], "started_s": started_s, **taken}


def by_phase(journal: Any) -> dict[str, float]:
    """CPU seconds of this thread within each of the journal's phases, and between them ("rest"); filled as it works.

    ALL_THREADS has those of all threads of the process, in all phases but HIDDEN.
    """
    spent: dict[str, float] = {}
    running = ["rest"]
    plain, mark = journal.phase, [time.thread_time(), time.process_time()]

    def account() -> None:
        now = [time.thread_time(), time.process_time()]
        spent[running[-1]] = spent.get(running[-1], 0.0) + now[0] - mark[0]
        if running[-1] != HIDDEN:
            spent[ALL_THREADS] = spent.get(ALL_THREADS, 0.0) + now[1] - mark[1]
        mark[:] = now

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        account()
        running.append(name)
        try:
            with plain(name):
                yield
        finally:
            account()
            running.pop()

    journal.phase = phase
    return spent


def control(count: int) -> list[str]:
    """Seconds of a gather of `count` answers that are there, and of reserving as many places."""
    import ray

    from megatron_entropic.cluster import placement
    from megatron_entropic.cluster.session import ray_session
    from megatron_entropic.cluster.waiting import gather
    from megatron_entropic.config.run import ClusterConfig

    limits = ClusterConfig(device="cpu", startup_timeout_s=600)
    with ray_session(limits, local_cpus=count + 8):
        calls = {f"policy rank {rank}": ray.put(rank) for rank in range(count)}
        began = time.perf_counter()
        gather(calls, phase="gather", timeout_s=600)
        gathered_s = time.perf_counter() - began
        wanted: Any = SimpleNamespace(
            cluster=limits,
            policy=SimpleNamespace(world_size=count),
            rollout=SimpleNamespace(engines=0, tensor_parallel=1),
        )
        began = time.perf_counter()
        placement.reserve(wanted, "cpu")
        return [str(count), f"{gathered_s:.3f}", f"{time.perf_counter() - began:.2f}"]


def row(responses: int, found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    parts = dict(found["parts"])
    tokens, all_threads_s = responses * parts.pop("tokens"), parts.pop(ALL_THREADS)
    critical = sum(seconds for name, seconds in parts.items() if name != HIDDEN)
    shown = {name: parts.get(name, 0.0) for name in ("reward", "score", "update", "publish", "record")}
    shown["rest"] = critical - sum(shown.values())
    return [
        str(responses),
        f"{tokens / 1e6:.1f}",
        f"{found['own'] / tokens:.1f}",
        f"{found['store'] / tokens:.1f}",
        f"{1e9 * parts.get(HIDDEN, 0.0) / tokens:.0f}",
        f"{critical:.2f}",
        f"{1e9 * critical / tokens:.1f}",
        f"{1e9 * all_threads_s / tokens:.1f}",
        *(f"{1e9 * seconds / tokens:.1f}" for seconds in shown.values()),
    ]


HEADER = [
    "responses",
    "tokens, M",
    "own peak, B/token",
    "Ray's objects, B/token",
    "hidden, ns/token",
    "critical, s",
    "ns/token",
    "all threads, ns/token",
    "reward",
    "score",
    "update",
    "publish",
    "record",
    "rest",
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--responses", type=int, nargs="+", default=[1024, 2048, 4096], metavar="N")
    parser.add_argument("--tokens", type=int, default=4096, help="mean tokens of a response")
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=64, help="policy ranks, each a data-parallel replica")
    parser.add_argument("--processes", type=int, default=8, help="processes that play engines and ranks")
    parser.add_argument("--message", type=int, default=4, help="responses of a message")
    parser.add_argument("--pause-s", type=float, default=0.1, help="time that an engine sleeps before each message")
    parser.add_argument("--optimizer-steps", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="keep the rollouts of the measured step")
    parser.add_argument("--control", type=int, nargs="+", metavar="N", help="gather and reserve N places instead")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="me-driver-") as directory:
        if options.one:  # a process of its own, whose memory is of one size
            config = configuration(Path(directory), options, options.one)
            prepare_ray_environment(config.cluster)
            found = control(options.one) if options.control else row(options.one, measured(config, options))
            sys.stdout.write(f"\nROW {json.dumps(found)}\n")
            return 0
    rows = [_in_a_process(size, argv or sys.argv[1:]) for size in options.control or options.responses]
    console = Console(highlight=False)
    header = ["places", "gather of ready answers, s", "reserving, s"] if options.control else HEADER
    console.print(f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores", markup=False)
    console.print(markdown_table(header, rows), soft_wrap=True, markup=False)
    return 0


def _in_a_process(size: int, argv: list[str]) -> list[str]:
    command = [sys.executable, __file__, *argv, "--one", str(size)]
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    line = next(line for line in told.splitlines() if line.startswith("ROW "))
    found: list[str] = json.loads(line[4:])
    return found


if __name__ == "__main__":
    sys.exit(main())
