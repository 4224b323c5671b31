"""The study of worst cases: one setting of each method under all conditions, through the real system.

    python examples/study/regret.py                              everything that is missing, as far as it comes
    python examples/study/regret.py --stage choose               only what settings are chosen by
    python examples/study/regret.py --report-only                tables of what there is

docs/study_plan.md says what is asked and how it is decided; regret.yaml what is run. A call continues where an
earlier one ended; runs that are finished are not repeated. Seeds come one after the other, so that what is interrupted
has whole seeds. A method is reported once all its settings are judged.

    OUTPUT/data/, warm/, runs/, logs/   as tracking.py has them
    OUTPUT/results.parquet              one row for each finished run
    OUTPUT/report/choose.md, report.md  the tables
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pyarrow
from cases import ROOT, CaseRun
from command import add_pool_options, conduct
from pool import Pool
from regret_plan import Plan, StageName, load_plan
from regret_table import PlanWords, regrets, write_page
from rows import Results
from tracking import ControlStudy

from megatron_entropic.files.atomic import write_parquet
from megatron_entropic.reports.run import Run, load_run

HERE = Path(__file__).resolve().parent
BENCHMARK = "heldout"
"""The benchmark that everything is decided by; others of a task are only shown."""
ENDS = 10
"""Number of first and last steps whose mean entropy is kept."""
TABLES = {"pass@1": "pass_1", "pass@8": "pass_n"}
OTHERS = {
    "H of the first steps, nats": "entropy_first",
    "H of the last steps, nats": "entropy_last",
    "Largest H, nats": "entropy_most",
    "Mean alpha": "alpha",
    "Tokens pushed against their advantage": "negative_weight",
}
"""Numbers that are shown beside the scores: title and column."""


class RegretStudy(ControlStudy):
    """One plan in one output folder."""

    def __init__(self, plan: Plan, output: Path, pool: Pool, stages: Sequence[StageName]) -> None:
        super().__init__(plan.cases("choose", plan.choose.seeds[0]), output, pool)
        self.plan = plan
        self._stages = stages

    def run(self) -> dict[str, str]:
        """Everything that is missing; returns the reasons of failures by name."""
        failures: dict[str, str] = {}
        for name in self._stages:
            for seed in self.plan.stage(name).seeds:
                # Decided anew for each seed: a method whose settings are judged meanwhile joins.
                self.cases = self.plan.cases(name, seed, None if name == "choose" else self.choice())
                failures |= self._models_missing()
                failures |= super().run()
        return failures

    def choice(self) -> dict[str, int]:
        """Number of the setting of each method that is decided: the one with the smallest mean regret in pass@1.

        Of equals the first. A method with one setting has nothing to wait for.
        """
        chosen = {method.name: 0 for method in self.plan.methods if len(method.settings) == 1}
        rows = self._rows("choose")
        expected = len(self.plan.choose.seeds) * len(self.plan.choose.conditions)
        found = regrets(_scores(rows, "pass_1", by_setting=True), [f"{c}.0" for c in self.plan.constants])
        if found is None:
            return chosen
        for method in self.plan.methods:
            names = [f"{method.name}.{index}" for index in range(len(method.settings))]
            finished = sum(row["method"] == method.name for row in rows)
            if len(names) > 1 and finished == expected * len(names) and all(name in found.regret for name in names):
                chosen[method.name] = min(range(len(names)), key=lambda index: found.regret[names[index]].mean())
        return chosen

    def results(self) -> Results:
        """One row for each finished run of both stages."""
        return [row for name in get_args(StageName) for row in self._rows(name)]

    def report(self, results: Results) -> Path:
        """All results as one parquet file, and the pages; returns the last page."""
        write_parquet(self.output / "results.parquet", [pyarrow.Table.from_pylist(results)])
        plan = self.plan
        settings = [f"{method.name}.{index}" for method in plan.methods for index in range(len(method.settings))]
        firsts = tuple(f"{constant}.0" for constant in plan.constants)
        report = PlanWords(
            "# Regret to the best constant",
            tuple(plan.constants),
            tuple(plan.primary),
            tuple(plan.worse),
            tuple(plan.paired),
        )
        pages = {
            "choose": (PlanWords("# What settings are chosen by", firsts), settings),
            "report": (report, [method.name for method in plan.methods]),
        }
        for stage, (words, methods) in pages.items():
            own = [row for row in results if row["stage"] == stage]
            shown = TABLES | {
                f"{title}, {name}": f"{column} {name}" for name in self._others for title, column in TABLES.items()
            }
            tables = {title: _scores(own, column, by_setting=stage == "choose") for title, column in shown.items()}
            others = {name: _scores(own, column, by_setting=stage == "choose") for name, column in OTHERS.items()}
            if stage == "report":
                others |= _curves(own)
            page = write_page(self.output / "report" / f"{stage}.md", tables, methods, words, others)
        return page

    def _rows(self, stage: StageName) -> Results:
        """One row for each finished run of a stage, with whatever setting it has."""
        rows: Results = []
        chosen = None if stage == "choose" else self.choice()
        for seed in self.plan.stage(stage).seeds:
            self.cases = self.plan.cases(stage, seed, chosen)
            rows += [{"stage": stage, **self._row(run)} for run in self.cases.runs() if self._finished(run)]
        return rows

    def _row(self, run: CaseRun) -> dict[str, str | int | float]:
        loaded = load_run(self._directory(run))
        condition, _, rest = run.case.name.partition(".")
        method, _, setting = rest.rpartition(".")
        entropies = loaded.finite("entropy/rollout")
        against = loaded.finite("entropy/negative_weight_fraction")
        others = {
            f"{column} {name}": (loaded.finite(f"evaluation/{name}/{kind}") or [math.nan])[-1]
            for name in self._others
            for column, kind in (("pass_1", "avg"), ("pass_n", "pass"))
        }
        return {
            "condition": condition,
            "method": method,
            "setting": int(setting),
            "seed": run.seed,
            "curve": json.dumps(_evaluated(loaded)),
            "pass_1": loaded.finite(f"evaluation/{BENCHMARK}/avg")[-1],
            "pass_n": loaded.finite(f"evaluation/{BENCHMARK}/pass")[-1],
            "entropy_first": fmean(entropies[:ENDS]),
            "entropy_last": fmean(entropies[-ENDS:]),
            "entropy_most": max(entropies),
            "alpha": fmean(loaded.finite("entropy/alpha") or [math.nan]),
            "negative_weight": fmean(against) if against else 0.0,
            "seconds": sum(loaded.finite("time/step_s")),
            **others,
        }

    @property
    def _others(self) -> list[str]:
        """Names of the benchmarks that nothing is decided by."""
        names = (name for task in self.plan.tasks.values() for name in task.benchmarks if name != BENCHMARK)
        return list(dict.fromkeys(names))

    def _models_missing(self) -> dict[str, str]:
        given = {task.model_dir for task in self.cases.tasks.values() if task.model_dir is not None}
        return {
            directory: f"{ROOT / directory} is missing: bash tools/smollm2.sh {directory}"
            for directory in given
            if not (ROOT / directory).is_dir()
        }


def _evaluated(run: Run) -> dict[int, float]:
    """pass@1 by step."""
    series = zip(run.steps, run.series(f"evaluation/{BENCHMARK}/avg"), strict=True)
    return {step: value for step, value in series if math.isfinite(value)}


def _curves(rows: Results) -> dict[str, Mapping[str, Mapping[str, Mapping[int, float]]]]:
    """pass@1 over the steps of conditions that are evaluated several times, a table each, with steps as columns."""
    found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for row in rows:
        curve = json.loads(row["curve"])
        if len(curve) > 1:
            table = found.setdefault(f"pass@1 by step, {row['condition']}", {})
            for step, value in curve.items():
                table.setdefault(step, {}).setdefault(row["method"], {})[row["seed"]] = value
    return dict(found)


def _scores(rows: Results, column: str, *, by_setting: bool) -> Mapping[str, Mapping[str, Mapping[int, float]]]:
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        method = f"{row['method']}.{row['setting']}" if by_setting else row["method"]
        if math.isfinite(row[column]):  # a task need not have every benchmark
            found[row["condition"]][method][row["seed"]] = row[column]
    return found


def main() -> int:
    """Command line: 0 if everything is there, 1 if something failed, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(
        description="Run the study of worst cases and write its tables; repeat to continue."
    )
    parser.add_argument("plan", nargs="?", type=Path, default=HERE / "regret.yaml", metavar="PLAN.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/regret"))
    parser.add_argument("--stage", choices=get_args(StageName), help="only this stage (default: both)")
    add_pool_options(parser)
    options = parser.parse_args()
    try:
        plan = load_plan(options.plan)
    except ValueError as error:
        parser.error(str(error))
    stages = [options.stage] if options.stage else list(get_args(StageName))
    return conduct(options, lambda pool: RegretStudy(plan, options.output.absolute(), pool, stages))


if __name__ == "__main__":
    sys.exit(main())
