"""The command line: one subparser a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence as Args

from rich.console import Console
from rich.markup import escape

from megatron_entropic import __version__
from megatron_entropic.commands import (
    convert,
    evaluate,
    export,
    plan,
    preflight,
    replay,
    report,
    rollouts,
    score,
    train,
    tune,
)
from megatron_entropic.errors import Interrupted, RunError, StopAsked, UserError, explained
from megatron_entropic.files.text import printable

COMMANDS = (train, preflight, plan, evaluate, score, convert, export, replay, rollouts, report, tune)
"""Modules of the commands in the order of the help text; each says with `add_parser` what it takes."""

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
STOPPED = 75
"""Exit status after a signal asked to stop, EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command continues."""


def main(arguments: Args[str] | None = None) -> int:
    """Entry point of `megatron-entropic`.

    Returns:
        0, 1 (the work failed, or `verify` found a difference), 2 (bad input), 75 (asked to stop) or 130 (interrupted).
        What is none of `errors` is a bug of ours: it goes on as it is, and Python prints its traceback and ends with 1.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on overrides that come after an option.
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        return options.command(options) or 0
    except StopAsked as error:
        errors.print(f"[bold yellow]stopped:[/] {escape(printable(str(error)))}")
        return INTERRUPTED if isinstance(error, Interrupted) else STOPPED
    except (UserError, RunError, OSError) as error:
        told = explained(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        errors.print(f"[bold red]error:[/] {escape(printable(str(told)))}")
        return BAD_INPUT if isinstance(told, UserError) else FAILED
    except MemoryError:
        errors.print("[bold red]error:[/] the machine, or a limit of memory (ulimit -v), has no more to give")
        return FAILED
    except KeyboardInterrupt:
        errors.print("[bold yellow]interrupted[/]: ended at once; train and evaluate continue from what they saved")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-entropic", description="Reinforcement learning on Megatron-core with controlled entropy."
    )
    parser.add_argument("--version", action="version", version=f"megatron-entropic {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
