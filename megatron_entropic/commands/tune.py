"""`megatron-entropic tune`: gains proposed from how entropy followed alpha in a run.

train CONFIG entropy_control.controller=probe train.steps=50     a known alpha for a while
tune RUN_DIR --settling-steps 60 --target 0.5                    g, b, gains, and how they follow from each other
train CONFIG train.steps=500 ...                                 with what tune printed; goes on where it was
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from megatron_entropic.algorithms.entropy_control.tuning import Plant, Proposal, identify_plant, propose_gains
from megatron_entropic.commands.options import number, whole
from megatron_entropic.errors import UserError
from megatron_entropic.files.text import printable
from megatron_entropic.reports.run import Run, load_run


@dataclass(frozen=True, slots=True)
class Tuned:
    """Plant that a run's entropy was found to be, and the gains that follow from it."""

    plant: Plant
    """Plant per optimizer step; its noise is that of the measurements that the controller sees."""
    proposal: Proposal
    target: float
    """Entropy target of the gains, in nats."""

    @property
    def overrides(self) -> dict[str, str | float]:
        """Configuration keys with the proposed values."""
        proposal = self.proposal
        numbers = {"kp": proposal.kp, "ki": proposal.ki, "initial_alpha": proposal.initial_alpha, "target": self.target}
        return {
            "entropy_control.controller": "pi",
            **{f"entropy_control.{name}": float(f"{value:.4g}") for name, value in numbers.items()},
        }


def identify_run(run: Run, last: int | None = None) -> tuple[Plant, float]:
    """Identify the plant of a run; also returns the run's last entropy in nats.

    With several optimizer steps a rollout the entropy of the score pass is taken, which is measured before the first of
    them on the whole rollout; a controller that is fed by single mini-batches sees more noise, and gets that number.

    Args:
        run: a run that logged entropy and alpha.
        last: number of last steps to look at; None: all.

    Raises:
        UserError: see `identify_plant`.
    """
    measured = zip(*map(run.series, ("entropy/mean", "entropy/rollout", "entropy/alpha")), strict=True)
    rows = [row for row in measured if math.isfinite(row[0]) and math.isfinite(row[2])]
    rows = rows[-last:] if last else rows
    parts = run.number("algorithm.optimizer_steps_per_rollout", 1)
    name = "entropy/rollout" if rows and all(math.isfinite(rollout) for _, rollout, _ in rows) else "entropy/mean"
    entropies = [rollout if name == "entropy/rollout" else mean for mean, rollout, _ in rows]
    plant = identify_plant(entropies, [alpha for _, _, alpha in rows], _updates(run))
    if name == "entropy/rollout":
        plant = replace(plant, noise=plant.noise * math.sqrt(parts))
    return plant, entropies[-1]


def tune_run(run_dir: Path, settling_steps: float, target: float | None = None, last: int | None = None) -> Tuned:
    """Identify a run's plant and propose gains.

    Args:
        run_dir: directory of a run in which alpha varied.
        settling_steps: rollout steps within which entropy shall settle.
        target: entropy target in nats; None: the run's last.
        last: number of last rollout steps to look at; None: all under the last settings.

    Raises:
        UserError: no target, or see `identify_plant` and `propose_gains`.
    """
    # Before, the settings were others: the plant was another one.
    run = load_run(run_dir).stretches[-1]
    aim = run.target if target is None else target
    if aim is None:
        raise UserError(f"{run_dir}: the run has no target; give one with --target")
    if last is not None and last < 1:
        raise UserError(f"--last {last}: expected a number of steps, at least 1")
    try:
        plant, entropy = identify_run(run, last)
        proposal = propose_gains(plant, entropy, aim, settling_steps * _updates(run), _delay(run))
    except ValueError as error:  # what `algorithms` says about numbers is here about the user's run
        raise UserError(f"{run_dir}: {error}") from error
    return Tuned(plant, proposal, aim)


def _delay(run: Run) -> int:
    """Optimizer steps by which the entropy that drives alpha is old: none, unless that of sampling is fed back."""
    old = run.setting("entropy_control.feedback") == "sampling"
    return int(run.number("rollout.lag", 0)) * _updates(run) if old else 0


def _updates(run: Run) -> int:
    """Number of optimizer steps of one rollout."""
    keys = ("algorithm.optimizer_steps_per_rollout", "algorithm.epochs_per_rollout")
    return math.prod(int(run.number(key, 1)) for key in keys)


def add_parser(commands: Any) -> None:
    """Add `tune` to the subparsers of the command line."""
    parser = commands.add_parser("tune", help="propose K_p and K_i from how entropy followed alpha in a run")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="best one with entropy_control.controller=probe")
    parser.add_argument(
        "--settling-steps", type=number(above=0), default=50.0, metavar="N", help="rollout steps (default: 50)"
    )
    parser.add_argument("--target", type=number(above=0), metavar="H", help="nats (default: the run's last target)")
    parser.add_argument("--last", type=whole(1), metavar="N", help="look at the last N steps only")
    parser.set_defaults(command=_tune)


def _tune(options: argparse.Namespace) -> None:
    tuned = tune_run(options.run_dir, options.settling_steps, options.target, options.last)
    console = Console(highlight=False)
    for line in tuned.proposal.reasoning:
        console.print(f"- {escape(printable(line))}", soft_wrap=True)
    words = (f"{key}={value if isinstance(value, str) else f'{value:g}'}" for key, value in tuned.overrides.items())
    console.print(" ".join(words), soft_wrap=True)
