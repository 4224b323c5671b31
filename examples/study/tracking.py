"""Studies of control through the real system: does entropy go where it is asked to, and what does that depend on?

    python examples/study/tracking.py                                     targets, offset, disturbances, tuning
    python examples/study/tracking.py examples/study/sensitivity.yaml     tau, denominator, feedback
    python examples/study/tracking.py examples/study/lag.yaml             rollouts that run ahead
    python examples/study/tracking.py --report-only                       tables and figures of what there is

A call continues where an earlier one ended, as run.py's does; what the runs are stands in the YAML file, see cases.py.

    OUTPUT/data/            problems and random model of each task and seed
    OUTPUT/warm/            the models after their supervised steps
    OUTPUT/runs/            one run directory for each run
    OUTPUT/logs/            what each process printed
    OUTPUT/results.parquet  one row for each step of each finished run
    OUTPUT/report/          report.md and its figures
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "countdown"))

import arithmetic
import chain
import prepare as countdown
from cases import ROOT, CaseRun, Cases, Leg, load_cases
from character_task import write_model
from command import add_pool_options, conduct
from grid import Overrides, arguments
from pool import Failure, Pool, Work
from rows import Results
from tracking_report import write_tracking_report
from tracking_results import TUNED, read_results, write_results

from megatron_entropic.commands.tune import tune_run
from megatron_entropic.reports.run import load_run

HERE = Path(__file__).resolve().parent
FINISHED = "finished"
"""File in the directory of a run that came to its end."""
END_STEPS = 5
"""Steps whose mean is the entropy at the end of a leg, of which a tuned leg's target is a multiple."""


def prepare_arithmetic(output: Path, seed: int) -> bool:
    """Problems of two skills for a pretrained model, behind one solved example; False if they are there."""
    if (output / "few_shot" / "solutions.parquet").is_file():
        return False
    arithmetic.prepare(output, seed, levels=(1, 2, 3), sizes=arithmetic.Sizes(shots=1))
    return True


TASKS: dict[str, Callable[[Path, int], bool]] = {
    "countdown": countdown.prepare,
    "chain": chain.prepare,
    "arithmetic": prepare_arithmetic,
}
VOCABULARIES = {"countdown": (countdown.VOCABULARY, countdown.MODEL), "chain": (chain.VOCABULARY, chain.MODEL)}


class ControlStudy:
    """The runs of one YAML file in one output folder."""

    def __init__(self, cases: Cases, output: Path, pool: Pool) -> None:
        self.cases = cases
        self.output = output
        self._pool = pool

    def run(self) -> dict[str, str]:
        """Everything that is missing; returns the reasons of failures by name.

        What goes on from a run waits for it, and is not tried where that failed.
        """
        runs = list(self.cases.runs())
        missing = [run for run in runs if not self._finished(run)]
        starts = sorted({(run.case.task, run.seed) for run in missing})
        for task, seed in starts:
            self._prepare(task, seed)
        failures = self._pool.do_all(
            Work(f"warm start of {task}, seed {seed}", partial(self._warm_start, task, seed))
            for task, seed in starts
            if not self._warm_model(task, seed).is_dir()
        )
        while ready := [run for run in missing if self._can_start(run)]:
            failures |= self._pool.do_all(Work(run.name, partial(self._run, run)) for run in ready)
            missing = [run for run in missing if run not in ready]
        return failures

    def results(self) -> Results:
        """What the finished runs say."""
        return read_results((run, self._directory(run)) for run in self.cases.runs() if self._finished(run))

    def report(self, results: Results) -> Path:
        """All results as one parquet file, and the page; returns the page."""
        write_results(self.output / "results.parquet", results)
        return write_tracking_report(results, self.output / "report")

    def _finished(self, run: CaseRun) -> bool:
        return (self._directory(run) / FINISHED).exists()

    def _can_start(self, run: CaseRun) -> bool:
        return self._warm_model(run.case.task, run.seed).is_dir() and (run.before is None or self._finished(run.before))

    def _directory(self, run: CaseRun) -> Path:
        return self.output / "runs" / self.cases.directory(run)

    def _data(self, task: str, seed: int) -> Path:
        return self.output / "data" / f"{task}-seed{seed}"

    def _phase_directory(self, task: str, seed: int, number: int) -> Path:
        return self.output / "warm" / f"{task}-seed{seed}-{self.cases.origin(task)}" / f"phase{number}"

    def _warm_model(self, task: str, seed: int) -> Path:
        phases, given = len(self.cases.tasks[task].warm_start), self.cases.tasks[task].model_dir
        return self._phase_directory(task, seed, phases) / "hf" if given is None else ROOT / given

    def _prepare(self, name: str, seed: int) -> None:
        task = self.cases.tasks[name]
        data = self._data(name, seed)
        written = TASKS[task.generate](data, seed)
        if task.model and (written or not (data / "resized").exists()):
            vocabulary, model = VOCABULARIES[task.generate]
            write_model(data / "model", vocabulary, {**model, **task.model}, seed)
            (data / "resized").touch()

    def _warm_start(self, name: str, seed: int) -> None:
        """The supervised phases of a task, each from the model of the one before."""
        task, model = self.cases.tasks[name], self._data(name, seed) / "model"
        for number, phase in enumerate(task.warm_start, start=1):
            directory = self._phase_directory(name, seed, number)
            if not (directory / "hf").is_dir():
                own = {
                    "run.name": f"warm start of {name}",
                    "warm_start.file": self._data(name, seed) / f"{phase.file}.parquet",
                    "train.steps": 0,
                    "checkpoint.asynchronous": False,
                    **phase.overrides,
                }
                files = self._files(name, seed, model, directory)
                log = self.output / "logs" / f"warm-{name}-seed{seed}-phase{number}.log"
                self._pool.train(ROOT / task.config, arguments({**task.common, **files, **own}), log)
            model = directory / "hf"

    def _run(self, run: CaseRun) -> None:
        directory = self._directory(run)
        if run.before is not None and not directory.exists():
            self._copy(self._directory(run.before), directory)
        for number, leg in enumerate(run.case.legs, start=1):
            done = directory / f"leg{number}.done"
            if not done.exists():
                self._run_leg(run, number, leg, directory)
                done.touch()
        (directory / FINISHED).touch()

    def _run_leg(self, run: CaseRun, number: int, leg: Leg, directory: Path) -> None:
        settings = {**run.settings[number - 1], **self._tuned(run, number, leg, directory)}
        own = {
            "run.name": run.name,
            "train.steps": run.steps[number - 1],
            "warm_start.steps": 0,
            "checkpoint.export_hf": False,
        }
        files = self._files(run.case.task, run.seed, self._warm_model(run.case.task, run.seed), directory)
        files["data.train_files"] = self._data(run.case.task, run.seed) / f"{leg.train_file}.parquet"
        log = self.output / "logs" / f"{run.name}-leg{number}.log"
        config = ROOT / self.cases.tasks[run.case.task].config
        self._pool.train(config, arguments({**settings, **files, **own}), log)

    def _tuned(self, run: CaseRun, number: int, leg: Leg, directory: Path) -> Overrides:
        """The overrides that `tune` proposes, kept for the case that the leg is interrupted."""
        if leg.tune is None:
            return {}
        kept = directory / TUNED.format(leg=number)
        if not kept.exists():
            entropies = load_run(directory).finite("entropy/mean")[-END_STEPS:]
            target = round(leg.tune.target_factor * fmean(entropies), 3)
            try:
                tuned = tune_run(directory, leg.tune.settling_steps, target, leg.tune.last)
            except ValueError as error:
                raise Failure(str(error)) from error
            record = {"overrides": tuned.overrides, "plant": asdict(tuned.plant), "proposal": asdict(tuned.proposal)}
            kept.write_text(json.dumps({"asked_steps": leg.tune.settling_steps, **record}), encoding="utf-8")
        overrides: Overrides = json.loads(kept.read_text(encoding="utf-8"))["overrides"]
        return overrides

    def _copy(self, before: Path, directory: Path) -> None:
        """What a run has to go on from, in place at once or not at all."""
        partial_copy = directory.with_name(f"{directory.name}.partial")
        shutil.rmtree(partial_copy, ignore_errors=True)
        shutil.copytree(before, partial_copy, ignore=shutil.ignore_patterns("*.done", FINISHED, TUNED.format(leg="*")))
        partial_copy.rename(directory)

    def _files(self, task: str, seed: int, model: Path, directory: Path) -> Overrides:
        data = self._data(task, seed)
        files: Overrides = {
            "run.seed": seed,
            "run.output_dir": directory,
            "model.hf_dir": model,
            "data.train_files": data / "train.parquet",
        }
        if benchmarks := self.cases.tasks[task].benchmarks:
            files["evaluation.benchmarks"] = {name: str(data / f"{file}.parquet") for name, file in benchmarks.items()}
        return files


def main() -> int:
    """Command line: 0 if everything is there, 1 if something failed, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(description="Run a study of control and write its report; repeat to continue.")
    parser.add_argument("cases", nargs="?", type=Path, default=HERE / "tracking.yaml", metavar="CASES.yaml")
    parser.add_argument("--output", type=Path, help="(default: runs/ and the name of the YAML file)")
    add_pool_options(parser)
    options = parser.parse_args()
    try:
        cases = load_cases(options.cases)
    except ValueError as error:
        parser.error(str(error))
    output = (options.output or Path("runs") / options.cases.stem).absolute()
    return conduct(options, lambda pool: ControlStudy(cases, output, pool))


if __name__ == "__main__":
    sys.exit(main())
