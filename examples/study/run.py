"""The study: methods x on-policy and off-policy x seeds on the chain task, through the real system.

    python examples/study/run.py                                   the whole grid
    python examples/study/run.py examples/study/small.yaml         two methods, one seed, a few steps
    python examples/study/run.py --report-only                     tables and figures of what there is

A call continues where an earlier one ended: finished runs are not repeated, interrupted ones go on from their last
checkpoint, failed ones are tried again. Failures are listed at the end and do not keep others from running.

    OUTPUT/data/            problems and the random model of each seed
    OUTPUT/warm/            the model of each seed after its warm start, which all its runs start from
    OUTPUT/cells/           one run directory for each cell of the grid
    OUTPUT/logs/            what each process printed
    OUTPUT/results.parquet  one row for each step of each finished cell
    OUTPUT/report/          report.md and its figures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chain import Sizes, prepare
from command import add_pool_options, conduct
from grid import BENCHMARKS, Cell, Grid, Overrides, Phase, Stage, arguments, check_cells, digest, load_grid
from pool import Failure, Pool, Work
from report import write_study_report
from results import chosen_settings, read_results, write_results
from rows import Results

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "chain.yaml"
FINISHED = "finished"
"""File in the directory of a cell whose run came to its end."""


class Study:
    """One grid in one output folder."""

    def __init__(self, grid: Grid, output: Path, pool: Pool) -> None:
        self.grid = grid
        self.output = output
        self._pool = pool
        self._rows = Sizes(**grid.rows.model_dump())
        warm_start = [phase.model_dump() for phase in grid.warm_start]
        self._start = digest([CONFIG.read_text(encoding="utf-8"), grid.rows.model_dump(), warm_start])

    def run(self) -> dict[str, str]:
        """Everything that is missing; returns the reasons of failures by name.

        One regime after the other, search before report, and of those the seeds one after the other: an interrupted
        study has whole tables rather than a part of each. A method is reported when its search is complete.
        """
        failures = self._warm_starts()
        for regime in self.grid.regimes:
            if self.grid.searches:
                failures |= self._run_stage(self.grid.cells("search"), regime)
            failures |= self._run_stage(self.grid.cells("report", self.choice()), regime)
        return failures

    def choice(self) -> dict[tuple[str, str], int]:
        """(regime, method): the setting to report, as far as it is decided."""
        if self.grid.searches:
            runs_per_method = len(self.grid.search_seeds) * len(self.grid.methods[0].settings)
            return chosen_settings(self._finished(self.grid.cells("search")), runs_per_method)
        return {(regime, method.name): 0 for regime in self.grid.regimes for method in self.grid.methods}

    def results(self) -> Results:
        """What the finished runs say."""
        search = self._finished(self.grid.cells("search")) if self.grid.searches else []
        return search + self._finished(self.grid.cells("report", self.choice()))

    def report(self, results: Results) -> Path:
        """All results as one parquet file, and the page; returns the page."""
        write_results(self.output / "results.parquet", results)
        return write_study_report(results, self.grid, self.output / "report")

    def _finished(self, cells: Iterator[Cell]) -> Results:
        places = ((cell, self._directory(cell)) for cell in cells)
        return read_results((cell, path) for cell, path in places if (path / FINISHED).exists())

    def _warm_starts(self) -> dict[str, str]:
        """The models that runs start from, as far as they are missing."""
        seeds = [*(self.grid.search_seeds if self.grid.searches else []), *self.grid.report_seeds]
        for seed in seeds:
            prepare(self._data(seed), seed, self._rows)
        return self._pool.do_all(
            Work(f"warm start of seed {seed}", partial(self._warm_start, seed))
            for seed in seeds
            if not self._warm_model(seed).is_dir()
        )

    def _run_stage(self, cells: Iterator[Cell], regime: str) -> dict[str, str]:
        """Runs that are missing; those without a warm start are not tried."""
        own = (cell for cell in cells if cell.regime == regime and self._warm_model(cell.seed).is_dir())
        missing = [cell for cell in own if not (self._directory(cell) / FINISHED).exists()]
        return self._pool.do_all(Work(cell.name, partial(self._run_cell, cell)) for cell in missing)

    def _directory(self, cell: Cell) -> Path:
        return self.output / "cells" / cell.directory(self._start)

    def _phase_directory(self, seed: int, number: int) -> Path:
        return self.output / "warm" / f"seed{seed}-{self._start}" / f"phase{number}"

    def _warm_model(self, seed: int) -> Path:
        return self._phase_directory(seed, len(self.grid.warm_start)) / "hf"

    def _data(self, seed: int) -> Path:
        return self.output / "data" / f"seed{seed}"

    def _warm_start(self, seed: int) -> None:
        """The supervised phases of a seed, each from the model of the one before."""
        model = self._data(seed) / "model"
        for number, phase in enumerate(self.grid.warm_start, start=1):
            directory = self._phase_directory(seed, number)
            if not (directory / "hf").is_dir():
                log = self.output / "logs" / f"warm-seed{seed}-phase{number}.log"
                files = self._files(seed, "search", model, directory)
                self._pool.train(CONFIG, arguments(files | self._supervised(seed, phase)), log)
            model = directory / "hf"

    def _run_cell(self, cell: Cell) -> None:
        directory = self._directory(cell)
        files = self._files(cell.seed, cell.stage, self._warm_model(cell.seed), directory)
        own = {"run.name": cell.name, "checkpoint.export_hf": False, **cell.overrides}
        self._pool.train(CONFIG, arguments(files | own), self.output / "logs" / f"{cell.name}.log")
        if not (directory / "metrics.jsonl").is_file():
            raise Failure(f"{directory}: the run ended without metrics.jsonl")
        (directory / FINISHED).touch()

    def _files(self, seed: int, stage: Stage, model: Path, directory: Path) -> Overrides:
        name = BENCHMARKS[stage]
        return {
            "run.seed": seed,
            "run.output_dir": directory,
            "model.hf_dir": model,
            "data.train_files": self._data(seed) / "train.parquet",
            "evaluation.benchmarks": {name: str(self._data(seed) / f"{name}.parquet")},
        }

    def _supervised(self, seed: int, phase: Phase) -> Overrides:
        settings = {f"warm_start.{key}": value for key, value in phase.model_dump(exclude={"file"}).items()}
        return {
            "run.name": f"warm start of seed {seed}",
            "warm_start.file": self._data(seed) / f"{phase.file}.parquet",
            "train.steps": 0,
            "checkpoint.asynchronous": False,
            **settings,
        }


def main() -> int:
    """Command line: 0 if everything is there, 1 if something failed, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(description="Run the study and write its report; repeat the call to continue.")
    parser.add_argument("grid", nargs="?", type=Path, default=HERE / "grid.yaml", metavar="GRID.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    add_pool_options(parser)
    options = parser.parse_args()
    try:
        grid = load_grid(options.grid)
        check_cells(grid, CONFIG)
    except ValueError as error:
        parser.error(str(error))
    return conduct(options, lambda pool: Study(grid, options.output.absolute(), pool))


if __name__ == "__main__":
    sys.exit(main())
