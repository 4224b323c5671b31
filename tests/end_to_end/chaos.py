"""One training under random faults: whatever happens to its processes and files, it must come to its last step.

    python tests/end_to_end/chaos.py --faults 20 --seed 1 --output-dir DIR        as root, on Linux

A supervisor stands where Slurm does and starts the run again when it ends with an error. Which faults come, when, and
to whom is a function of the seed; each comes after the run has recovered from the one before. Meanwhile a thread looks
at the checkpoints all the time. In the end the run is compared with one that was never disturbed. The run has a network
of its own, whose link can be cut, and a disk of its own (a small tmpfs), which can be filled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from training_run import ROOT, Run, countdown_settings

from megatron_entropic.checkpoints.run_checkpoints import MANIFEST, CheckpointError, complete_checkpoints, read_state
from megatron_entropic.observability.records import read_rollouts, recorded_steps, rollouts_path

OWN_NETWORK = ("unshare", "--net", "bash", "-c", 'ip link set lo up && exec "$@"', "run")
"""The run's processes alone in a network namespace, whose only link can be cut. Needs root."""
LINK_DOWN_S = 15
DISK_FULL_S = 20
"""Longest time for which nothing can be written; it ends sooner if the run does."""
DISK_MIB = 256
TIMEOUT_S = 30
"""Of every wait between processes of the run."""
STOPPED_S = TIMEOUT_S + 20
LIMIT_S = 400
"""For one recovery."""
SETTINGS = (
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=3",
    "logging.rollouts_every_steps=1",
    "logging.rollouts_keep_last=null",
    "cluster.max_restarts=100",
    "cluster.max_engine_restarts=100",
    f"policy.distributed_timeout_s={TIMEOUT_S}",
    *(f"cluster.{phase}_timeout_s={TIMEOUT_S}" for phase in ("generate", "score", "update", "publish", "checkpoint")),
)


@dataclass
class Chaos:
    """A run, the faults that it still has to bear, and what was seen.

    Attributes:
        run: started and started again until it has ended well.
        faults: names of methods, in order.
        draw: of moments and victims.
    """

    run: Run
    faults: list[str]
    draw: random.Random
    summary: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def go(self) -> None:
        """All faults, then on to the last step."""
        process = self.run.start()
        try:
            with self._watching_checkpoints():
                recovered = 1
                for name in self.faults:
                    process = self._await_step(process, recovered)
                    time.sleep(self.draw.uniform(0, 1))
                    self.summary[name] += 1
                    getattr(self, name)(process)
                    # The step that was all but done may still be written; the next one shows that the run goes on.
                    recovered = self._newest_step() + 2
                process = self._await_end(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._check_samples()
        rows = self._rows("restarts.jsonl")
        self.summary["engines replaced within a step"] = sum(row["restarted"] == "engine" for row in rows)
        self.summary["starts anew by the driver"] = sum(row["restarted"] == "run" for row in rows)
        self.summary["checkpoints set aside"] = len(list((self.run.directory / "checkpoints").glob("*.damaged")))
        self.summary["stack dumps"] = len(list((self.run.directory / "stacks").glob("*")))

    def kill_engine(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL."""
        self._signal(process, "EngineWorker", signal.SIGKILL)

    def kill_policy_rank(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL."""
        self._signal(process, "PolicyWorker", signal.SIGKILL)

    def kill_driver(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL to the driver and everything of its process group."""
        os.killpg(process.pid, signal.SIGKILL)

    def stop_engine(self, process: subprocess.Popen[str]) -> None:
        """SIGSTOP for longer than any limit."""
        self._pause(self._signal(process, "EngineWorker", signal.SIGSTOP))

    def stop_policy_rank(self, process: subprocess.Popen[str]) -> None:
        """SIGSTOP for longer than any limit."""
        self._pause(self._signal(process, "PolicyWorker", signal.SIGSTOP))

    def fill_disk(self, process: subprocess.Popen[str]) -> None:
        """Nothing can be written until the run has ended or DISK_FULL_S; it must have a disk of its own."""
        filler = self.run.directory / "filler"
        try:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
            self._await_exit(process, DISK_FULL_S)
        finally:
            filler.unlink()

    def limit_file_size(self, process: subprocess.Popen[str]) -> None:
        """Policy ranks may write no file of more than 100 kB any more."""
        for victim in self._workers(process, "PolicyWorker"):
            victim.rlimit(psutil.RLIMIT_FSIZE, (100_000, 100_000))

    def spoil_checkpoint(self, process: subprocess.Popen[str]) -> None:
        """The newest checkpoint gets other bytes, and the driver is killed so that it is needed."""
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)  # ranks complete what they are writing, and nobody asks them for more
        complete = complete_checkpoints(self.run.directory / "checkpoints")
        if len(complete) > 1:
            tensors = max(complete[-1].glob("*.distcp"), key=lambda path: path.stat().st_size)
            # In place: a file that is first cut to nothing is damaged in a way that whoever watches reports.
            with tensors.open("r+b") as file:
                file.write(bytes(tensors.stat().st_size))
        self.kill_driver(process)

    def cut_link(self, process: subprocess.Popen[str]) -> None:
        """No packet between any two processes of the run for LINK_DOWN_S; the run must be in OWN_NETWORK."""
        inside = ["nsenter", f"--target={process.pid}", "--net", "ip", "link", "set", "lo"]
        subprocess.run([*inside, "down"], check=True, timeout=30)
        time.sleep(LINK_DOWN_S)
        # Without the run there is no namespace left either.
        subprocess.run([*inside, "up"], check=process.poll() is None, timeout=30)

    def _workers(self, process: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            if found := [child for child in family if kind in _command(child)]:
                return sorted(found, key=lambda child: child.pid)
            time.sleep(0.2)
        return []

    def _signal(self, process: subprocess.Popen[str], kind: str, number: signal.Signals) -> psutil.Process | None:
        workers = self._workers(process, kind)
        victim = self.draw.choice(workers) if workers else None
        if victim is not None:
            victim.send_signal(number)
        return victim

    def _pause(self, victim: psutil.Process | None) -> None:
        def go_on() -> None:
            if victim is not None and victim.is_running():
                victim.send_signal(signal.SIGCONT)

        timer = threading.Timer(STOPPED_S, go_on)
        timer.daemon = True
        timer.start()

    @staticmethod
    def _await_exit(process: subprocess.Popen[str], limit_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=limit_s)

    def _await_step(self, process: subprocess.Popen[str], step: int) -> subprocess.Popen[str]:
        """Until the step is done, or the run; starts again what ended with an error."""
        return self._await(process, lambda: self._newest_step() >= step or process.poll() == 0, f"step {step}")

    def _await_end(self, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        return self._await(process, lambda: False, "the end")

    def _await(self, process: subprocess.Popen[str], reached: Callable[[], bool], what: str) -> subprocess.Popen[str]:
        deadline = time.monotonic() + LIMIT_S
        while not reached() and process.poll() != 0:
            if process.poll() is not None:
                self.summary["starts anew by the supervisor"] += 1
                process = self.run.start()
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} was not reached:\n{self.run.log.read_text(encoding='utf-8')[-6000:]}")
            time.sleep(0.05)
        return process

    def _newest_step(self) -> int:
        rows = self.run.metrics()
        return int(rows[-1]["step"]) if rows else 0

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.run.directory / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @contextmanager
    def _watching_checkpoints(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                self.violations += _half_visible(self.run.directory / "checkpoints")

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _check_samples(self) -> None:
        for step in recorded_steps(self.run.directory):
            responses = read_rollouts(rollouts_path(self.run.directory, step)).responses
            keys = Counter((one.trajectory.task.index, one.trajectory.sample_index) for one in responses)
            self.violations += [f"step {step}: {key} is trained {n} times" for key, n in keys.items() if n > 1]


def _tasks(run: Run) -> dict[int, list[tuple[int, int]]]:
    """Task and number of every attempt that each step was trained on, in order."""
    return {
        step: [(one.trajectory.task.index, one.trajectory.sample_index) for one in read_rollouts(path).responses]
        for step in recorded_steps(run.directory)
        if (path := rollouts_path(run.directory, step))
    }


def _half_visible(root: Path) -> list[str]:
    """Checkpoints that count and are not whole. One that is being deleted loses its manifest first."""
    found = []
    for directory in complete_checkpoints(root):
        try:
            read_state(directory)
        except CheckpointError as error:
            if (directory / MANIFEST).exists():
                found.append(str(error))
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


KINDS = (
    "kill_engine",
    "kill_policy_rank",
    "kill_driver",
    "stop_engine",
    "stop_policy_rank",
    "fill_disk",
    "limit_file_size",
    "spoil_checkpoint",
    "cut_link",
)


@contextmanager
def own_disk(directory: Path) -> Iterator[None]:
    """A new directory on a file system of DISK_MIB, gone in the end. Needs root."""
    directory.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(directory)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, timeout=30)


def random_faults(kinds: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Every kind about as often as any other, in a random order."""
    faults = [kinds[index % len(kinds)] for index in range(count)]
    draw.shuffle(faults)
    return faults


def main() -> int:
    """Runs, prints a summary; returns 1 if something was seen that must not be."""
    parser = argparse.ArgumentParser(description="One training under random faults.")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lag", type=int, default=0, help="rollout.lag of the run; engines are then always at work")
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = options.output_dir.absolute()
    assets = folder / "assets"
    prepare = [sys.executable, str(ROOT / "examples/countdown/prepare.py"), "--output", str(assets)]
    subprocess.run(prepare, check=True, timeout=300)
    # A step takes a second or two, a fault waits for one; what is left over is done in peace.
    settings = [*SETTINGS, f"train.steps={4 * options.faults}"]
    calm = Run(folder / "calm", [*countdown_settings(folder / "calm", assets), *settings])
    calm.finish()
    if options.lag:
        # With longer responses some are in flight whenever a fault comes.
        settings += [f"rollout.lag={options.lag}", "rollout.max_response_tokens=40", "rollout.engines=2"]
    run = Run(folder / "run", [*countdown_settings(folder / "run", assets), *settings], inside=OWN_NETWORK)
    chaos = Chaos(run, random_faults(options.kinds, options.faults, draw), draw)
    with own_disk(run.directory):
        chaos.go()
        if _tasks(run) != _tasks(calm):
            chaos.violations.append("steps were trained on other tasks than those of the undisturbed run")
        # The clock decides which version samples a token, so no two runs with a lag are alike.
        if not options.lag and run.reproducible_metrics() != calm.reproducible_metrics():
            chaos.violations.append("metrics differ from those of the undisturbed run")
        lasted = len(run.metrics())
    console = Console(highlight=False)
    for name, count in chaos.summary.items():
        console.print(f"{count:4d}  {name}")
    console.print(f"{lasted} steps; violations: {chaos.violations or 'none'}", soft_wrap=True)
    (folder / "summary.json").write_text(
        json.dumps({"summary": chaos.summary, "violations": chaos.violations}, indent=1), encoding="utf-8"
    )
    return 1 if chaos.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
